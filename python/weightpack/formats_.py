"""Formats on single arrays: `quantize`, `dequantize`, `pack_int4`, `unpack_int4` and the table `formats`.

Arrays are numpy arrays (bfloat16 by way of `ml_dtypes`) or torch tensors on the CPU; results are of
the same kind. The work is done outside the interpreter's lock; the bytes do not depend on `threads`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import _arrays, _rust
from .errors import CheckpointError, ConfigError, FormatError, UnsupportedError
from .targets import FormatInfo, find_format, format_table, match

_STATE = "quant_state.bitsandbytes__"


def formats() -> list[FormatInfo]:
    """Every format.

    >>> import weightpack as wp
    >>> [info.name for info in wp.formats() if info.short == "nf4"]
    ['bitsandbytes:nf4']
    """
    return list(format_table())


def quantize(
    array: Any,
    format: str,
    *,
    block_size: int | None = None,
    double_quant: bool = False,
    keep_nonfinite: bool = False,
    importance: Any = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Encodes an array; lossy for every format but `f32`.

    `array` holds float32, float16, bfloat16 or float64 weights, of any shape that the format takes:
    `bitsandbytes:int8` two dimensions, GGUF types rows of whole blocks. `block_size` and
    `double_quant` are choices of `nf4` and `fp4`; `block_size` also of torchao's integers and `float8`, whose
    rows are one block without it. Weights that are not finite are refused;
    `keep_nonfinite` encodes them where the format defines how (`nf4`, `fp4`). `importance`, for GGUF
    types, says how much each column counts: float32, one number per column of the last dimension, or
    one per matrix of a stack and column; types that have no use for it ignore it.

    Gives the stored arrays by component, `""` being the main one, under the names they have in a
    file: for `nf4` `""`, `absmax`, `quant_map`, `quant_state.bitsandbytes__nf4`, and with
    `double_quant` also `nested_absmax` and `nested_quant_map`; for `bitsandbytes:int8` `""`, `SCB`,
    `weight_format`; for torchao `qdata`, `scale` and, of integers, `zero_point`; for quanto `_data`, `_scale`,
    `input_scale`, `output_scale`, and with 4 and 2 bits `_data._data` and `_shift`. GGUF types give uint8 rows of
    whole blocks.

    Raises `FormatError` for an array that the format cannot take, `ConfigError` for parameters it
    does not have, `UnsupportedError` for a format that does not exist.

    >>> import numpy as np, weightpack as wp
    >>> parts = wp.quantize(np.ones((2, 64), np.float32), "nf4")
    >>> parts[""].shape, parts["absmax"]
    ((64, 1), array([1., 1.], dtype=float32))
    """
    weights = _arrays.view_floats(array)
    row = match(format, format_table())
    if row is not None and row.encodes == "never":
        # Before its shape is looked at, which has to fit what is decoded only.
        raise UnsupportedError(f"{row.name}: is decoded, and not encoded")
    columns = None
    if importance is not None:
        if not format.lower().startswith("gguf:") and find_format(format).backend != "gguf":
            raise ConfigError(f"{format}: takes no importance, only GGUF types do")
        columns = np.ascontiguousarray(np.asarray(importance, np.float32)).reshape(-1)
    params = {
        "block_size": block_size,
        "double_quant": double_quant,
        "dtype": weights.dtype,
        "keep_nonfinite": keep_nonfinite,
    }
    text = json.dumps(params)
    layout = json.loads(_rust.layout(format, list(weights.shape), text))
    parts = []
    for component in layout:
        shape, dtype = _stored(format, component)
        parts.append(_arrays.empty(shape, dtype, torch=weights.is_torch))
    lengths = _rust.encode(
        format,
        list(weights.shape),
        text,
        weights.data,
        str(weights.dtype),
        [part.data for part in parts],
        threads,
        columns,
    )
    return {
        component["suffix"]: part.array[:length] if component["late"] else part.array
        for component, part, length in zip(layout, parts, lengths, strict=True)
    }


def dequantize(
    components: Mapping[str, Any] | Any,
    format: str,
    *,
    shape: Sequence[int] | None = None,
    dtype: Any = None,
    out: Any = None,
    block_size: int | None = None,
    double_quant: bool | None = None,
    nested_offset: float | None = None,
    threads: int | None = None,
) -> Any:
    """Decodes what `quantize` gives, or what a file holds, rounding each weight once to `dtype`.

    `components` maps component names to arrays, as `quantize` returns them; an array alone is the
    first component. `shape` is only needed where it cannot be told: for quanto's `int4` and `int2`, and for
    `nf4` and `fp4` without their `quant_state`, which otherwise also gives `block_size`, `double_quant` and
    `nested_offset`. `dtype` is float32 (the default), float16, bfloat16 or float64; `out`, a
    contiguous array of the right shape, is filled instead of a new array and gives the dtype.

    Returns `out`, or a new array of the kind of the main component. Raises `FormatError` for
    components that do not fit together, `ConfigError` for parameters that contradict them.

    >>> import numpy as np, weightpack as wp
    >>> weights = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    >>> decoded = wp.dequantize(wp.quantize(weights, "q8_0"), "q8_0")
    >>> float(abs(decoded - weights).max()) < 0.005
    True
    """
    first = _main_of_two_rows(format)["suffix"]
    if not isinstance(components, Mapping):
        components = {first: components}
    if first not in components:
        raise FormatError(f'{format}: the main component "{first}" is missing')
    main = _arrays.view(components[first])
    params: dict[str, Any] = {"block_size": block_size, "double_quant": bool(double_quant)}
    for typed in _TYPED & components.keys():
        if (scale := _arrays.view(components[typed]).dtype) in _arrays.FLOATS:
            params["dtype"] = scale
    if nested_offset is not None:
        params["nested_offset"] = nested_offset
    for name in components:
        if name.startswith(_STATE):
            state = _quant_state(components[name])
            _agree(
                format, params, state, given={"block_size": block_size, "double_quant": double_quant, "shape": shape}
            )
            shape = state["shape"]
    if shape is None:
        shape = _shape(format, main)
    if out is None:
        wanted = _arrays.empty(shape, _arrays.dtype_name(dtype or "float32"), torch=main.is_torch)
    else:
        wanted = _arrays.view_output(out)
        if wanted.shape != tuple(shape):
            raise FormatError(f"{format}: out has shape {list(wanted.shape)}, expected {list(shape)}")
        if dtype is not None and _arrays.dtype_name(dtype) != wanted.dtype:
            raise ConfigError(f"out is {wanted.array.dtype}, and dtype says {dtype}")
    text = json.dumps(params)
    parts = []
    for component in json.loads(_rust.layout(format, list(shape), text)):
        name = component["suffix"]
        if name in components:
            parts.append(_arrays.view(components[name]).data)
        elif name in _TABLES or name.startswith(_STATE):
            parts.append(np.empty(0, np.uint8))
        else:
            raise FormatError(f'{format}: component "{name}" is missing')
    _rust.decode(format, list(shape), text, parts, wanted.data, str(wanted.dtype), threads)
    return wanted.array if out is None else out


_TABLES = ("quant_map", "nested_quant_map", "weight_format", "input_scale", "output_scale")
"""Components that decoding does not look at."""
_TYPED = {"_scale", "scale"}
"""Components that have the type of the weights, or decode alike whatever it is."""


def pack_int4(codes: Any, order: str = "low_first") -> Any:
    """Packs 4-bit codes, two to a byte.

    `codes` is uint8 of values 0 to 15, of shape [..., n]; the result is uint8 [..., n/2]. With
    `order="low_first"` the first code of a pair is in bits 0-3, with `"high_first"` in bits 4-7. An
    odd n is taken in one dimension only; the half byte left over is 0.

    >>> import numpy as np, weightpack as wp
    >>> wp.pack_int4(np.array([1, 2, 3], np.uint8), order="high_first")
    array([18, 48], dtype=uint8)
    """
    seen = _view_uint8(codes, "codes")
    shape = seen.shape
    if len(shape) != 1 and (not shape or shape[-1] % 2):
        raise FormatError(f"codes of shape {list(shape)}: the last dimension is not even")
    packed = _rust.pack_int4(seen.data, order)
    return _like(seen, packed.reshape(*shape[:-1], (shape[-1] + 1) // 2))


def unpack_int4(packed: Any, order: str = "low_first", count: int | None = None) -> Any:
    """Unpacks 4-bit codes: uint8 [..., n] gives uint8 [..., 2n].

    `count`, for one dimension only, is the number of codes; it drops the half byte that packing an
    odd number leaves over.

    >>> import numpy as np, weightpack as wp
    >>> wp.unpack_int4(np.array([18, 48], np.uint8), order="high_first", count=3)
    array([1, 2, 3], dtype=uint8)
    """
    seen = _view_uint8(packed, "packed")
    shape = seen.shape
    if not shape or (count is not None and len(shape) != 1):
        raise FormatError(f"packed of shape {list(shape)}: count goes with one dimension only")
    total = 2 * seen.data.size if count is None else count
    codes = _rust.unpack_int4(seen.data, order, total)
    return _like(seen, codes.reshape(*shape[:-1], 2 * shape[-1] if count is None else count))


def _view_uint8(array: Any, name: str) -> _arrays.Bytes:
    seen = _arrays.view(array)
    if seen.dtype != "U8":
        raise FormatError(f"{name}: expected uint8, got {seen.array.dtype}")
    return seen


def _like(seen: _arrays.Bytes, array: Any) -> Any:
    return _arrays.as_torch(array) if seen.is_torch else array


def _stored(format: str, component: dict[str, Any]) -> tuple[list[int], str]:
    """Shape and element type of a component as an array; GGUF blocks are uint8 rows."""
    shape, dtype = list(component["shape"]), component["dtype"]
    if dtype in _arrays.ELEMENT_TYPES:
        return shape, dtype
    return [*shape[:-1], shape[-1] * _main_of_two_rows(format)["bytes"] // 512], "U8"


def _shape(format: str, main: _arrays.Bytes) -> list[int]:
    """The shape of the weights, from that of the main component."""
    row = _main_of_two_rows(format)
    if row["dtype"] in _arrays.ELEMENT_TYPES:
        rows, columns = row["shape"]
        if row["repeated"]:
            raise ConfigError(f"{format}: shape is needed to decode, as codes are stored in groups of rows")
        if columns == 1:
            raise ConfigError(f"{format}: shape is needed to decode without quant_state")
        if len(main.shape) < 2:
            return list(main.shape)
        # Codes of neighbours in a row, or in a column, may share a byte.
        return [*main.shape[:-2], main.shape[-2] * 2 // rows, main.shape[-1] * 256 // columns]
    if not main.shape or main.shape[-1] * 512 % row["bytes"]:
        raise FormatError(f"{format}: shape {list(main.shape)} does not hold rows of whole blocks")
    return [*main.shape[:-1], main.shape[-1] * 512 // row["bytes"]]


def _main_of_two_rows(format: str) -> dict[str, Any]:
    """The main component of two rows of 256 weights: a whole number of blocks of every type."""
    main: dict[str, Any] = json.loads(_rust.layout(format, [2, 256], "{}"))[0]
    return main


def _quant_state(array: Any) -> dict[str, Any]:
    """The JSON that bitsandbytes stores beside a 4-bit tensor."""
    try:
        state = json.loads(_arrays.view(array).data.tobytes().decode())
    except ValueError as error:
        raise CheckpointError(f"quant_state is not JSON: {error}") from error
    if not isinstance(state, dict) or not {"quant_type", "blocksize", "shape"} <= state.keys():
        raise CheckpointError("quant_state is not what bitsandbytes writes")
    return state


def _agree(format: str, params: dict[str, Any], state: dict[str, Any], *, given: dict[str, Any]) -> None:
    """Fills `params` from `state`; what the caller gave must not contradict it."""
    stored = {
        "block_size": state["blocksize"],
        "double_quant": "nested_offset" in state,
        "shape": state["shape"],
    }
    for name, value in given.items():
        if value is not None and (list(value) if name == "shape" else value) != stored[name]:
            raise ConfigError(f"{format}: {name} is {stored[name]} in quant_state, not {value}")
    if state["quant_type"] != format.rpartition(":")[2]:
        raise ConfigError(f"{format}: quant_state says {state['quant_type']}")
    params["block_size"] = stored["block_size"]
    params["double_quant"] = stored["double_quant"]
    if stored["double_quant"]:
        params.setdefault("nested_offset", state["nested_offset"])
