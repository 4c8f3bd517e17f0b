"""Models by their name on the hub, out of a cache made here; the network is never asked."""

from __future__ import annotations

import shutil

import pytest

torch = pytest.importorskip("torch")
nets = pytest.importorskip("tests.loading.nets")

import weightpack as wp  # noqa: E402
from weightpack.errors import CheckpointError  # noqa: E402
from weightpack.loading.hub import is_name  # noqa: E402

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def hub(peer):
    return peer("huggingface_hub")


def put_in_cache(cache, folder, name="owner/net"):
    """The layout of the hub's cache: references and snapshots."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, place / "snapshots" / COMMIT)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("subfolder", [None, "inner"])
def test_a_model_in_the_cache(tmp_path, shards, subfolder):
    net = nets.make()
    top = tmp_path / "top"
    nets.save(top / (subfolder or ""), net, shards=shards)
    put_in_cache(tmp_path / "cache", top)
    model = wp.from_pretrained(
        nets.Net, "owner/net", cache_dir=tmp_path / "cache", local_files_only=True, subfolder=subfolder
    )
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in model.state_dict().items())


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(CheckpointError, match='"owner/none" is no folder here, and was not found on the hub'):
        wp.from_pretrained(nets.Net, "owner/none", cache_dir=tmp_path, local_files_only=True)


def test_what_may_be_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "here").mkdir(parents=True)
    assert is_name("owner/net-7B.v2")
    for other in ("owner/here", "net", "/a/b", "./a/b", "a/b/c", "../b", tmp_path / "owner" / "net", "models/net.gguf"):
        assert not is_name(other)
