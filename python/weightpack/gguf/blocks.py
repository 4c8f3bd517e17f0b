"""Block types on single arrays: `quantize`, `dequantize`, and the table `types`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _arrays, _rust
from ..errors import ConfigError, FormatError, UnsupportedError


@dataclass(frozen=True, slots=True)
class TypeInfo:
    """One row of the table of tensor types."""

    id: int
    """Number in a file."""
    name: str
    """Name that tools print: `Q4_K`."""
    block_weights: int
    """Weights of a block; 1 for plain numbers."""
    block_bytes: int
    """Bytes of a block."""
    format: str | None
    """Name of the format that decodes it; `None` for integers and for types that are only listed."""
    encodes: str
    """When it can be written from weights: `always`, `with importance` (a vector is needed) or `never`."""

    @property
    def bits_per_weight(self) -> float:
        """Data and scales."""
        return 8 * self.block_bytes / self.block_weights

    @property
    def read(self) -> bool:
        """Whether it is decoded."""
        return self.format is not None

    @property
    def write(self) -> bool:
        """Whether it can be encoded, if need be with an importance vector."""
        return self.encodes != "never"

    def row_bytes(self, weights: int) -> int:
        """Bytes of a row of so many weights. Raises `FormatError` unless they are whole blocks."""
        if weights % self.block_weights:
            raise FormatError(
                f"{self.name.lower()}: row of {weights} weights is not a multiple of block_size {self.block_weights}"
            )
        return weights // self.block_weights * self.block_bytes


def types() -> list[TypeInfo]:
    """Every tensor type that a GGUF file can hold, by number.

    >>> import weightpack as wp
    >>> {row.name: (row.block_weights, row.block_bytes) for row in wp.gguf.types()}["Q8_0"]
    (32, 34)
    """
    return list(_table().values())


@cache
def _table() -> dict[str, TypeInfo]:
    rows = sorted(json.loads(_rust.types()), key=lambda row: row["id"])
    return {row["name"]: TypeInfo(**row) for row in rows}


def find_type(name: str) -> TypeInfo:
    """The row of the type called `name`, in any case. Raises `ConfigError` for a name without one."""
    found = _table().get(str(name).upper().removeprefix("GGUF:"))
    if found is None:
        close = get_close_matches(str(name).upper(), list(_table()), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known types: {', '.join(_table())}"
        raise ConfigError(f'unknown GGUF type "{name}"', hint=hint)
    return found


def quantize(array: Any, type: str, importance: Any = None, *, threads: int | None = None) -> Any:
    """Encodes an array in the blocks of one type; lossy for every type but `F32`.

    `array` holds float32, float16, bfloat16 or float64 weights of shape [..., n], n a multiple of the
    type's block; finite, unless the type is a plain float. An array whose weights do not follow each
    other in memory is copied first. `type` is a name out of `types()`, in any case. `importance` says
    how much each column counts: float32 [n], or [m, n] for the m matrices of a stack [..., rows, n];
    types that have no use for it ignore it, some cannot be written without.

    Gives uint8 of shape [..., bytes of a row], byte-equal to what ggml writes on x86.

    Raises `FormatError` for an array or an importance that the type cannot take, `ConfigError` for a
    name that is not in the table, `UnsupportedError` for a type that is only decoded, or that needs
    an importance.

    >>> import numpy as np, weightpack as wp
    >>> wp.gguf.quantize(np.zeros((3, 64), np.float32), "q8_0").shape
    (3, 68)
    """
    info = find_type(type)
    weights = _arrays.view_floats(array)
    if not weights.shape:
        raise FormatError(f"{info.name.lower()}: a single number has no row")
    if info.format is None:
        raise UnsupportedError(f"{info.name} is not encoded")
    shape = list(weights.shape)
    out = _arrays.empty([*shape[:-1], info.row_bytes(shape[-1])], "U8", torch=weights.is_torch)
    params = json.dumps({"dtype": weights.dtype})
    columns = None if importance is None else flat_importance(importance)
    _rust.encode(info.format, shape, params, weights.data, str(weights.dtype), [out.data], threads, columns)
    return out.array


def flat_importance(importance: Any) -> NDArray[np.float32]:
    """An importance as the native side takes it: one run of float32."""
    return np.ascontiguousarray(np.asarray(importance, np.float32)).reshape(-1)


def dequantize(
    data: Any,
    type: str,
    shape: Sequence[int] | None = None,
    dtype: Any = None,
    out: Any = None,
    rows: slice | range | None = None,
    *,
    threads: int | None = None,
) -> Any:
    """Decodes blocks in float32, in ggml's order of operations, and rounds once to `dtype`.

    `data` is uint8 [..., bytes of a row], or anything with such a buffer (`bytes`, `mmap`); read-only
    arrays and memory maps are used where they lie, and so are arrays whose rows stand apart, as long
    as the bytes of one row follow each other. `shape`, that of the weights, is only needed where the
    data does not tell it (a flat buffer). `dtype` is float32 (the default), float16, bfloat16 or
    float64. `rows` picks rows, counted over all leading dimensions: a `slice` or a `range`; the
    result is then [number of rows, n].

    `out` is filled instead of a new array and gives the dtype; its rows may stand apart too (a
    part of a larger array).

    Returns `out`, or a new array of the kind of `data`. Raises `FormatError` for data or an `out`
    that does not fit, `ConfigError` for names that do not exist or options that contradict each
    other, `UnsupportedError` for a type that is not decoded.

    >>> import numpy as np, weightpack as wp
    >>> packed = wp.gguf.quantize(np.eye(4, 32, dtype=np.float32), "Q8_0")
    >>> wp.gguf.dequantize(packed, "Q8_0", dtype="float16", rows=slice(1, 3)).argmax(axis=1)
    array([1, 2])
    """
    info = find_type(type)
    if info.format is None:
        raise UnsupportedError(f"{info.name} is not decoded")
    packed = _arrays.view_strided(_buffer(data))
    if packed.dtype != "U8":
        raise FormatError(f"data is {packed.array.dtype}, expected uint8")
    blocks, wanted = _shaped(info, packed.data, shape)
    if rows is not None:
        blocks = as_rows(blocks)[_slice(rows)]
        wanted = [len(blocks), wanted[-1]]
    if out is None:
        name = _arrays.dtype_name("float32" if dtype is None else dtype)
        result = _arrays.empty(wanted, name, torch=packed.is_torch).array
    else:
        result = out
    target = _arrays.view_strided_output(result)
    if list(target.shape) != wanted:
        raise FormatError(f"out has shape {list(target.shape)}, expected {wanted}")
    if out is not None and dtype is not None and _arrays.dtype_name(dtype) != target.dtype:
        raise ConfigError(f"out is {out.dtype}, and dtype says {dtype}")
    for part, place in _matrices(blocks, target.data):
        _decode(info, wanted[-1], part, place, str(target.dtype), threads)
    return result


def _decode(
    info: TypeInfo, columns: int, part: NDArray[np.uint8], place: NDArray[np.uint8], dtype: str, threads: int | None
) -> None:
    if part.flags.c_contiguous and place.flags.c_contiguous:
        shape = [len(part), columns]
        _rust.decode(str(info.format), shape, "{}", [part.reshape(-1)], place.reshape(-1), dtype, threads)
    else:
        _rust.decode_rows(str(info.format), columns, part, place, dtype, threads)


def _buffer(data: Any) -> Any:
    """Bytes, maps and the like as arrays; arrays as they are."""
    if hasattr(data, "dtype") or hasattr(data, "__array_interface__"):
        return data
    try:
        return np.frombuffer(data, np.uint8)
    except (TypeError, ValueError) as error:
        raise FormatError(f"data is no array and no buffer: {error}") from error


def _shaped(
    info: TypeInfo, data: NDArray[np.uint8], shape: Sequence[int] | None
) -> tuple[NDArray[np.uint8], list[int]]:
    """The data as [..., bytes of a row], and the shape of its weights."""
    if shape is None:
        if data.shape[-1] % info.block_bytes:
            raise FormatError(
                f"{info.name.lower()}: {data.shape[-1]} bytes are not rows of whole blocks of {info.block_bytes} bytes"
            )
        return data, [*data.shape[:-1], data.shape[-1] // info.block_bytes * info.block_weights]
    wanted = [int(size) for size in shape]
    if not wanted:
        raise FormatError(f"{info.name.lower()}: a single number has no row")
    stored = [*wanted[:-1], info.row_bytes(wanted[-1])]
    if list(data.shape) == stored:
        return data, wanted
    if prod(stored) != data.size:
        raise FormatError(f"{data.size} bytes, but shape {wanted} in {info.name} needs {prod(stored)}")
    return data.reshape(stored), wanted


def _slice(rows: slice | range) -> slice:
    if isinstance(rows, slice):
        return rows
    if not isinstance(rows, range):
        raise ConfigError(f"rows is {rows!r}, expected a slice or a range")
    if min(rows, default=0) < 0:
        raise ConfigError(f"rows is {rows!r}, expected numbers of rows")
    return slice(rows.start, rows.stop if rows.stop >= 0 else None, rows.step)


def _merges(array: NDArray[np.uint8]) -> bool:
    """Whether all leading dimensions can be one without a copy."""
    return array.size == 0 or all(
        array.shape[axis] == 1 or array.strides[axis] == array.shape[axis + 1] * array.strides[axis + 1]
        for axis in range(array.ndim - 2)
    )


def as_rows(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The array as rows, all leading dimensions in one; a copy only where they cannot be."""
    return array.reshape(prod(array.shape[:-1]), array.shape[-1])


def _matrices(data: NDArray[np.uint8], out: NDArray[np.uint8]) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Both as rows; part by part where the leading dimensions do not make one."""
    if _merges(data) and _merges(out):
        yield as_rows(data), as_rows(out)
    else:
        for part, place in zip(data, out, strict=True):
            yield from _matrices(part, place)
