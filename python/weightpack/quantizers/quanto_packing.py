"""quanto's numbers: encoding weights into its components, by the engine's formats, and back in torch operations.

| type | `_data` | `_scale`, `_shift` |
|---|---|---|
| `int8`, `float8` | I8 or F8_E4M3, shape of the weight | scale [N, 1], no shift |
| `int4`, `int2` | U8, two or four codes a byte | scale and shift [R, 1] |

A weight of N rows and K columns (all dimensions but the first) is seen as R x G: in groups of G weights,
R = N * K / G, or row by row (R = N) where no group size fits. Codes are packed along R: row i, with row
i + ceil(R / 2) in the bits above it for `int4`, quarters for `int2`, the first one in the low bits.

- `int8`, `float8`: scale = absmax / 127 or 448; code = w / scale, rounded half to even, clamped.
- `int4`, `int2`: scale = (max - min) / (2^bits - 1), shift = -min, code = (w + shift) / scale rounded half
  to even, clamped; weight = scale * code - shift.

The bytes are those of optimum-quanto 0.2.7, but for rows that it gets wrong: see the formats. A weight of a
single row has one scalar scale or, where there are no groups, one scale and shift for each column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import FormatError
from ..formats_ import quantize

BITS = {"int8": 8, "float8": 8, "int4": 4, "int2": 2}
"""Bits of a code, for each type of weights."""
CODE_DTYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn, "int4": torch.uint8, "int2": torch.uint8}
"""Element type of `_data`."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CHUNK_WEIGHTS = 1 << 22
"""Weights decoded at a time: bounds the temporaries to some tens of megabytes."""


def group_size(shape: Sequence[int], weights: str) -> int | None:
    """Weights that share a scale and shift in a weight of `shape`, `None`: those of a row."""
    columns = math.prod(shape[1:])
    if BITS[weights] == 8 or columns <= 128:
        return None
    return next((size for size in (128, 96, 64, 32) if columns % size == 0), None)


def component_shapes(shape: Sequence[int], weights: str) -> dict[str, tuple[int, ...]]:
    """Shape of each component of a weight of `shape`, as quanto stores it."""
    rows, inner = _grouped(shape, weights)
    if BITS[weights] == 8:
        scale = () if shape[0] == 1 else (shape[0], *(1 for _ in inner))
        return {"_data": tuple(shape), "_scale": scale}
    packed = -(-rows // (8 // BITS[weights]))
    scale = (rows, *(1 for _ in inner))
    if rows == 1:
        scale = (*scale[:-1], inner[-1])
    return {"_data": (packed, *inner), "_scale": scale, "_shift": scale}


def packed_bytes(shape: Sequence[int], weights: str, element_bytes: int) -> int:
    """Bytes of all components, `element_bytes` for each scale and shift."""
    shapes = component_shapes(shape, weights)
    return math.prod(shapes.pop("_data")) + element_bytes * sum(math.prod(shape) for shape in shapes.values())


def encode(weight: Any, weights: str, *, dtype: Any = None, name: str = "weight") -> dict[str, Any]:
    """The components of a `weight` of two or more dimensions, on the CPU.

    It is rounded to `dtype` first: float32, float16 or bfloat16, by default its own type.
    Raises `FormatError` that names tensor `name` for values that are not finite, for a range that
    overflows that type, for another type, and for a weight without elements.
    """
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in _DTYPES or not weight.dtype.is_floating_point:
        raise FormatError(
            f"quanto:{weights}: {_name(weight.dtype)} weights as {_name(dtype)} cannot be encoded, "
            f'expected float32, float16 or bfloat16 (tensor "{name}")'
        )
    if weight.ndim < 2 or weight.numel() == 0:
        raise FormatError(f'quanto:{weights}: shape {list(weight.shape)} has no rows to encode (tensor "{name}")')
    weight = weight.detach().to("cpu", dtype).contiguous()
    shapes = component_shapes(weight.shape, weights)
    rows, inner = _grouped(weight.shape, weights)
    try:
        if BITS[weights] < 8 and rows == 1 and len(inner) > 1:
            found = _encode_columns(weight, weights)
        else:
            found = quantize(weight.reshape(rows, -1), f"quanto:{weights}")
    except FormatError as error:
        raise FormatError(f'{error.message} (tensor "{name}", shape {list(weight.shape)})', hint=error.hint) from error
    found = named(found)
    return {component: found[component].reshape(shape) for component, shape in shapes.items()}


def named(components: Mapping[str, Any]) -> dict[str, Any]:
    """Components by their names here, whatever those in files are: `_data` for `_data._data`."""
    return {component.removesuffix("._data"): value for component, value in components.items()}


def grouped_shape(shape: Sequence[int], weights: str) -> tuple[int, int] | None:
    """The matrix of groups that a weight of `shape` is encoded as, `None`: its rows are no more than a group.

    Of a matrix of more than one group a row, files hold the shift that the form of a kernel leaves
    (`quanto_tinygemm`); of a matrix whose rows are groups the same bytes, but the shift as it is.
    """
    size = group_size(shape, weights)
    return (math.prod(shape) // size, size) if size else None


def decode(components: Mapping[str, Any], weights: str, shape: Sequence[int], dtype: Any = None) -> Any:
    """The weight of `shape`: computed in float32 and rounded once to `dtype` (that of the scale)."""
    scale = components["_scale"]
    dtype = scale.dtype if dtype is None else dtype
    data = components["_data"]
    decoded = torch.empty(tuple(shape), dtype=dtype, device=data.device)
    if BITS[weights] == 8:
        for start, end in _chunks(shape[0], decoded.numel() // shape[0]):
            part = scale if scale.ndim == 0 else scale[start:end]
            decoded[start:end] = data[start:end].float() * part.float()
        return decoded
    shift = components["_shift"]
    rows = _grouped(shape, weights)[0]
    grouped = decoded.view(rows, *data.shape[1:])
    for codes, start in unpack_chunks(data, BITS[weights], rows):
        end = start + codes.shape[0]
        grouped[start:end] = codes.float() * scale[start:end].float() - shift[start:end].float()
    return decoded


def dequantize(components: Mapping[str, Any], weights: str, shape: Sequence[int]) -> Any:
    """The weight as quanto itself computes it for a matrix product: each step in the scale's type."""
    scale, data = components["_scale"], components["_data"]
    if BITS[weights] == 8:
        return scale * (data.to(scale.dtype) if data.dtype.is_floating_point else data)
    codes = unpack(data, BITS[weights], _grouped(shape, weights)[0])
    return (scale * codes).sub_(components["_shift"]).reshape(tuple(shape))


def pack(codes: Any, bits: int) -> Any:
    """Codes (uint8, packed along their first dimension) in bytes of two or four; rows short of a byte are 0."""
    per_byte = 8 // bits
    rows = codes.shape[0]
    stride = -(-rows // per_byte)
    packed = torch.zeros((stride, *codes.shape[1:]), dtype=torch.uint8, device=codes.device)
    for place in range(per_byte):
        part = codes[place * stride : min((place + 1) * stride, rows)]
        packed[: part.shape[0]] |= part << (bits * place)
    return packed


def unpack(packed: Any, bits: int, rows: int) -> Any:
    """The codes (uint8) of `rows` rows in packed bytes."""
    mask = (1 << bits) - 1
    return torch.cat([(packed >> (bits * place)) & mask for place in range(8 // bits)])[:rows]


def unpack_chunks(packed: Any, bits: int, rows: int) -> Any:
    """The codes of packed bytes in pieces of bounded size, each with its first row."""
    mask = (1 << bits) - 1
    stride = packed.shape[0]
    for place in range(8 // bits):
        for start, end in _chunks(min(stride, rows - place * stride), packed.numel() // stride):
            yield (packed[start:end] >> (bits * place)) & mask, place * stride + start


def _encode_columns(weight: Any, weights: str) -> dict[str, Any]:
    """The components of a single row of more than one dimension: the library keeps the last one apart, so that
    its groups are the columns of a matrix."""
    columns = weight.reshape(-1, weight.shape[-1]).T
    # A group that is alone would have a scale for each weight.
    count = max(2, len(columns))
    found = named(quantize(columns.expand(count, -1).contiguous(), f"quanto:{weights}"))
    codes = unpack(found["_data"], BITS[weights], count)[: len(columns)]
    return {"_data": codes.T.contiguous(), **{name: found[name][: len(columns)] for name in ("_scale", "_shift")}}


def _grouped(shape: Sequence[int], weights: str) -> tuple[int, tuple[int, ...]]:
    """Rows of the grouped view, and the dimensions inside a row."""
    size = group_size(shape, weights)
    return (math.prod(shape) // size, (size,)) if size else (shape[0], tuple(shape[1:]))


def _chunks(rows: int, row_weights: int) -> Any:
    step = max(1, _CHUNK_WEIGHTS // row_weights)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
