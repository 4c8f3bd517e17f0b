"""A save that is killed, interrupted or not alone: the old model or the new one, and nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")

import weightpack as wp  # noqa: E402
from tests.loading import nets  # noqa: E402
from tests.saving.saver import Saver, net_of  # noqa: E402
from weightpack.errors import ConfigError, FormatError  # noqa: E402
from weightpack.saving.destination import folder_beside  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

KILLS = 50
OLD: dict[str, Any] = {"seed": 1, "width": 64, "depth": 2}
NEW: dict[str, Any] = {"seed": 2, "width": 96, "depth": 3, "transposed": True}
OLD_SHARD, NEW_SHARD = "60KB", "100KB"


@pytest.fixture(scope="module")
def saver() -> Iterator[Saver]:
    one = Saver()
    yield one
    one.close()


def content(net: Any) -> dict[str, Any]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def by_index(folder: Path, infix: str = "") -> dict[str, Any]:
    """The tensors of a folder as any reader of safetensors finds them."""
    from safetensors.torch import load_file

    index = folder / f"model.safetensors.index{infix}.json"
    if not index.exists():
        return dict(load_file(folder / f"model{infix}.safetensors"))
    places = json.loads(index.read_text())["weight_map"]
    tensors: dict[str, Any] = {}
    for file in sorted(set(places.values())):
        held = load_file(folder / file)
        assert sorted(held) == sorted(name for name, place in places.items() if place == file)
        tensors |= held
    return tensors


def loaded(folder: Path, **options: Any) -> dict[str, Any]:
    """The tensors of a folder, the same by every way of loading it."""
    tensors = by_index(folder)
    assert same(content(wp.from_pretrained(nets.Net, folder, **options)), tensors)
    return tensors


def add_others(folder: Path) -> None:
    """Files that are not the model's."""
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes" / "deep").mkdir(parents=True)
    (folder / "notes" / "deep" / "läse mich").write_text("mine")
    (folder / "empty").mkdir()
    (folder / "model.fp16.safetensors").write_bytes(b"another variant")
    (folder / "link").symlink_to("tokenizer.json")
    (folder / "folder link").symlink_to("notes")
    os.mkfifo(folder / "pipe")


def others_are_there(folder: Path) -> bool:
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert (folder / "notes" / "deep" / "läse mich").read_text() == "mine"
    assert (folder / "model.fp16.safetensors").read_bytes() == b"another variant"
    assert os.readlink(folder / "link") == "tokenizer.json"
    assert os.readlink(folder / "folder link") == "notes"
    return (folder / "empty").is_dir() and (folder / "pipe").is_fifo()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the old model and other files, and a whole copy of it beside."""
    net_of(**OLD).save_pretrained(tmp_path / "out", max_shard_size=OLD_SHARD)
    add_others(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(names) > 2
    return tmp_path / "out"


def restore(place: Path, kept: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(kept, place, symlinks=True, ignore=shutil.ignore_patterns("pipe"))
    os.mkfifo(place / "pipe")


def aside(place: Path) -> Path:
    kept = place.with_name("kept")
    shutil.copytree(place, kept, symlinks=True, ignore=shutil.ignore_patterns("pipe"))
    return kept


def leftovers(place: Path) -> list[str]:
    return [path.name for path in place.parent.glob(f"{place.name}.*")]


def kill(pid: int, by: int = signal.SIGKILL) -> None:
    """Where the process has ended by itself, nothing."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, by)


def undisturbed(saver: Saver, place: Path) -> float:
    """Seconds of a save."""
    saver.start(NEW, place, max_shard_size=NEW_SHARD, overwrite=True)
    started = time.monotonic()
    assert saver.wait() == 0
    return time.monotonic() - started


def test_kills_at_random_while_overwriting(saver: Saver, place: Path) -> None:
    old, new = content(net_of(**OLD)), content(net_of(**NEW))
    kept = aside(place)
    assert same(loaded(place), old)
    seconds = undisturbed(saver, place)
    assert same(loaded(place), new)
    chance = random.Random(5)
    killed, found = 0, {"old": 0, "new": 0}
    for attempt in range(8 * KILLS):
        restore(place, kept)
        pid = saver.start(NEW, place, max_shard_size=NEW_SHARD, overwrite=True)
        time.sleep(chance.uniform(0, 1.05) * seconds)
        kill(pid)
        # A kill that comes too late, on a machine whose speed varies, does not count.
        killed += saver.wait() == -signal.SIGKILL
        tensors = loaded(place) if attempt % 5 == 0 else by_index(place)
        assert same(tensors, old) or same(tensors, new)
        found["new" if same(tensors, new) else "old"] += 1
        # What says which class and arguments, and what says which weights, belong together.
        depth = json.loads((place / "config.json").read_text())["depth"]
        assert f"blocks.{depth - 1}.up.weight" in tensors
        assert f"blocks.{depth}.up.weight" not in tensors
        assert others_are_there(place)
        if killed == KILLS:
            break
    assert killed == KILLS
    assert found["old"]
    assert undisturbed(saver, place) > 0
    assert same(loaded(place), new)
    assert others_are_there(place)
    assert leftovers(place) == []


POINTS = ["keep 1", "keep 2", "keep 3", "keep 4", "read 1", "read 3", "progress"]


@pytest.mark.parametrize("point", POINTS)
def test_kills_at_every_step(saver: Saver, place: Path, point: str) -> None:
    old, new = content(net_of(**OLD)), content(net_of(**NEW))
    saver.start(NEW, place, die=point, max_shard_size=NEW_SHARD, overwrite=True)
    assert saver.wait() == -signal.SIGKILL
    assert same(loaded(place), new if point == "keep 4" else old)
    assert others_are_there(place)
    assert len(leftovers(place)) == (point != "keep 1")
    saver.start(OLD, place, max_shard_size=NEW_SHARD, overwrite=True)
    assert saver.wait() == 0
    assert same(loaded(place), old)
    assert others_are_there(place)
    assert leftovers(place) == []


def test_what_is_made_aside_goes_too(saver: Saver, place: Path) -> None:
    """Files that torch writes wait beside the destination for those of the engine."""
    saver.start(NEW, place, die="keep 2", overwrite=True, safe_serialization=False)
    assert saver.wait() == -signal.SIGKILL
    assert len(leftovers(place)) == 2
    with folder_beside(place) as live:
        (live / "file").write_text("mine")
        saver.start(NEW, place, overwrite=True, safe_serialization=False)
        assert saver.wait() == 0
        assert (live / "file").read_text() == "mine"
        assert len(leftovers(place)) == 1
    assert leftovers(place) == []
    assert same(content(wp.from_pretrained(nets.Net, place)), content(net_of(**NEW)))
    assert others_are_there(place)


def test_kills_during_a_first_save(saver: Saver, tmp_path: Path) -> None:
    place = tmp_path / "above" / "out"
    new = content(net_of(**NEW))
    seconds = undisturbed(saver, place)
    chance = random.Random(6)
    for _ in range(KILLS // 3):
        shutil.rmtree(place)
        pid = saver.start(NEW, place, max_shard_size=NEW_SHARD)
        time.sleep(chance.uniform(0, 1) * seconds)
        kill(pid)
        saver.wait()
        if place.exists():
            assert same(loaded(place), new)
        else:
            # What is there does not pass for a model: weights without a header, or no config yet.
            for partial in place.parent.iterdir():
                with pytest.raises((wp.WeightpackError, OSError)):
                    wp.from_pretrained(nets.Net, partial)
        shutil.rmtree(place, ignore_errors=True)
        assert undisturbed(saver, place) > 0
        assert leftovers(place) == []


def test_an_interrupt_leaves_nothing_behind(saver: Saver, tmp_path: Path) -> None:
    place = tmp_path / "out"
    big = {"width": 512, "depth": 10, "transposed": True}
    for delay in (0.0, 0.02, 0.05):
        pid = saver.start(big, place, max_shard_size="1MB", threads=1)
        time.sleep(delay)
        kill(pid, signal.SIGINT)
        if saver.wait() == 0:
            shutil.rmtree(place)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("mine"), SystemExit(3)])
def test_an_error_in_a_report_comes_through(place: Path, error: Any) -> None:
    def fail(*report: Any) -> None:
        raise error

    before = loaded(place)
    kind = error if isinstance(error, type) else type(error)
    with pytest.raises(kind):
        net_of(**NEW).save_pretrained(place, overwrite=True, on_progress=fail)
    with pytest.raises(kind):
        net_of(**NEW).save_pretrained(place.parent / "a" / "b", on_progress=fail)
    assert same(loaded(place), before)
    assert [path.name for path in place.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("threads", [1, 4])
def test_a_tensor_that_cannot_be_read_is_named(place: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    from weightpack.stored import Reader

    def fail(self: Any, offset: int, count: int) -> Any:
        raise RuntimeError("the device is gone")

    before = loaded(place)
    monkeypatch.setattr(Reader, "__call__", fail)
    with pytest.raises(FormatError, match=r"the device is gone.*blocks\.0\.up\.weight") as raised:
        net_of(**NEW).save_pretrained(place, overwrite=True, threads=threads)
    assert "\n" not in str(raised.value)
    assert same(loaded(place), before)
    assert leftovers(place) == []


# Several at once.


def test_what_killed_saves_left_goes_and_what_is_at_work_stays(saver: Saver, place: Path) -> None:
    other = Saver()
    try:
        for _ in range(2):
            saver.start(NEW, place, die="keep 2", overwrite=True)
            saver.wait()
        resumable = place.with_name("out.partial-0123456789ab")
        (resumable / "content").mkdir(parents=True)
        begin = {"begin": {"plan": "p", "sources": "s", "version": "v"}}
        (resumable / "journal").write_text(json.dumps(begin) + "\n")
        (resumable / "content" / "weights").write_text("half")
        mine = place.with_name("out.partial-notes")
        mine.mkdir()
        # One that works on, until it is told to go on.
        pid = other.start(NEW, place, overwrite=True, max_shard_size=1)
        while len(leftovers(place)) < 3:
            time.sleep(0.001)
        os.kill(pid, signal.SIGSTOP)
        live = {name for name in leftovers(place)} - {resumable.name, mine.name}
        net_of(**OLD).save_pretrained(place, overwrite=True)
        left = set(leftovers(place))
        assert {resumable.name, mine.name} <= left
        assert len(left) <= 3
        assert left <= live | {resumable.name, mine.name}
        assert same(loaded(place), content(net_of(**OLD)))
        os.kill(pid, signal.SIGCONT)
        assert other.wait() == 0
        assert same(loaded(place), content(net_of(**NEW)))
        assert set(leftovers(place)) == {resumable.name, mine.name}
        assert (resumable / "content" / "weights").read_text() == "half"
        assert others_are_there(place)
    finally:
        other.close()


def test_the_last_of_two_processes_counts_as_a_whole(saver: Saver, place: Path) -> None:
    models = [content(net_of(**OLD)), content(net_of(**NEW))]
    other = Saver()
    try:
        for _ in range(8):
            saver.start(OLD, place, max_shard_size=NEW_SHARD, overwrite=True)
            other.start(NEW, place, max_shard_size=OLD_SHARD, overwrite=True)
            assert (saver.wait(), other.wait()) == (0, 0)
            assert any(same(loaded(place), model) for model in models)
            assert others_are_there(place)
            assert leftovers(place) == []
    finally:
        other.close()


def save_all(saves: list[tuple[dict[str, Any], Path, dict[str, Any]]]) -> list[BaseException | None]:
    """All at once, each in a thread; what each raised."""
    results: list[BaseException | None] = [None] * len(saves)
    barrier = threading.Barrier(len(saves))
    # Random numbers have one source for all threads.
    models = [net_of(**net) for net, _, _ in saves]

    def save(number: int) -> None:
        _, place, options = saves[number]
        barrier.wait()
        try:
            models[number].save_pretrained(place, **options)
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=save, args=(number,)) for number in range(len(saves))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_at_one_place(place: Path) -> None:
    options = {"overwrite": True, "max_shard_size": NEW_SHARD}
    for _ in range(4):
        # Two of the same structure among them.
        nets_ = [OLD, {**OLD, "seed": 9}, NEW]
        assert save_all([(net, place, options) for net in nets_]) == [None] * 3
        tensors = loaded(place)
        assert sum(same(tensors, content(net_of(**net))) for net in nets_) == 1
        assert others_are_there(place)
        assert leftovers(place) == []


def test_one_alone_is_first(tmp_path: Path) -> None:
    for number in range(4):
        place = tmp_path / str(number)
        results = save_all([(net, place, {}) for net in (OLD, NEW)])
        (winner,) = [net for net, raised in zip((OLD, NEW), results, strict=True) if raised is None]
        (loser,) = [raised for raised in results if raised is not None]
        assert isinstance(loser, ConfigError)
        assert "overwrite=True" in str(loser)
        assert same(loaded(place), content(net_of(**winner)))
        assert leftovers(place) == []


def test_savers_of_two_variants_keep_each_others_files(tmp_path: Path) -> None:
    place = tmp_path / "out"
    for round_ in range(4):
        one, other = {**OLD, "seed": 10 + round_}, {**OLD, "seed": 20 + round_}
        options: dict[str, Any] = {"overwrite": True, "max_shard_size": OLD_SHARD}
        results = save_all([(one, place, options), (other, place, {**options, "variant": "fp16"})])
        assert results == [None, None]
        assert same(by_index(place), content(net_of(**one)))
        assert same(by_index(place, ".fp16"), content(net_of(**other)))


def test_files_that_come_and_change_meanwhile_are_kept(place: Path) -> None:
    """Each is made, replaced or written to at another moment of the save."""
    from weightpack.saving import parts

    list_files, calls = parts.carried_files, 0

    def meddle(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        now = f"{calls}"
        if calls < 4:
            (place / f"before {now}").write_text(now)
        listed = list_files(*args, **options)
        # After the listing: too late for this one. At the fourth the folder has been replaced.
        where = Path(args[0])
        (where / f"after {now}").write_text(now)
        (where / "replacement").write_text(now)
        os.replace(where / "replacement", where / "replaced")
        with (where / "notes" / "deep" / "läse mich").open("a") as file:
            file.write(now)
        return listed

    (place / "replaced").write_text("0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "carried_files", meddle)
        net_of(**NEW).save_pretrained(place, overwrite=True)
    assert calls == 4
    assert same(loaded(place), content(net_of(**NEW)))
    for name in ("before 1", "before 2", "before 3", "after 1", "after 2", "after 3"):
        assert (place / name).read_text() == name[-1]
    assert (place / "notes" / "deep" / "läse mich").read_text() == "mine1234"
    assert (place / "replaced").read_text() in ("3", "4")
    assert leftovers(place) == []


def test_files_that_vanish_meanwhile_are_no_obstacle(place: Path) -> None:
    from weightpack.saving import parts

    list_files = parts.carried_files

    def remove(*args: Any, **options: Any) -> Any:
        listed = list_files(*args, **options)
        (Path(args[0]) / "tokenizer.json").unlink(missing_ok=True)
        return listed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "carried_files", remove)
        net_of(**NEW).save_pretrained(place, overwrite=True)
    assert same(loaded(place), content(net_of(**NEW)))
    assert not (place / "tokenizer.json").exists()


def test_a_model_is_saved_over_the_files_it_is_mapped_from(place: Path) -> None:
    """The old files live until nobody looks at them."""
    model = wp.from_pretrained(nets.Net, place, mmap=True)
    before = content(model)
    for _ in range(2):
        model.save_pretrained(place, overwrite=True, max_shard_size=NEW_SHARD)
        assert same(loaded(place), before)
    assert same(content(model), before)
