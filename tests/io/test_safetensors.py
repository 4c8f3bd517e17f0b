"""safetensors files: the peer reads ours, and we read the peer's, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import weightpack as wp

from ..vectors.containers import make as golden
from .conftest import VECTORS, copy_tensors

Peer = Callable[[str], ModuleType]


@pytest.fixture
def every_type(peer: Peer, tmp_path: Path) -> Path:
    """The golden file, written anew by the installed peer."""
    peer("torch")
    peer("safetensors.torch")
    path = tmp_path / "every_type.safetensors"
    path.write_bytes(golden.safetensors_file())
    return path


def test_the_golden_file_is_the_peers(peer: Peer, peer_version: Callable[[str, str], ModuleType]) -> None:
    peer_version("safetensors", golden.SAFETENSORS_VERSION)
    peer("torch")
    assert (VECTORS / "types.safetensors").read_bytes() == golden.safetensors_file()


@pytest.mark.parametrize("reverse", [False, True])
def test_a_copy_differs_from_the_peers_file_in_the_plan_id_only(
    every_type: Path, tmp_path: Path, reverse: bool
) -> None:
    target = tmp_path / "copy.safetensors"
    copy_tensors(every_type, target, metadata={"format": "pt"}, reverse=reverse)

    def parted(path: Path) -> tuple[str, bytes]:
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        assert end % 8 == 0
        return content[8:end].decode(), content[end:]

    text, data = parted(target)
    expected_text, expected_data = parted(every_type)
    assert data == expected_data
    plan_id = json.loads(text)["__metadata__"]["weightpack.plan"]
    assert text.replace(f',"weightpack.plan":"{plan_id}"', "").rstrip(" ") == expected_text.rstrip(" ")


def test_the_peer_reads_ours(every_type: Path, peer: Peer, tmp_path: Path) -> None:
    torch, safetensors, loaders = peer("torch"), peer("safetensors"), peer("safetensors.torch")
    target = tmp_path / "copy.safetensors"
    copy_tensors(every_type, target, metadata={"format": "pt", "é": '"\n'})
    expected = loaders.load_file(every_type)
    loaded = loaders.load_file(target)
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(loaded[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
    with safetensors.safe_open(target, "pt") as opened:
        assert opened.metadata()["é"] == '"\n'
        assert sorted(opened.keys()) == sorted(expected)


def test_we_read_the_peers(every_type: Path, peer: Peer) -> None:
    torch = peer("torch")
    expected = peer("safetensors.torch").load_file(every_type)
    with wp.open_checkpoint(every_type) as checkpoint:
        assert set(checkpoint) == set(expected)
        assert checkpoint.metadata == {"format": "pt"}
        for name, entry in checkpoint.items():
            assert entry.shape == tuple(expected[name].shape), name
            read = checkpoint.read(name)
            assert read.tobytes() == bytes(expected[name].flatten().view(torch.uint8).numpy()), name


def test_packed_results_of_unknown_length_are_read_by_the_peer(peer: Peer, tmp_path: Path) -> None:
    """The quantization state of an NF4 weight is text whose length is known last: the header is padded for it."""
    peer("torch")
    save_file, load_file = peer("safetensors.numpy").save_file, peer("safetensors.torch").load_file
    weight = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    source = tmp_path / "model.safetensors"
    save_file({f"layers.{i}.mlp.up_proj.weight": weight * (i + 1) for i in range(3)}, source)
    target = tmp_path / "out.safetensors"
    wp.convert(source, target, "nf4", double_quant=True, layers="names")
    loaded: dict[str, Any] = load_file(target)
    states = [name for name in loaded if name.endswith("quant_state.bitsandbytes__nf4")]
    assert len(states) == 3
    for name in states:
        assert json.loads(bytes(loaded[name].numpy()))["shape"] == [64, 128]


def test_a_file_that_shrinks_while_it_is_open_is_an_error(every_type: Path) -> None:
    checkpoint = wp.open_checkpoint(every_type)
    with every_type.open("r+b") as file:
        file.truncate(every_type.stat().st_size - 1)
    last = max(checkpoint, key=lambda name: checkpoint[name].dtype == "BOOL")
    with pytest.raises(wp.CheckpointError, match=r"file ends at byte \d+, expected \d+ bytes from byte \d+"):
        checkpoint.read(last)


def test_the_mode_follows_the_umask(every_type: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy.safetensors"
    copy_tensors(every_type, target)
    plain = tmp_path / "plain"
    plain.touch()
    assert target.stat().st_mode == plain.stat().st_mode
