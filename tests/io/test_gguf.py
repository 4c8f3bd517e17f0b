"""GGUF files: gguf-py reads ours, and we read gguf-py's: metadata, shapes, types, data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import weightpack as wp
from weightpack import _rust

from ..vectors.containers import make as golden
from .conftest import VECTORS, copy_tensors

Peer = Callable[[str], ModuleType]
GGUF_FILES = ("little.gguf", "aligned.gguf", "big.gguf", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf")


def contents(reader: Any) -> dict[str, Any]:
    """The key-value pairs that gguf-py sees, its own three counts left out."""
    return {key: (field.types, field.contents()) for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def test_the_golden_files_are_the_peers(peer_version: Callable[[str, str], ModuleType]) -> None:
    peer_version("gguf", golden.GGUF_VERSION)
    written = golden.gguf_files()
    assert sorted(written) == sorted(GGUF_FILES)
    for name, content in written.items():
        assert (VECTORS / name).read_bytes() == content, name


@pytest.mark.parametrize("name", ["little.gguf", "aligned.gguf", "big.gguf"])
def test_metadata_is_what_gguf_py_sees(peer: Peer, name: str) -> None:
    reader = peer("gguf").GGUFReader(VECTORS / name)
    checkpoint = wp.open_checkpoint(VECTORS / name)
    theirs = {key: value for key, (_, value) in contents(reader).items()}
    assert set(checkpoint.metadata) == set(theirs)
    for key, value in theirs.items():
        assert checkpoint.metadata[key] == value, key
        assert checkpoint.metadata_value(key) == value, key
    with pytest.raises(KeyError):
        checkpoint.metadata_value("absent")


@pytest.mark.parametrize("name", ["little.gguf", "aligned.gguf"])
def test_tensors_are_what_gguf_py_sees(peer: Peer, name: str) -> None:
    gguf = peer("gguf")
    checkpoint = wp.open_checkpoint(VECTORS / name)
    for tensor in gguf.GGUFReader(VECTORS / name).tensors:
        entry = checkpoint[tensor.name]
        assert entry.shape == tuple(int(dim) for dim in reversed(tensor.shape))
        assert entry.parts[0].dtype == tensor.tensor_type.name
        expected = tensor.data
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(checkpoint.read(tensor.name), expected)


def test_a_big_endian_file_reads_the_same() -> None:
    little = wp.open_checkpoint(VECTORS / "little.gguf")
    big = wp.open_checkpoint(VECTORS / "big.gguf")
    assert set(little) - set(big) == {"q8_0"}
    for name in big:
        assert np.array_equal(big.read(name), little.read(name)), name
    assert big.metadata == little.metadata


@pytest.mark.parametrize("part", ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"])
def test_a_split_model_reads_the_same(part: str) -> None:
    single = wp.open_checkpoint(VECTORS / "little.gguf")
    split = wp.open_checkpoint(VECTORS / part)
    assert list(split) == list(single)
    for name in single:
        assert np.array_equal(split.read(name), single.read(name)), name
    assert {key for key in split.metadata if not key.startswith("split.")} == set(single.metadata)


@pytest.mark.parametrize("name", ["little.gguf", "aligned.gguf", "m-00001-of-00002.gguf", "big.gguf"])
def test_gguf_py_reads_a_copy(peer: Peer, tmp_path: Path, name: str) -> None:
    gguf = peer("gguf")
    target = tmp_path / "copy.gguf"
    copy_tensors(VECTORS / name, target, carry_metadata=True)
    ours = gguf.GGUFReader(target)
    theirs = gguf.GGUFReader(VECTORS / ("aligned.gguf" if name == "aligned.gguf" else "little.gguf"))
    assert contents(ours) == contents(theirs)
    expected = {tensor.name: tensor for tensor in theirs.tensors}
    assert [tensor.name for tensor in ours.tensors] == [n for n in expected if n != "q8_0" or name != "big.gguf"]
    for tensor in ours.tensors:
        assert tensor.tensor_type == expected[tensor.name].tensor_type
        assert list(tensor.shape) == list(expected[tensor.name].shape)
        assert np.array_equal(tensor.data, expected[tensor.name].data)
        assert tensor.data_offset % ours.alignment == 0


def test_a_copy_of_gguf_pys_file_is_the_same_file(tmp_path: Path) -> None:
    for name in ("little.gguf", "aligned.gguf"):
        target = tmp_path / name
        copy_tensors(VECTORS / name, target, carry_metadata=True)
        assert target.read_bytes() == (VECTORS / name).read_bytes()


def test_metadata_of_every_type_is_written_as_asked(peer: Peer, tmp_path: Path) -> None:
    gguf = peer("gguf")
    types = gguf.GGUFValueType
    asked: list[tuple[str, str, Any, list[Any]]] = [
        ("a.u8", "u8", 255, [types.UINT8]),
        ("a.i64", "i64", -(2**63), [types.INT64]),
        ("a.u64", "u64", 2**64 - 1, [types.UINT64]),
        ("a.f32", "f32", 0.5, [types.FLOAT32]),
        ("a.f64", "f64", 0.1, [types.FLOAT64]),
        ("a.bool", "bool", True, [types.BOOL]),
        ("a.text", "str", "é", [types.STRING]),
        ("a.texts", "[str]", ["a", ""], [types.ARRAY, types.STRING]),
        ("a.numbers", "[i32]", [1, -1], [types.ARRAY, types.INT32]),
    ]
    target = tmp_path / "out.gguf"
    metadata = [[key, kind, value] for key, kind, value, _ in asked]
    copy_tensors(VECTORS / "little.gguf", target, metadata=metadata)
    found = contents(gguf.GGUFReader(target))
    for key, _, value, kinds in asked:
        assert found[key] == (kinds, value), key


def test_a_long_vocabulary_is_shown_short_and_given_whole(peer: Peer, tmp_path: Path) -> None:
    gguf = peer("gguf")
    words = [f"wörd{i}" for i in range(5000)]
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(words)
    writer.add_tensor("w", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    native = _rust.Checkpoint.open(str(path))
    assert json.loads(native.metadata())["tokenizer.ggml.tokens"] == {"type": "str", "count": 5000}
    assert native.metadata_value("tokenizer.ggml.tokens") == words
    target = tmp_path / "copy.gguf"
    copy_tensors(path, target, carry_metadata=True)
    assert target.read_bytes() == path.read_bytes()
