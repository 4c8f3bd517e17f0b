"""Against ggml's own C (the library inside llama-cpp-python 0.3.36): encoded bytes, and its reader on
files that were converted. Building that package takes many minutes, so these tests carry the marker
`llama` and run in `.ci/run full` only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import weightpack as wp

from ..engine.conftest import layers, normal, write_safetensors
from .ggml import IDS, Ggml, InitParams
from .test_gguf import KINDS, TYPES, weights

pytestmark = pytest.mark.llama


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [32, 96, 2752, 4288])
def test_bytes(ggml: Ggml, kind: str, name: str, columns: int) -> None:
    array = weights(kind, 37, columns, seed=columns)
    mine = np.asarray(wp.quantize(array, f"gguf:{name.lower()}")[""]).reshape(-1)
    theirs = ggml.quantize(name, array).reshape(-1)
    if kind == "tiny":
        # 1/d is infinite for scales this small, and ggml then casts it to an integer: undefined.
        scale = np.abs(array.reshape(-1, 32)).max(axis=1)
        keep = np.repeat(scale > 1e-35, len(theirs) // len(scale))
        mine, theirs = mine[keep], theirs[keep]
    assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("to", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "bf16", "f32"])
def test_its_reader_takes_converted_files(ggml: Ggml, make: Callable[[], Path], tmp_path: Path, to: str) -> None:
    source, target = make(), tmp_path / "out.gguf"
    wp.convert(source, target, to=to, layers="names")
    library = ggml.library
    context = library.gguf_init_from_file(str(target).encode(), InitParams(True, None))
    assert context
    try:
        data = target.read_bytes()
        start = library.gguf_get_data_offset(context)
        architecture = library.gguf_find_key(context, b"general.architecture")
        assert library.gguf_get_val_str(context, architecture) == b"unknown"
        tensors = layers(2)
        count = library.gguf_get_n_tensors(context)
        assert count == len(tensors)
        for index in range(count):
            name = library.gguf_get_tensor_name(context, index).decode()
            first = start + library.gguf_get_tensor_offset(context, index)
            stored = np.frombuffer(data, np.uint8, library.gguf_get_tensor_size(context, index), first)
            if name.endswith("up_proj.weight"):
                assert library.gguf_get_tensor_type(context, index) == IDS[to.upper()]
                if to.upper() in TYPES:
                    assert np.array_equal(stored, ggml.quantize(to.upper(), tensors[name]).reshape(-1))
    finally:
        library.gguf_free(context)


@pytest.fixture
def make(tmp_path: Path) -> Callable[[], Path]:
    return lambda: write_safetensors(tmp_path / "model.safetensors", layers(2))


def test_rows_of_one_block_to_many(ggml: Ggml) -> None:
    array = normal((5, 4096), dtype=np.float32)
    for name in TYPES:
        mine = np.asarray(wp.quantize(array, f"gguf:{name.lower()}", threads=3)[""]).reshape(-1)
        assert np.array_equal(mine, ggml.quantize(name, array).reshape(-1))


@pytest.mark.parametrize("row", wp.gguf.types(), ids=lambda row: row.name)
def test_its_verdict_on_blocks(ggml: Ggml, tmp_path: Path, row: wp.gguf.TypeInfo) -> None:
    if row.name in ("Q8_1", "Q8_K"):
        pytest.skip("types of activations, which no file holds")
    rng = np.random.default_rng(row.id)
    blocks = rng.integers(0, 256, (400, row.block_bytes), dtype=np.uint8)
    # Exponents of all ones are rare by chance.
    blocks[::3] |= rng.choice(np.array([0, 0x7C, 0xFF], np.uint8), blocks[::3].shape)
    path = tmp_path / "blocks.gguf"
    wp.gguf.write(path, {str(index): (block, row.name) for index, block in enumerate(blocks)})
    with wp.gguf.open(path) as file:
        found = {int(problem.tensor) for problem in file.verify()}
    validate = ggml.library.ggml_validate_row_data
    theirs = {i for i, block in enumerate(blocks) if not validate(row.id, block.ctypes.data, row.block_bytes)}
    assert found == theirs
    assert bool(found) != (row.name in ("I8", "I16", "I32", "I64", "NVFP4"))
