"""Sharded checkpoints: the hosts' indexes open here, ours open there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

import weightpack as wp

from ..conftest import CommandLine, write_safetensors
from .conftest import copy_tensors

Peer = Callable[[str], ModuleType]


def tensors(count: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"layers.{i}.weight": rng.normal(size=(32, 16)).astype(ml_dtypes.bfloat16) for i in range(count)}


def write_shard(path: Path, arrays: dict[str, np.ndarray], **metadata: str) -> None:
    write_safetensors(path, {name: ("BF16", list(a.shape), a.tobytes()) for name, a in arrays.items()}, metadata)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Our own shards of a single file; gives the index."""
    write_shard(tmp_path / "source.safetensors", tensors())
    copy_tensors(tmp_path / "source.safetensors", tmp_path / "out", metadata={"format": "pt"}, max_shard_bytes=2500)
    return tmp_path / "out" / "model.safetensors.index.json"


def test_the_index_has_the_hosts_form(sharded: Path) -> None:
    text = sharded.read_text("utf-8")
    index = json.loads(text)
    assert text == json.dumps(index, indent=2, sort_keys=True) + "\n"
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == 6 * 32 * 16 * 2
    assert sorted(path.name for path in sharded.parent.iterdir()) == [*shards, sharded.name]


def test_hosts_load_our_shards(sharded: Path, peer: Peer) -> None:
    torch, hub = peer("torch"), peer("huggingface_hub")
    module = torch.nn.Module()
    module.layers = torch.nn.ModuleList(torch.nn.Linear(16, 32, bias=False, dtype=torch.bfloat16) for _ in range(6))
    hub.load_torch_model(module, sharded.parent, strict=True, safe=True)
    for name, value in tensors().items():
        loaded = module.state_dict()[name]
        assert bytes(loaded.view(torch.uint8).flatten().numpy()) == value.tobytes()


def test_our_shards_open_as_one(sharded: Path) -> None:
    for path in (sharded, sharded.parent):
        with wp.open_checkpoint(path) as checkpoint:
            assert not checkpoint.warnings
            for name, value in tensors().items():
                assert checkpoint.read(name).tobytes() == value.tobytes()


def test_shards_of_the_hub_open_as_one(peer: Peer, tmp_path: Path) -> None:
    torch, hub = peer("torch"), peer("huggingface_hub")
    state = {name: torch.from_numpy(value.view(np.int16)) for name, value in tensors().items()}
    hub.save_torch_state_dict(state, tmp_path, max_shard_size=2500)
    with wp.open_checkpoint(tmp_path) as checkpoint:
        assert len(checkpoint.files) == 3
        for name, value in tensors().items():
            assert checkpoint.read(name).tobytes() == value.tobytes()


@pytest.mark.parametrize(
    ("name", "shard"),
    [
        ("model.safetensors.index.fp16.json", "model.fp16-00001-of-00001.safetensors"),
        (
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
        ),
    ],
)
def test_variants_open_by_their_index(tmp_path: Path, name: str, shard: str) -> None:
    write_shard(tmp_path / shard, tensors(1))
    (tmp_path / name).write_text(json.dumps({"metadata": {}, "weight_map": {"layers.0.weight": shard}}))
    assert list(wp.open_checkpoint(tmp_path / name)) == ["layers.0.weight"]


def test_shards_of_two_conversions_are_told_apart(sharded: Path, tmp_path: Path) -> None:
    shard = sharded.parent / "model-00002-of-00003.safetensors"
    index = json.loads(sharded.read_text("utf-8"))
    names = [name for name, file in index["weight_map"].items() if file == shard.name]
    arrays = {name: array for name, array in tensors().items() if name in names}
    write_shard(shard, arrays, **{"weightpack.plan": "0" * 32})
    (warning,) = wp.open_checkpoint(sharded).warnings
    assert shard.name in warning
    assert "may be a mixture" in warning


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_shard(blobs / "weights", tensors(1))
    (blobs / "index").write_text('{"weight_map": {"layers.0.weight": "model-00001-of-00001.safetensors"}}')
    (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/index")
    (snapshot / "model-00001-of-00001.safetensors").symlink_to("../../blobs/weights")
    assert list(wp.open_checkpoint(snapshot / "model.safetensors.index.json")) == ["layers.0.weight"]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing"])
def test_shards_that_are_not_files_are_refused_at_once(tmp_path: Path, command_line: CommandLine, kind: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "m.safetensors"}}')
    shard = tmp_path / "m.safetensors"
    if kind == "pipe":
        os.mkfifo(shard)
    elif kind == "device":
        shard.symlink_to("/dev/zero")
    elif kind == "folder":
        shard.mkdir()
    done = command_line("inspect", index, timeout=30)
    expected = "is missing" if kind == "missing" else f"expected a regular file, got a {kind}"
    assert done.returncode == 3, done.stderr
    assert expected in done.stderr
    assert "m.safetensors" in done.stderr


OPEN_AS_NOBODY = """
import os, sys
from weightpack import _rust
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    _rust.Checkpoint.open(sys.argv[1])
except PermissionError as error:
    print(error.filename)
"""


def test_a_shard_that_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "m.safetensors"}}')
        shard = folder / "m.safetensors"
        write_shard(shard, {})
        shard.chmod(0)
        words = [sys.executable, "-c", OPEN_AS_NOBODY, str(folder / "model.safetensors.index.json")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == str(shard), done.stderr
