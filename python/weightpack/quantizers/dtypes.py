"""Element types by name, so that configs need no torch: `"bfloat16"` for `torch.bfloat16`."""

from __future__ import annotations

from typing import Any

from .._lazy import require
from ..errors import ConfigError

STORED = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "bool": "BOOL",
    "complex64": "C64",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
"""torch's name of each element type, and its name in files."""
_TORCH = {stored: name for name, stored in STORED.items()}
_SHORT = {"fp32": "float32", "f32": "float32", "fp16": "float16", "f16": "float16", "half": "float16"}
_SHORT |= {"bf16": "bfloat16", "float": "float32", "fp64": "float64", "f64": "float64", "double": "float64"}


def dtype_name(dtype: Any, what: str = "dtype") -> str:
    """`"bfloat16"` for `torch.bfloat16`, `"torch.bfloat16"`, `"bfloat16"` and `"bf16"`.

    `what` is the field that the error names. Raises `ConfigError` for what is no element type.
    """
    text = str(dtype).removeprefix("torch.")
    name = _SHORT.get(text, text)
    if name not in STORED:
        raise ConfigError(f"{what} {dtype!r} is not an element type, expected one like float32 or bfloat16")
    return name


def torch_dtype(dtype: Any, what: str = "dtype") -> Any:
    """The `torch.dtype` of a name, or of a dtype itself."""
    torch = require("torch", "load models")
    return getattr(torch, dtype_name(dtype, what))


def of_stored(stored: str) -> Any:
    """The `torch.dtype` of a type's name in files (`BF16`); `ConfigError` where torch has none."""
    if stored not in _TORCH:
        raise ConfigError(f"torch has no element type {stored}")
    return torch_dtype(_TORCH[stored])


def stored_name(dtype: Any) -> str:
    """The name in files of a dtype: `BF16` for `torch.bfloat16`."""
    return STORED[dtype_name(dtype)]
