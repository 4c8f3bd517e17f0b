"""Where a model is saved to: what is refused before anything is touched, and what stays."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

import weightpack as wp  # noqa: E402
from tests.loading import nets  # noqa: E402
from tests.saving.saver import net_of  # noqa: E402
from weightpack.errors import ConfigError, FormatError  # noqa: E402
from weightpack.saving.destination import carried_files, current_folder, folders_above, is_replaced  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def tree(top: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below a folder: kind, rights, length, times, inode and content."""
    found = {}
    for path in [top, *sorted(top.rglob("*"))]:
        status = path.lstat()
        held = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        where = os.readlink(path) if path.is_symlink() else ""
        key = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino, status.st_nlink)
        found[str(path.relative_to(top))] = (*key, held, where)
    return found


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """`refused(kind, model, place, ...)`: the save raises `kind`, one line and a hint at most, and nothing in
    the test's folder, or in a further one, is another than before."""

    def check(kind: Any, model: Any, place: Path, *, also: Path | None = None, **options: Any) -> str:
        tops = [tmp_path, *([also] if also else [])]
        before = [tree(top) for top in tops]
        with pytest.raises(kind) as raised:
            model.save_pretrained(place, **options)
        assert [tree(top) for top in tops] == before
        told = str(raised.value)
        lines = told.splitlines()
        assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: "))
        assert "--overwrite" not in told
        return told

    return check


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path.with_name(tmp_path.name + "-disk")
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def read_only(place: Path) -> bool:
    """Makes a file system, or without the right to do so a folder, read-only."""
    if os.geteuid() == 0:
        return subprocess.run(["mount", "-o", "remount,ro", str(place)], capture_output=True).returncode == 0
    place.chmod(0o555)
    return True


def test_what_cannot_be_saved_touches_nothing(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net_of(width=64).save_pretrained(tmp_path / "old")
    packed = nets.Net.from_pretrained(
        tmp_path / "old", quantization_config=wp.GGUFQuantizationConfig(quant_type="q8_0")
    )
    kind = type(wp.quantizer_of(packed))
    monkeypatch.setattr(kind, "is_serializable", False)
    monkeypatch.setattr(kind, "unserializable_reason", "they are not meant to")
    for place in ("old", "new"):
        options = {"overwrite": True} if place == "old" else {}
        told = refused(ConfigError, packed, tmp_path / place, **options)
        assert told.startswith("gguf models cannot be saved: they are not meant to")
        net = net_of(width=64)
        net.blocks[1].to("meta")
        told = refused(FormatError, net, tmp_path / place, **options)
        assert told.startswith('"blocks.1.norm.weight" is not in memory')
        net = net_of(width=64)
        net.config = {"width": object()}
        assert "is no JSON" in refused(ConfigError, net, tmp_path / place, **options)


SIZES = ["5 potatoes", "", "GB", "-5GB", "0", "0KB", 0, -1, None, True, 5e9, "1e3MB", "nanGB", [1]]


@pytest.mark.parametrize("size", SIZES)
def test_sizes_that_are_none(refused: Callable[..., str], tmp_path: Path, size: Any) -> None:
    told = refused(ConfigError, net_of(), tmp_path / "new", max_shard_size=size)
    assert told.startswith("max_shard_size is not ")


@pytest.mark.parametrize("size", [1, "5", "1B", "100KB", "0.1MB", " 1 mb ", "1MiB", "5GB", 1 << 62])
def test_sizes_that_are_some(tmp_path: Path, size: Any) -> None:
    """What huggingface_hub takes, and powers of 1024 and plain bytes besides."""
    from weightpack.sizes import parse_size

    assert parse_size(size, "max_shard_size") > 0
    if isinstance(size, str) and not size.endswith(("iB", "B")):
        return
    hub = pytest.importorskip("huggingface_hub.serialization._base")
    if isinstance(size, str) and size not in ("1B", "1MiB"):
        assert parse_size(size, "max_shard_size") == hub.parse_size_to_int(size)


def test_places_that_are_none(refused: Callable[..., str], tmp_path: Path) -> None:
    net = net_of()
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(ConfigError, net, tmp_path / "file", overwrite=True)
    told = refused(OSError, net, tmp_path / "file" / "below" / "new", overwrite=True)
    assert "Not a directory" in told or "not a directory" in told
    (tmp_path / "nowhere").symlink_to("absent")
    assert "is a link to" in refused(ConfigError, net, tmp_path / "nowhere", overwrite=True)
    (tmp_path / "round").symlink_to("round")
    assert "is a link to" in refused(ConfigError, net, tmp_path / "round", overwrite=True)
    os.mkfifo(tmp_path / "pipe")
    assert "is a file" in refused(ConfigError, net, tmp_path / "pipe", overwrite=True)
    refused(ConfigError, net, Path("/"), overwrite=True)
    refused(OSError, net, tmp_path / ("long" * 100))


def test_a_model_that_is_there_stays_unless_asked(refused: Callable[..., str], tmp_path: Path) -> None:
    place = tmp_path / "out"
    net_of(width=64).save_pretrained(place, max_shard_size="60KB")
    told = refused(ConfigError, net_of(), place)
    assert "config.json and" in told
    assert "overwrite=True" in told
    shard, index = "model-00001-of-00009.safetensors", "model.safetensors.index.json"
    for name in ("config.json", "model.safetensors", shard, index):
        alone = tmp_path / name
        alone.mkdir()
        (alone / name).write_text("{}")
        assert f"holds {name}\n" in refused(ConfigError, net_of(), alone)
    folder = tmp_path / "folder"
    (folder / "config.json" / "x").mkdir(parents=True)
    assert "is a folder" in refused(ConfigError, net_of(), folder, overwrite=True)


def test_a_full_disk_is_found_first(refused: Callable[..., str], small_disk: Path) -> None:
    net_of(width=64).save_pretrained(small_disk / "old")
    big = net_of(width=512)
    for place in ("old", "new", "a/b/new"):
        told = refused(OSError, big, small_disk / place, also=small_disk, overwrite=True)
        assert "not enough disk space" in told
        assert "bytes are needed" in told
    wp.from_pretrained(nets.Net, small_disk / "old")
    # What a killed save left counts as free, and goes.
    left = small_disk / "old.partial-0123456789ab"
    (left / "content").mkdir(parents=True)
    (left / "journal").write_text('{"begin":{"plan":"p","sources":"s","version":"v","transient":true}}\n')
    (left / "content" / "weights").write_bytes(bytes(1_500_000))
    net_of(width=128).save_pretrained(small_disk / "old", overwrite=True)
    assert [path.name for path in small_disk.iterdir()] == ["old"]


def test_a_disk_that_fills_up_later_loses_nothing(tmp_path: Path, small_disk: Path) -> None:
    """Space is reserved before anything is written, and given back."""
    place = small_disk / "out"
    net_of(width=64).save_pretrained(place)
    (place / "notes").write_text("mine")
    before = tree(small_disk)

    def fill(*report: Any) -> None:
        (small_disk / "other").write_bytes(bytes(3_000_000))

    with pytest.raises(OSError, match="No space left"):
        net_of(width=160).save_pretrained(place, overwrite=True, on_progress=fill)
    (small_disk / "other").unlink(missing_ok=True)
    assert tree(small_disk).keys() == before.keys()
    assert (place / "notes").read_text() == "mine"
    wp.from_pretrained(nets.Net, place)


def test_a_place_that_cannot_be_written(refused: Callable[..., str], small_disk: Path) -> None:
    net_of(width=64).save_pretrained(small_disk / "old")
    if not read_only(small_disk):
        pytest.skip("cannot be made read-only")
    for place in ("old", "new", "a/b/new"):
        told = refused(OSError, net_of(), small_disk / place, also=small_disk, overwrite=True)
        assert "cannot write to" in told
        assert str(small_disk) in told
    if os.geteuid() == 0:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


def test_a_mount_point_has_one_place(refused: Callable[..., str], small_disk: Path) -> None:
    for options in ({}, {"overwrite": True}):
        told = refused(ConfigError, net_of(), small_disk, also=small_disk, **options)
        assert "is a mount point" in told
        assert "a folder in it" in told
    net_of().save_pretrained(small_disk / "below")


def test_folders_above_are_made_and_go_if_it_fails(tmp_path: Path) -> None:
    net_of().save_pretrained(tmp_path / "a" / "b" / "c")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["c"]

    def fail() -> None:
        with folders_above(tmp_path / "d" / "e" / "f"):
            (tmp_path / "d" / "e").mkdir(parents=True)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert not (tmp_path / "d").exists()


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "disk" / "real" / "notes").write_text("mine")
    (tmp_path / "link").symlink_to("disk/real")
    for options in ({}, {"overwrite": True}):
        net = net_of(seed=len(options), width=64)
        net.save_pretrained(tmp_path / "link", **options)
        assert os.readlink(tmp_path / "link") == "disk/real"
        for place in (tmp_path / "link", tmp_path / "disk" / "real"):
            assert torch.equal(wp.from_pretrained(nets.Net, place).embed.weight, net.embed.weight)
            assert (place / "notes").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["real"]


def test_rights_and_other_names_stay(tmp_path: Path) -> None:
    place = tmp_path / "out"
    (place / "sub").mkdir(parents=True)
    (place / "sub" / "a").write_text("1")
    os.link(place / "sub" / "a", tmp_path / "second name")
    inode = (place / "sub" / "a").stat().st_ino
    (place / "sub").chmod(0o500)
    place.chmod(0o750)
    for _ in range(2):
        net_of(width=64).save_pretrained(place, overwrite=True)
        assert place.stat().st_mode & 0o777 == 0o750
        assert (place / "sub").stat().st_mode & 0o777 == 0o500
        assert (place / "sub" / "a").stat().st_ino == inode
        assert (tmp_path / "second name").stat().st_nlink == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "second name"]


def test_an_earlier_model_gives_way_whole(tmp_path: Path) -> None:
    place = tmp_path / "out"
    net_of(width=64).save_pretrained(place, max_shard_size="60KB", variant="fp16")
    net_of(width=64).save_pretrained(place, max_shard_size="60KB", overwrite=True)
    shards = {path.name for path in place.glob("model-*")}
    fp16 = {path.name for path in place.glob("model.*fp16*")}
    assert len(shards) > 2
    net_of(width=64).save_pretrained(place, overwrite=True)
    names = {path.name for path in place.iterdir()}
    assert names == fp16 | {"config.json", "model.safetensors"}
    net_of(width=64).save_pretrained(place, variant="fp16", overwrite=True)
    names = {path.name for path in place.iterdir()}
    assert names == {"config.json", "model.safetensors", "model.fp16.safetensors"}


def test_the_process_stays_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "sub")
    net = net_of(width=64)
    net.save_pretrained("..")
    assert Path(os.getcwd()) == tmp_path / "out" / "sub"
    assert sorted(os.listdir("..")) == ["config.json", "model.safetensors", "sub"]
    monkeypatch.chdir("..")
    net.save_pretrained(".", overwrite=True)
    assert "model.safetensors" in os.listdir(".")
    with current_folder(tmp_path / "elsewhere"):
        os.chdir(tmp_path)
    assert Path(os.getcwd()) == tmp_path


def test_which_files_are_a_models() -> None:
    for name in (
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "diffusion_pytorch_model-00001-of-00012.bin",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        "quanto_qmap.json",
    ):
        assert is_replaced(name, None), name
    for name in ("model.fp16.safetensors", "tokenizer.json", "model.safetensors.bak", "mymodel.safetensors", "a.bin"):
        assert not is_replaced(name, None), name
    assert is_replaced("model.fp16-00001-of-00002.safetensors", "fp16")
    assert is_replaced("model.safetensors.index.fp16.json", "fp16")
    assert not is_replaced("model.safetensors", "fp16")
    assert not is_replaced("own.safetensors", None)
    assert is_replaced("own.safetensors", None, "own")


def test_links_in_the_way_give_way_and_what_they_lead_to_stays(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model.safetensors").write_text("theirs")
    place = tmp_path / "out"
    place.mkdir()
    (place / "part").symlink_to(tmp_path / "elsewhere")
    (place / "model.safetensors").symlink_to(tmp_path / "elsewhere" / "model.safetensors")

    def is_old(name: str) -> bool:
        return is_replaced(name, None)

    with pytest.raises(ConfigError, match=r"holds model\.safetensors and another"):
        carried_files(place, {"part/config.json"}, is_old, overwrite=False)
    assert carried_files(place, {"part/config.json"}, is_old, overwrite=True) == []
    net_of(width=64).save_pretrained(place, overwrite=True)
    assert (tmp_path / "elsewhere" / "model.safetensors").read_text() == "theirs"
    assert not (place / "model.safetensors").is_symlink()
    assert (place / "part").is_symlink()
