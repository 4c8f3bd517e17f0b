"""ggml's own C (the library inside llama-cpp-python), called through ctypes without importing the package."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

IDS = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q8_1": 9,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "Q8_K": 15,
    "IQ2_XXS": 16,
    "IQ2_XS": 17,
    "IQ3_XXS": 18,
    "IQ1_S": 19,
    "IQ4_NL": 20,
    "IQ3_S": 21,
    "IQ2_S": 22,
    "IQ4_XS": 23,
    "IQ1_M": 29,
    "BF16": 30,
    "TQ1_0": 34,
    "TQ2_0": 35,
    "MXFP4": 39,
    "NVFP4": 40,
    "Q1_0": 41,
    "Q2_0": 42,
}
"""Ids of the tensor types, by name."""

ENCODED_SIMPLY = ("TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "MXFP4", "NVFP4")
"""Types whose encoder ignores importance."""

SEARCHED_BY_IMPORTANCE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Types whose encoder searches only when it is given importance."""

ENCODED_BY_IMPORTANCE = (*SEARCHED_BY_IMPORTANCE, "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
"""Types whose encoder searches otherwise when it is given importance."""

ENCODED_ON_GRIDS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M")
"""As those, and slow to begin with: ggml needs seconds to prepare each of them."""

NEED_IMPORTANCE = ("IQ2_XXS", "IQ2_XS", "IQ1_S")
"""Types that are not encoded without importance."""

_HALF, _SINGLE = (np.dtype("<f2"), np.dtype("<f4"))
_LAYOUTS: dict[str, tuple[int, int, tuple[tuple[int, np.dtype[Any]], ...]]] = {
    "Q4_0": (32, 18, ((0, _HALF),)),
    "Q4_1": (32, 20, ((0, _HALF), (2, _HALF))),
    "Q5_0": (32, 22, ((0, _HALF),)),
    "Q5_1": (32, 24, ((0, _HALF), (2, _HALF))),
    "Q8_0": (32, 34, ((0, _HALF),)),
    "Q2_K": (256, 84, ((80, _HALF), (82, _HALF))),
    "Q3_K": (256, 110, ((108, _HALF),)),
    "Q4_K": (256, 144, ((0, _HALF), (2, _HALF))),
    "Q5_K": (256, 176, ((0, _HALF), (2, _HALF))),
    "Q6_K": (256, 210, ((208, _HALF),)),
    "IQ2_XXS": (256, 66, ((0, _HALF),)),
    "IQ2_XS": (256, 74, ((0, _HALF),)),
    "IQ2_S": (256, 82, ((0, _HALF),)),
    "IQ3_XXS": (256, 98, ((0, _HALF),)),
    "IQ3_S": (256, 110, ((0, _HALF),)),
    "IQ1_S": (256, 50, ((0, _HALF),)),
    "IQ1_M": (256, 56, ()),
    "IQ4_NL": (32, 18, ((0, _HALF),)),
    "IQ4_XS": (256, 136, ((0, _HALF),)),
    "TQ1_0": (256, 54, ((52, _HALF),)),
    "TQ2_0": (256, 66, ((64, _HALF),)),
    "Q1_0": (128, 18, ((0, _HALF),)),
    "Q2_0": (64, 18, ((0, _HALF),)),
    "MXFP4": (32, 17, ()),
    "NVFP4": (64, 36, ()),
    "Q8_1": (32, 36, ((0, _HALF),)),
    "Q8_K": (256, 292, ((0, _SINGLE),)),
}

"""Weights and bytes of a block, and where its floats are."""

BLOCK_TYPES = tuple(_LAYOUTS)
"""Types that are decoded."""


def block_of(name: str) -> tuple[int, int]:
    """Weights and bytes of a block."""
    return _LAYOUTS[name][:2]


def put_scales(name: str, blocks: NDArray[np.uint8], scales: NDArray[np.float16]) -> None:
    """Sets the floats of block k, of [blocks, block bytes], to number k of `scales` (the second one of a
    block to its half)."""
    for index, (at, dtype) in enumerate(_LAYOUTS[name][2]):
        field = (scales.astype(np.float32) / np.float32(1 + index)).astype(dtype).reshape(-1, 1).view(np.uint8)
        blocks[:, at : at + dtype.itemsize] = field
    if name == "IQ1_M":
        # One nibble of the scale on top of each of four 16-bit numbers.
        bits = scales.astype(np.float16).view(np.uint16)
        for index in range(4):
            high = blocks[:, 49 + 2 * index] & 15
            blocks[:, 49 + 2 * index] = high | ((bits >> np.uint16(4 * index)) & 15).astype(np.uint8) << 4


class InitParams(ctypes.Structure):
    """`gguf_init_params`."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


class TypeTraits(ctypes.Structure):
    """`ggml_type_traits`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block_weights", ctypes.c_int64),
        ("block_weights_interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p],
    ),
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, [ctypes.c_int]),
    "ggml_get_type_traits": (ctypes.POINTER(TypeTraits), [ctypes.c_int]),
    "ggml_validate_row_data": (ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]),
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


class Ggml:
    """The shared library; `library` holds every function of the list above."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments

    def traits(self, name: str) -> TypeTraits:
        """What ggml knows about a type."""
        traits: TypeTraits = self.library.ggml_get_type_traits(IDS[name]).contents
        return traits

    def quantize(self, name: str, rows: Any, importance: Any = None) -> NDArray[np.uint8]:
        """Encodes [rows, columns]; `importance` is one number per column. Gives [rows, row bytes]."""
        source = np.ascontiguousarray(rows, np.float32)
        count, columns = source.shape
        traits = self.traits(name)
        target = np.zeros((count, columns // traits.block_weights * traits.block_bytes), np.uint8)
        weighing = None if importance is None else np.ascontiguousarray(importance, np.float32)
        written = self.library.ggml_quantize_chunk(
            IDS[name],
            source.ctypes.data,
            target.ctypes.data,
            0,
            count,
            columns,
            None if weighing is None else weighing.ctypes.data,
        )
        assert written == target.nbytes
        return target

    def to_float(self, name: str) -> Any:
        """The decoding function: address of blocks, address of weights, number of weights."""
        address = self.traits(name).to_float
        if name == "Q8_K":
            # An activation format: the type table has no entry for it.
            address = ctypes.cast(self.library.dequantize_row_q8_K, ctypes.c_void_p).value
        assert address is not None, f"ggml does not decode {name}"
        return _TO_FLOAT(address)

    def dequantize(self, name: str, blocks: Any, weights: int | None = None) -> NDArray[np.float32]:
        """Decodes whole blocks, by default all of them, to a flat array."""
        source = np.ascontiguousarray(blocks, np.uint8).reshape(-1)
        traits = self.traits(name)
        if weights is None:
            weights = source.size // traits.block_bytes * traits.block_weights
        assert weights // traits.block_weights * traits.block_bytes <= source.size
        target = np.empty(weights, np.float32)
        self.to_float(name)(source.ctypes.data, target.ctypes.data, weights)
        return target


def open_ggml() -> Ggml:
    """The library, or a skip with a reason (a failure in CI)."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        if os.environ.get("CI"):
            pytest.fail("peer library llama_cpp is not installed")
        pytest.skip("peer library llama_cpp is not installed")
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    return Ggml(next(folder.glob("*ggml-base*")))
