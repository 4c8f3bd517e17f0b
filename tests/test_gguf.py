"""The namespace `weightpack.gguf`: block types on arrays, files read and written."""

from __future__ import annotations

import doctest
import mmap
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import weightpack as wp
from weightpack import gguf
from weightpack.errors import CheckpointError, ConfigError, FormatError, UnsupportedError

READ = [row for row in gguf.types() if row.read]
BLOCKS = [row for row in READ if row.block_weights > 1]
WRITTEN = [row for row in BLOCKS if row.write]


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def importance_for(row: gguf.TypeInfo, columns: int) -> np.ndarray | None:
    if row.encodes == "always":
        return None
    return np.random.default_rng(1).random(columns).astype(np.float32)


def packed(row: gguf.TypeInfo, *shape: int) -> np.ndarray:
    """Rows of a type: encoded where that can be done, otherwise blocks of small bytes."""
    if row.write:
        return np.asarray(gguf.quantize(weights(*shape), row.name, importance_for(row, shape[-1])))
    stored = (*shape[:-1], row.row_bytes(shape[-1]))
    return np.random.default_rng(2).integers(0, 48, stored, dtype=np.uint8)


@pytest.mark.parametrize("row", WRITTEN, ids=lambda row: row.name)
def test_blocks_are_those_of_the_format(row):
    array = weights(3, 2, 256)
    importance = importance_for(row, 256)
    whole = wp.quantize(array, row.format, importance=importance)[""]
    for name in (row.name, row.name.lower()):
        np.testing.assert_array_equal(gguf.quantize(array, name, importance), whole)
    tensor = gguf.quantize(torch.from_numpy(array), row.name, importance)
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), whole)
    np.testing.assert_array_equal(gguf.dequantize(whole, row.name), wp.dequantize(whole, row.format))


@pytest.mark.parametrize("row", READ, ids=lambda row: row.name)
def test_rows_and_strided_outputs_are_those_of_the_whole(row):
    if row.block_weights == 1:
        data = weights(6, 5, 256).astype(np.float64 if row.name == "F64" else np.float32)
        kinds = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}
        data = data.astype(kinds.get(row.name, data.dtype)).view(np.uint8)
    else:
        data = packed(row, 6, 5, 256)
    whole = gguf.dequantize(data, row.name)
    assert whole.shape == (6, 5, 256)
    assert whole.dtype == np.float32
    lines = whole.reshape(30, 256)
    for rows in (slice(4, 17), range(4, 17), slice(None, None, 3), range(20, 3, -4), slice(-2, None), slice(7, 7)):
        picked = lines[rows] if isinstance(rows, slice) else lines[list(rows)]
        np.testing.assert_array_equal(gguf.dequantize(data, row.name, rows=rows), picked)

    apart = np.full((6, 7, 300), np.nan, np.float32)
    place = apart[:, 1:6, 20:276]
    assert gguf.dequantize(data, row.name, out=place) is place
    np.testing.assert_array_equal(place, whole)
    assert np.isnan(apart).sum() == apart.size - place.size

    # Rows of blocks that stand apart.
    wide = np.zeros((6, 5, data.shape[-1] + 7), np.uint8)
    wide[..., 3:-4] = data
    np.testing.assert_array_equal(gguf.dequantize(wide[..., 3:-4], row.name), whole)
    np.testing.assert_array_equal(gguf.dequantize(data[::-2], row.name), whole[::-2])
    for dtype in ("float16", "bfloat16"):
        half = gguf.dequantize(data, row.name, dtype=dtype)
        tensor = torch.zeros(6, 7, 300, dtype=getattr(torch, dtype))
        gguf.dequantize(torch.from_numpy(data), row.name, out=tensor[:, :5, :256])
        np.testing.assert_array_equal(tensor[:, :5, :256].float().numpy(), half.astype(np.float32))
        assert not tensor[:, 5:].any()


def test_shapes_and_buffers(tmp_path):
    data = packed(BLOCKS[0], 4, 3, 64)
    whole = gguf.dequantize(data, BLOCKS[0].name)
    (tmp_path / "blocks").write_bytes(data.tobytes())
    with (tmp_path / "blocks").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for given in (data.tobytes(), bytearray(data.tobytes()), memoryview(data.tobytes()), mapped):
            np.testing.assert_array_equal(gguf.dequantize(given, BLOCKS[0].name, shape=(4, 3, 64)), whole)
    np.testing.assert_array_equal(gguf.dequantize(data, BLOCKS[0].name, shape=(12, 64)), whole.reshape(12, 64))
    assert gguf.dequantize(data[0, 0], BLOCKS[0].name).shape == (64,)
    assert gguf.dequantize(data[:0], BLOCKS[0].name).shape == (0, 3, 64)


def test_large_inputs_are_not_copied(tmp_path):
    rows, columns = 4096, 4096
    path = tmp_path / "blocks"
    np.zeros((rows, columns // 32 * 34), np.uint8).tofile(path)
    mapped = np.memmap(path, np.uint8, "r", shape=(rows, columns // 32 * 34))
    out = np.empty((rows, columns + 8), np.float16)
    tracemalloc.start()
    gguf.dequantize(mapped, "Q8_0", out=out[:, :columns])
    gguf.dequantize(mapped, "Q8_0", rows=slice(100, 104))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000, peak


def test_refusals_of_arrays():
    with pytest.raises(ConfigError, match=r'unknown GGUF type "Q4_Z".*\n.*did you mean Q4_'):
        gguf.quantize(weights(2, 32), "Q4_Z")
    with pytest.raises(FormatError, match="q8_0: row of 33 weights is not a multiple of block_size 32"):
        gguf.quantize(weights(2, 33), "Q8_0")
    with pytest.raises(UnsupportedError, match="I8 is not encoded"):
        gguf.quantize(weights(2, 32), "I8")
    with pytest.raises(FormatError, match="a single number has no row"):
        gguf.quantize(np.float32(1), "Q8_0")
    with pytest.raises(FormatError, match="cannot be quantized"):
        gguf.quantize(np.full((1, 32), np.inf, np.float32), "Q8_0")
    with pytest.raises(UnsupportedError, match="I32 is not decoded"):
        gguf.dequantize(np.zeros(4, np.uint8), "I32")
    data = gguf.quantize(weights(2, 64), "Q8_0")
    with pytest.raises(FormatError, match="67 bytes are not rows of whole blocks of 34 bytes"):
        gguf.dequantize(data[:, :67], "Q8_0")
    with pytest.raises(FormatError, match=r"136 bytes, but shape \[3, 64\] in Q8_0 needs 204"):
        gguf.dequantize(data, "Q8_0", shape=(3, 64))
    with pytest.raises(FormatError, match="data is float32, expected uint8"):
        gguf.dequantize(weights(2, 34), "Q8_0")
    with pytest.raises(FormatError, match=r"out has shape \[2, 32\], expected \[2, 64\]"):
        gguf.dequantize(data, "Q8_0", out=np.empty((2, 32), np.float32))
    with pytest.raises(FormatError, match="rows are in one piece"):
        gguf.dequantize(data, "Q8_0", out=np.empty((2, 128), np.float32)[:, ::2])
    with pytest.raises(ConfigError, match="out is float16, and dtype says float32"):
        gguf.dequantize(data, "Q8_0", out=np.empty((2, 64), np.float16), dtype="float32")
    frozen = np.empty((2, 64), np.float32)
    frozen.setflags(write=False)
    with pytest.raises(FormatError, match="read-only"):
        gguf.dequantize(data, "Q8_0", out=frozen)
    with pytest.raises(ConfigError, match="takes no importance"):
        wp.quantize(weights(2, 64), "nf4", importance=np.ones(64))
    with pytest.raises(FormatError, match="importance of 63 numbers, expected 64"):
        wp.quantize(weights(2, 64), "gguf:q4_0", importance=np.ones(63))


METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.scale": 0.5,
    "llama.flag": True,
    "llama.negative": -3,
    "llama.large": 1 << 40,
    "llama.types": gguf.Typed("[i16]", [1, 2]),
    "llama.none": gguf.Typed("[str]", []),
    "llama.id": gguf.Typed("u8", 7),
    "llama.numbers": [1, -2, 3],
    "llama.floats": [1, 0.5],
    "tokenizer.ggml.tokens": ["a", "é", ""],
    "tokenizer.ggml.scores": np.arange(3, dtype=np.float32),
    "llama.count": np.int64(5),
}
TYPES = ["str", "u32", "f32", "bool", "i32", "u64", "[i16]", "[str]", "u8", "[i32]", "[f32]", "[str]", "[f32]", "i64"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {
        "a": weights(3, 4, 256),
        "norm": weights(256),
        "packed": (packed(BLOCKS[0], 4, 256), BLOCKS[0].name),
        "half": torch.from_numpy(weights(4, 64)).to(torch.bfloat16),
        "ids": np.arange(6, dtype=np.int32).reshape(2, 3),
    }
    found = tmp_path / "model.gguf"
    gguf.write(found, tensors, METADATA, types={"a": "q8_0"})
    return found


def test_what_is_written_is_read(path):
    with gguf.open(path) as file:
        assert file.architecture == "llama"
        assert [file.metadata.type(key) for key in METADATA] == TYPES
        assert list(file.metadata) == list(METADATA)
        for key, value in METADATA.items():
            found, expected = file.metadata[key], value.value if isinstance(value, gguf.Typed) else value
            if isinstance(found, np.ndarray):
                np.testing.assert_array_equal(found, expected)
            else:
                assert found == expected
                assert type(found) is (int if isinstance(expected, np.integer) else type(expected))
        assert file.metadata["tokenizer.ggml.scores"].dtype == np.float32
        assert (file.metadata.count("tokenizer.ggml.tokens"), file.metadata.count("llama.id")) == (3, None)
        assert "absent" not in file.metadata
        assert file.metadata.get("absent") is None
        assert {name: (tensor.type, tensor.shape) for name, tensor in file.tensors.items()} == {
            "a": ("Q8_0", (3, 4, 256)),
            "norm": ("F32", (256,)),
            "packed": (BLOCKS[0].name, (4, 256)),
            "half": ("BF16", (4, 64)),
            "ids": ("I32", (2, 3)),
        }
        np.testing.assert_array_equal(file.raw("a"), gguf.quantize(weights(3, 4, 256), "Q8_0"))
        np.testing.assert_array_equal(file.raw("packed"), packed(BLOCKS[0], 4, 256))
        np.testing.assert_array_equal(file.read("norm"), weights(256))
        np.testing.assert_array_equal(file.read("ids"), np.arange(6).reshape(2, 3))
        assert file.read("ids").dtype == np.int32
        assert file.verify() == []


def test_the_peer_reads_what_is_written(path):
    peer = pytest.importorskip("gguf")
    reader = peer.GGUFReader(path)
    found = {field: reader.fields[field].contents() for field in METADATA if field != "llama.none"}
    assert found["general.architecture"] == "llama"
    assert found["tokenizer.ggml.tokens"] == ["a", "é", ""]
    assert found["llama.large"] == 1 << 40
    with gguf.open(path) as file:
        for tensor in reader.tensors:
            assert tensor.tensor_type.name == file.tensors[tensor.name].type
            assert np.array_equal(tensor.data.view(np.uint8).reshape(-1), file.raw(tensor.name).reshape(-1))


def test_parts_of_tensors_are_read(path):
    with gguf.open(path) as file:
        for name in ("a", "half", "norm", "ids"):
            whole = file.read(name)
            lines = whole.reshape(-1, whole.shape[-1])
            for rows in (slice(1, 3), range(0, 1), slice(-1, None), slice(5, 5)):
                np.testing.assert_array_equal(file.read(name, rows=rows), lines[rows.start : rows.stop])
        whole = file.read("a")
        apart = np.full((3, 6, 300), np.nan, np.float32)
        assert np.array_equal(file.read("a", out=apart[:, 1:5, 4:260]), whole)
        assert np.isnan(apart).sum() == apart.size - whole.size
        tensor = torch.zeros(12, 300, dtype=torch.bfloat16)
        file.read("a", rows=slice(2, 9), out=tensor[2:9, :256])
        expected = torch.from_numpy(whole.reshape(12, 256)).bfloat16()
        assert torch.equal(tensor[2:9, :256], expected[2:9])
        assert not tensor[:2].any()
        ids = np.zeros((2, 5), np.int32)
        file.read("ids", out=ids[:, :3])
        np.testing.assert_array_equal(ids[:, :3], file.read("ids"))
        with pytest.raises(UnsupportedError, match="I32 values are not turned into float32"):
            file.read("ids", dtype="float32")
        with pytest.raises(ConfigError, match=r"out has shape \[3, 4, 255\], expected \[3, 4, 256\]"):
            file.read("a", out=np.empty((3, 4, 255), np.float32))
        with pytest.raises(ConfigError, match="expected a step of 1"):
            file.read("a", rows=slice(None, None, 2))
        with pytest.raises(KeyError):
            file.read("absent")


def test_raw_lies_on_the_file(path):
    file = gguf.open(path)
    raw = file.raw("a")
    assert not raw.flags.writeable
    assert not raw.flags.owndata
    file.close()
    assert raw.sum() > 0
    for call in (lambda: file.raw("a"), lambda: file.read("a"), file.verify):
        with pytest.raises(CheckpointError, match="is closed"):
            call()
    again = gguf.open(path)
    os.truncate(path, path.stat().st_size + 1)
    with pytest.raises(CheckpointError, match="changed while it was open"):
        again.raw("a")


def test_bad_scales_are_found(tmp_path):
    data = gguf.quantize(weights(8, 64), "Q8_0")
    data[5, 34:36] = (0, 0x7C)
    plain = weights(3, 5)
    plain[1, 2] = np.nan
    path = tmp_path / "bad.gguf"
    gguf.write(path, {"good": weights(2, 2), "q": (data, "Q8_0"), "f": plain})
    with gguf.open(path) as file:
        assert file.verify() == [gguf.GGUFProblem("q", 11, "infinite"), gguf.GGUFProblem("f", 7, "NaN")]


def test_a_split_model_is_one_file():
    folder = Path(__file__).parent / "vectors" / "containers"
    parts = sorted(folder.glob("*-00001-of-*.gguf"))
    assert parts
    for part in parts:
        with gguf.open(part) as file:
            assert len(file.files) > 1
            assert {tensor.path for tensor in file.tensors.values()} == set(file.files)
            for name in file.tensors:
                assert file.raw(name).nbytes == file.tensors[name].nbytes


def test_metadata_is_carried_over(path, tmp_path):
    target = tmp_path / "again.gguf"
    with gguf.open(path) as file:
        gguf.write(target, {"w": weights(2, 32)}, {"llama.block_count": 9, "new": "x"}, metadata_from=file)
    with gguf.open(target) as again:
        assert [again.metadata.type(key) for key in METADATA if key != "llama.block_count"] == [
            kind for key, kind in zip(METADATA, TYPES, strict=True) if key != "llama.block_count"
        ]
        assert (again.metadata["llama.block_count"], again.metadata["new"]) == (9, "x")


def test_refusals_of_the_writer(path, tmp_path):
    array = weights(2, 32)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="the destination exists"):
        gguf.write(path, {"w": array})
    target = tmp_path / "t.gguf"
    for error, text, tensors, more in [
        (FormatError, "row of 33 weights", {"w": weights(2, 33)}, {"types": "Q8_0"}),
        (UnsupportedError, "cannot hold uint16", {"w": np.zeros(2, np.uint16)}, {}),
        (UnsupportedError, "cannot hold U8", {"w": np.zeros(2, np.uint8)}, {}),
        (FormatError, "got list", {"w": [1.0]}, {}),
        (FormatError, "packed rows are float32", {"w": (array, "Q8_0")}, {}),
        (FormatError, "33 bytes are not rows of whole blocks", {"w": (np.zeros(33, np.uint8), "Q8_0")}, {}),
        (ConfigError, 'no tensor "v" is written', {"w": array}, {"types": {"v": "Q8_0"}}),
        (UnsupportedError, "5 dimensions, but at most 4", {"w": weights(1, 1, 1, 1, 2)}, {}),
        (ConfigError, 'metadata "x": object has no type', {"w": array}, {"metadata": {"x": object()}}),
        (ConfigError, "an empty list has no type", {"w": array}, {"metadata": {"x": []}}),
        (ConfigError, "does not fit in 64 bits", {"w": array}, {"metadata": {"x": 1 << 64}}),
        (FormatError, "cannot be quantized", {"v": array, "w": array * np.inf}, {"types": "Q8_0"}),
        (ConfigError, "expected u8", {"w": array}, {"metadata": {"x": gguf.Typed("u8", 300)}}),
    ]:
        with pytest.raises(error, match=text):
            gguf.write(target, tensors, **more)
        assert os.listdir(tmp_path) == ["model.gguf"], text
    gguf.write(path, {"w": array}, overwrite=True)
    assert path.read_bytes() != before
    gguf.write(target, {"w": weights(1, 1, 1, 1, 2)}, max_dimensions=5)
    assert gguf.open(target).tensors["w"].shape == (1, 1, 1, 1, 2)
    assert sorted(os.listdir(tmp_path)) == ["model.gguf", "t.gguf"]


def test_careless_files_open_on_request(path, tmp_path):
    data = path.read_bytes()
    careless = tmp_path / "careless.gguf"
    # A key without letters: its length and its bytes are taken out, and filled up behind the header.
    key = (len(b"llama.id")).to_bytes(8, "little") + b"llama.id"
    end = gguf.open(path).tensors["a"].offset
    changed = data[:end].rstrip(b"\0").replace(key, bytes(8))
    careless.write_bytes(changed.ljust(end, b"\0") + data[end:])
    with pytest.raises(CheckpointError, match="metadata key is empty"):
        gguf.open(careless)
    with gguf.open(careless, lenient=True) as file:
        assert file.metadata[""] == 7
        assert file.warnings == ("a metadata key is empty",)
        np.testing.assert_array_equal(file.read("norm"), weights(256))


def test_a_large_vocabulary_opens_in_no_time(tmp_path):
    tokens = [f"token number {index}" for index in range(150_000)]
    path = tmp_path / "vocabulary.gguf"
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": np.zeros(150_000, np.float32)}
    gguf.write(path, {"w": weights(2, 32)}, metadata)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        with gguf.open(path) as file:
            assert list(file.metadata) == list(metadata)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05, times
    with gguf.open(path) as file:
        assert file.metadata["tokenizer.ggml.tokens"] == tokens


def test_the_namespace_is_loaded_when_used():
    code = (
        "import sys, weightpack as wp\n"
        "assert 'numpy' not in sys.modules and 'weightpack.gguf' not in sys.modules\n"
        "assert wp.gguf.types()[0].name == 'F32'\n"
        "assert 'torch' not in sys.modules and 'gguf' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["blocks", "reading", "writing"])
def test_examples_run(name):
    module = sys.modules[f"weightpack.gguf.{name}"]
    done = doctest.testmod(module)
    assert done.attempted
    assert not done.failed
