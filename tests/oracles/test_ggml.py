"""Against ggml's own C (the library inside llama-cpp-python 0.3.36): encoded bytes, and its reader on
files that were converted. Building that package takes many minutes, so these tests carry the marker
`llama` and run in `.ci/run full` only.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightpack as wp

from ..engine.conftest import layers, normal, write_safetensors
from .test_gguf import KINDS, TYPES, weights

pytestmark = pytest.mark.llama

IDS = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "F32": 0, "F16": 1, "BF16": 30}


class InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


@pytest.fixture(scope="module")
def ggml() -> Any:
    """The shared library, found without importing the package."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        if os.environ.get("CI"):
            pytest.fail("peer library llama_cpp is not installed")
        pytest.skip("peer library llama_cpp is not installed")
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    library = ctypes.CDLL(str(next(folder.glob("*ggml-base*"))))
    signatures = {
        "ggml_quantize_chunk": (
            ctypes.c_size_t,
            [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p],
        ),
        "gguf_init_from_file": (ctypes.c_void_p, [ctypes.c_char_p, InitParams]),
        "gguf_free": (None, [ctypes.c_void_p]),
        "gguf_get_n_tensors": (ctypes.c_int64, [ctypes.c_void_p]),
        "gguf_get_data_offset": (ctypes.c_size_t, [ctypes.c_void_p]),
        "gguf_get_tensor_name": (ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_int64]),
        "gguf_get_tensor_type": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_int64]),
        "gguf_get_tensor_offset": (ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_int64]),
        "gguf_get_tensor_size": (ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_int64]),
        "gguf_find_key": (ctypes.c_int64, [ctypes.c_void_p, ctypes.c_char_p]),
        "gguf_get_val_str": (ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_int64]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def quantize(ggml: Any, array: np.ndarray, name: str) -> np.ndarray:
    rows, columns = array.shape
    source = np.ascontiguousarray(array, np.float32)
    target = np.empty(rows * columns * 2, np.uint8)
    written = ggml.ggml_quantize_chunk(IDS[name], source.ctypes.data, target.ctypes.data, 0, rows, columns, None)
    return target[:written]


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [32, 96, 2752, 4288])
def test_bytes(ggml: Any, kind: str, name: str, columns: int) -> None:
    array = weights(kind, 37, columns, seed=columns)
    mine = np.asarray(wp.quantize(array, f"gguf:{name.lower()}")[""]).reshape(-1)
    theirs = quantize(ggml, array, name)
    if kind == "tiny":
        # 1/d is infinite for scales this small, and ggml then casts it to an integer: undefined.
        scale = np.abs(array.reshape(-1, 32)).max(axis=1)
        keep = np.repeat(scale > 1e-35, len(theirs) // len(scale))
        mine, theirs = mine[keep], theirs[keep]
    assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("to", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "bf16", "f32"])
def test_its_reader_takes_converted_files(ggml: Any, make: Callable[[], Path], tmp_path: Path, to: str) -> None:
    source, target = make(), tmp_path / "out.gguf"
    wp.convert(source, target, to=to, layers="names")
    context = ggml.gguf_init_from_file(str(target).encode(), InitParams(True, None))
    assert context
    try:
        data = target.read_bytes()
        start = ggml.gguf_get_data_offset(context)
        architecture = ggml.gguf_find_key(context, b"general.architecture")
        assert ggml.gguf_get_val_str(context, architecture) == b"unknown"
        tensors = layers(2)
        count = ggml.gguf_get_n_tensors(context)
        assert count == len(tensors)
        for index in range(count):
            name = ggml.gguf_get_tensor_name(context, index).decode()
            first = start + ggml.gguf_get_tensor_offset(context, index)
            stored = np.frombuffer(data, np.uint8, ggml.gguf_get_tensor_size(context, index), first)
            if name.endswith("up_proj.weight"):
                assert ggml.gguf_get_tensor_type(context, index) == IDS[to.upper()]
                if to.upper() in TYPES:
                    assert np.array_equal(stored, quantize(ggml, tensors[name].astype(np.float32), to.upper()))
    finally:
        ggml.gguf_free(context)


@pytest.fixture
def make(tmp_path: Path) -> Callable[[], Path]:
    return lambda: write_safetensors(tmp_path / "model.safetensors", layers(2))


def test_rows_of_one_block_to_many(ggml: Any) -> None:
    array = normal((5, 4096), dtype=np.float32)
    for name in TYPES:
        mine = np.asarray(wp.quantize(array, f"gguf:{name.lower()}", threads=3)[""]).reshape(-1)
        assert np.array_equal(mine, quantize(ggml, array, name))
