"""Writing GGUF files from arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .. import _arrays, _rust
from ..errors import ConfigError, FormatError, UnsupportedError
from .blocks import TypeInfo, find_type, flat_importance
from .reading import GGUFFile

_SPLIT = "split."
"""Pairs that say how a file was split, not what the model is."""

_KINDS = {
    "bool": "bool",
    "uint8": "u8",
    "int8": "i8",
    "uint16": "u16",
    "int16": "i16",
    "uint32": "u32",
    "int32": "i32",
    "uint64": "u64",
    "int64": "i64",
    "float32": "f32",
    "float64": "f64",
}


class Typed(NamedTuple):
    """A metadata value with its type: `Typed("u64", 5)`, `Typed("[i16]", [1, 2])`."""

    type: str
    """`u8` ... `u64`, `i8` ... `i64`, `f32`, `f64`, `bool`, `str`, or one of them in brackets."""
    value: Any


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
    *,
    types: str | Mapping[str, str] | None = None,
    importance: Mapping[str, Any] | None = None,
    metadata_from: GGUFFile | None = None,
    max_dimensions: int = 4,
    overwrite: bool = False,
    threads: int | None = None,
) -> None:
    """Writes a GGUF file from arrays, in the order given.

    `tensors` maps names to arrays: floats (float32, float16, bfloat16, float64) or integers (int8 to
    int64), stored as they are unless `types` says otherwise; or to pairs of packed rows and their type,
    `(uint8 [..., bytes of a row], "Q4_K")`, stored as they are. `types` is the type for every array of
    floats with at least two dimensions, or maps names to types; names it does not have are stored as
    they are. `importance` maps names to importances, see `quantize`.

    `metadata` maps keys to values. Without a `Typed`, a type is chosen: `bool`, `str`, `f32` for a
    float, the first of `u32`, `i32`, `u64`, `i64` that holds an int; for a list the type that holds all
    its items, `[i32]` before `[u32]`; for numpy numbers and arrays their own. `metadata_from` carries the
    pairs of an open file over, except those of keys in `metadata`. A tensor has at most
    `max_dimensions` dimensions; ggml reads 4, other readers take more, the format 8.

    The file is made beside `path` and takes its place when it is complete. Raises `ConfigError` when it
    exists (`overwrite` replaces it) or a name is unknown, `FormatError` for an array that its type cannot
    take, `UnsupportedError` for one that GGUF cannot hold.

    >>> import numpy as np, tempfile, weightpack as wp
    >>> path = tempfile.mkdtemp() + "/small.gguf"
    >>> packed = wp.gguf.quantize(np.ones((2, 256), np.float32), "Q8_0")
    >>> tensors = {"packed": (packed, "Q8_0"), "norm": np.ones(256, np.float32)}
    >>> wp.gguf.write(path, tensors, {"general.architecture": "none", "none.scale": 0.5, "none.ids": [1, -2]})
    >>> [(tensor.name, tensor.type, tensor.shape) for tensor in wp.gguf.open(path).tensors.values()]
    [('packed', 'Q8_0', (2, 256)), ('norm', 'F32', (256,))]
    """
    unknown = [
        name for name in {**(importance or {}), **(types if isinstance(types, Mapping) else {})} if name not in tensors
    ]
    if unknown:
        raise ConfigError(f'no tensor "{unknown[0]}" is written')
    pairs = dict(metadata or {})
    carried = []
    if metadata_from is not None:
        native = metadata_from._open()
        carried = [(key, native) for key in metadata_from.metadata if key not in pairs and not key.startswith(_SPLIT)]
    plans = [_plan(name, value, types) for name, value in tensors.items()]
    writer = _rust.Writer.create(
        os.fspath(path),
        plans,
        json.dumps([[key, *_typed(key, value)] for key, value in pairs.items()]),
        carried,
        max_dimensions=max_dimensions,
        overwrite=overwrite,
    )
    try:
        for index, (name, value) in enumerate(tensors.items()):
            packed = _is_packed(value)
            seen = _arrays.view(value[0] if packed else value)
            columns = (importance or {}).get(name)
            columns = None if columns is None else flat_importance(columns)
            writer.put(index, seen.data, None if packed else seen.dtype, columns, threads)
        writer.commit()
    finally:
        writer.discard()


def _is_packed(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], str)


def _plan(name: str, value: Any, types: str | Mapping[str, str] | None) -> tuple[str, str, list[int]]:
    """Name, type and shape of a tensor, from what was given for it."""
    array = value[0] if _is_packed(value) else value
    if not hasattr(array, "dtype"):
        raise FormatError(f'expected an array or a tensor, got {type(array).__name__} (tensor "{name}")')
    shape = [int(size) for size in array.shape]
    given = _arrays.name_of(array)
    if _is_packed(value):
        if given != "U8" or not shape:
            raise FormatError(f'packed rows are {array.dtype}, expected uint8 (tensor "{name}")')
        return name, *_packed(name, find_type(value[1]), shape)
    wanted = types.get(name) if isinstance(types, Mapping) else types
    if isinstance(types, str) and (len(shape) < 2 or given not in _arrays.FLOATS):
        wanted = None
    if given is None:
        raise UnsupportedError(f'a GGUF file cannot hold {array.dtype} (tensor "{name}")')
    if wanted is None:
        return name, given, shape
    info = find_type(wanted)
    if given not in _arrays.FLOATS or not info.write:
        raise UnsupportedError(f'{array.dtype} is not encoded to {info.name} (tensor "{name}")')
    try:
        info.row_bytes(shape[-1] if shape else 1)
    except FormatError as error:
        raise FormatError(f'{error} (tensor "{name}", shape {shape})') from None
    return name, info.name, shape


def _packed(name: str, info: TypeInfo, stored: list[int]) -> tuple[str, list[int]]:
    if stored[-1] % info.block_bytes:
        raise FormatError(
            f"{stored[-1]} bytes are not rows of whole blocks of {info.block_bytes} bytes, "
            f'which {info.name} has (tensor "{name}")'
        )
    return info.name, [*stored[:-1], stored[-1] // info.block_bytes * info.block_weights]


def _typed(key: str, value: Any) -> tuple[str, Any]:
    """Type and JSON-able value of a pair."""
    if isinstance(value, Typed):
        plain = value.value.tolist() if hasattr(value.value, "tolist") else value.value
        return value.type, list(plain) if value.type.startswith("[") else plain
    if isinstance(value, (np.ndarray, np.generic)):
        kind = _KINDS.get(value.dtype.name)
        if kind is None and value.dtype.kind == "U":
            kind = "str"
        if kind is None or value.ndim > 1:
            raise ConfigError(f'metadata "{key}": numpy {value.dtype.name} of shape {value.shape} has no type in GGUF')
        return (f"[{kind}]" if value.ndim else kind), value.tolist()
    if isinstance(value, (list, tuple)):
        return f"[{_kind_of_items(key, value)}]", list(value)
    return _kind(key, value), value


def _kind(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, str):
        return "str"
    if isinstance(value, float):
        return "f32"
    if isinstance(value, int):
        return _smallest(key, [value], ("u32", "i32", "u64", "i64"))
    raise ConfigError(f'metadata "{key}": {type(value).__name__} has no type in GGUF')


def _kind_of_items(key: str, items: Iterable[Any]) -> str:
    kinds = {type(item) for item in items}
    if kinds == {int, float}:
        return "f32"
    if not kinds:
        raise ConfigError(f'metadata "{key}": an empty list has no type', hint='give one: Typed("[str]", [])')
    if len(kinds) > 1:
        raise ConfigError(f'metadata "{key}": the items of a list have one type')
    if kinds == {int}:
        return _smallest(key, items, ("i32", "u32", "i64", "u64"))
    return _kind(key, next(iter(items)))


_RANGES = {
    "i32": (-(1 << 31), 1 << 31),
    "u32": (0, 1 << 32),
    "i64": (-(1 << 63), 1 << 63),
    "u64": (0, 1 << 64),
}


def _smallest(key: str, numbers: Iterable[int], kinds: Iterable[str]) -> str:
    least, most = min(numbers), max(numbers)
    for kind in kinds:
        first, end = _RANGES[kind]
        if first <= least and most < end:
            return kind
    raise ConfigError(f'metadata "{key}": {most if most > 0 else least} does not fit in 64 bits')
