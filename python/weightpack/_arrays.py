"""Arrays in and out: numpy arrays and torch tensors, seen as bytes without a copy.

torch is never imported here: a torch tensor can only come from a program that has imported it.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, FormatError

NUMPY_DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""Element types of arrays, by their name in the table of types."""
_NAMES = {dtype.name: name for name, dtype in NUMPY_DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
"""Element types that are encoded."""

ELEMENT_TYPES = frozenset(NUMPY_DTYPES)
"""Types of the table that arrays can have."""


@dataclass(frozen=True)
class Bytes:
    """An array and its memory: `data` is a flat `uint8` view of `array`."""

    array: Any
    data: NDArray[np.uint8]
    shape: tuple[int, ...]
    dtype: str | None
    """Name in the table of types (`F32`), `None` if it has no row there."""
    is_torch: bool


def view(array: Any) -> Bytes:
    """The bytes of a numpy array, of anything numpy makes one of, or of a torch tensor.

    An array that is not contiguous, or not in the machine's byte order, is copied first; `array` of
    the result is then the copy. A tensor that is not in this machine's memory is refused.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        if array.device.type != "cpu" or array.layout != torch.strided:
            raise FormatError(
                f"tensor is on {array.device} with layout {array.layout}, expected a dense tensor on cpu",
                hint="tensor.cpu() gives one",
            )
        # A lazy negation has no bytes of its own until it is carried out.
        dense = array.detach().resolve_neg().contiguous()
        flat = dense.reshape(-1)
        if flat.numel() < 2:
            # One element alone counts as contiguous, whatever its stride, but is no bytes with that.
            flat = flat.as_strided((flat.numel(),), (1,))
        data = flat.view(torch.uint8).numpy()
        return Bytes(dense, data, tuple(array.shape), _NAMES.get(str(array.dtype).removeprefix("torch.")), True)
    given = np.asarray(array)
    if not given.dtype.isnative:
        given = given.astype(given.dtype.newbyteorder("="))
    dense = given if given.flags.c_contiguous else given.copy()
    name = _NAMES.get(given.dtype.name)
    if name is None and given.dtype.hasobject:
        raise FormatError(f"array of dtype {given.dtype} holds no numbers")
    return Bytes(dense, dense.reshape(-1).view(np.uint8), given.shape, name, False)


def view_floats(array: Any) -> Bytes:
    """As `view`, for weights: float64, float32, float16 or bfloat16."""
    seen = view(array)
    if seen.dtype not in FLOATS:
        raise FormatError(
            f"array of dtype {seen.array.dtype}: expected float32, float16, bfloat16 or float64",
        )
    return seen


def view_output(array: Any) -> Bytes:
    """As `view_floats`, for an array that is written to, so that no copy will do."""
    view_floats(array)
    return view_memory(array)


def view_memory(array: Any) -> Bytes:
    """As `view`, for an array of any type that is written to, so that no copy will do."""
    seen = view(array)
    if seen.is_torch:
        in_place = array.is_contiguous() and not array.is_neg()
    else:
        in_place = isinstance(array, np.ndarray) and array.flags.c_contiguous and array.dtype.isnative
    if not in_place:
        raise FormatError("out is not a contiguous array or tensor")
    if not seen.data.flags.writeable:
        raise FormatError("out is read-only")
    return seen


def view_strided(array: Any) -> Bytes:
    """As `view`, but rows may stand apart: `data` is a uint8 view [..., bytes of a row], and only an
    array whose rows are not in one piece themselves is copied."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        if array.device.type != "cpu" or array.layout != torch.strided or not array.dim():
            return _of_rows(view(array))
        dense = array.detach().resolve_neg()
        if array.shape[-1] > 1 and dense.stride(-1) != 1:
            dense = dense.contiguous()
        data = dense.view(torch.uint8).numpy()
        return Bytes(dense, data, tuple(array.shape), _NAMES.get(str(array.dtype).removeprefix("torch.")), True)
    given = np.asarray(array)
    whole = given.ndim and given.dtype.isnative and not given.dtype.hasobject
    if not whole or (given.shape[-1] > 1 and given.strides[-1] != given.itemsize):
        return _of_rows(view(array))
    return Bytes(given, given.view(np.uint8), given.shape, _NAMES.get(given.dtype.name), False)


def _of_rows(seen: Bytes) -> Bytes:
    """A contiguous array, its bytes as rows."""
    leading = seen.shape[:-1]
    length = seen.data.size // max(1, int(np.prod(leading, dtype=np.int64)))
    return Bytes(seen.array, seen.data.reshape(*leading, length), seen.shape, seen.dtype, seen.is_torch)


def view_strided_output(array: Any) -> Bytes:
    """As `view_strided`, for an array of floats that is written to, so that no copy will do."""
    seen = view_strided(array)
    if seen.dtype not in FLOATS:
        raise FormatError(f"out has dtype {seen.array.dtype}, expected float32, float16, bfloat16 or float64")
    if seen.is_torch:
        in_place = seen.array.data_ptr() == array.data_ptr() and not array.is_neg()
    else:
        in_place = isinstance(array, np.ndarray) and array.dtype.isnative and np.may_share_memory(array, seen.data)
        in_place = in_place or (isinstance(array, np.ndarray) and array.size == 0)
    if not in_place:
        raise FormatError("out is not an array or tensor whose rows are in one piece")
    if not seen.data.flags.writeable:
        raise FormatError("out is read-only")
    return seen


def empty(shape: Sequence[int], dtype: str, *, torch: bool) -> Bytes:
    """A new array of unknown content; a GGUF block type is not an element type and is refused.

    Raises `FormatError` for a shape that arrays cannot have, `MemoryError` for one that does not fit.
    """
    numpy_dtype = NUMPY_DTYPES[dtype]
    check_shape(shape)
    if torch:
        library = sys.modules["torch"]
        tensor = library.empty(tuple(shape), dtype=getattr(library, numpy_dtype.name))
        return view(tensor)
    return view(np.empty(tuple(shape), numpy_dtype))


def check_shape(shape: Sequence[int]) -> None:
    """Raises `FormatError` for a shape that arrays cannot have, even if it holds no weight."""
    if math.prod(max(1, int(size)) for size in shape) > _MOST_WEIGHTS:
        raise FormatError(f"an array cannot have shape {list(shape)}")


_MOST_WEIGHTS = (1 << 60) - 1
"""numpy counts the bytes of the sizes that are not zero in 63 bits; an element has up to 8."""


def as_torch(array: NDArray[Any]) -> Any:
    """A tensor on the memory of `array`, for a caller that gave a tensor."""
    return sys.modules["torch"].from_numpy(array)


def name_of(array: Any) -> str | None:
    """Name in the table of types of an array's elements, `None` if they have no row there."""
    return _NAMES.get(str(array.dtype).removeprefix("torch."))


def dtype_name(dtype: Any) -> str:
    """`F32` for `"float32"`, `numpy.float32` and `torch.float32`, and so on."""
    text = str(dtype).removeprefix("torch.")
    if text not in _NAMES:
        with contextlib.suppress(TypeError):
            text = np.dtype(dtype).name
    name = _NAMES.get(text)
    if name not in FLOATS:
        raise ConfigError(f"dtype {dtype} is not float32, float16, bfloat16 or float64")
    return str(name)
