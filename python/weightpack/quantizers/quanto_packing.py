"""quanto's numbers in torch operations: encoding weights into its components, and back.

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

Every step is rounded to the type of the weight, as optimum-quanto 0.2.7 does; so these are its bytes.
Special cases: all-zero rows have scale 0 and codes 0, where quanto gives NaN for `float8` (so do rows whose
scale is rounded to 0); constant groups have scale 0 and codes 0; values that are not finite, and ranges that
overflow the type of the weight, are refused. A weight of a single row has one scalar scale or, where there
are no groups, one scale and shift for each column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import FormatError

BITS = {"int8": 8, "float8": 8, "int4": 4, "int2": 2}
"""Bits of a code, for each type of weights."""
CODE_DTYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn, "int4": torch.uint8, "int2": torch.uint8}
"""Element type of `_data`."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LIMITS = {"int8": (-128.0, 127.0), "float8": (-448.0, 448.0)}
_CHUNK_WEIGHTS = 1 << 22
"""Weights encoded at a time: bounds the temporaries to some tens of megabytes."""


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
    """The components of a `weight` of two or more dimensions, on its device.

    It is rounded to `dtype` first, piece by piece: float32, float16 or bfloat16, by default its own type.
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
    weight = weight.detach().contiguous()
    if BITS[weights] == 8:
        return _encode_bytes(weight, weights, dtype, name)
    return _encode_bits(weight, weights, dtype, name)


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


def _encode_bytes(weight: Any, weights: str, dtype: Any, name: str) -> dict[str, Any]:
    rows = weight.reshape(weight.shape[0], -1)
    low, high = _LIMITS[weights]
    data = torch.empty(rows.shape, dtype=CODE_DTYPES[weights], device=weight.device)
    scale = torch.empty((rows.shape[0], 1), dtype=dtype, device=weight.device)
    for start, end in _chunks(*rows.shape):
        part = rows[start:end].to(dtype)
        smallest, largest = torch.aminmax(part, dim=1, keepdim=True)
        part_scale = torch.maximum(-smallest, largest) / high
        _check_finite(part_scale, weight, weights, dtype, name)
        codes = part / part_scale
        if weights == "int8":
            codes.round_()
        # 0 / 0 in rows of zeros: NaN has no defined integer, and is no zero in float8.
        data[start:end] = _without_nan(codes, part_scale).clamp_(low, high)
        scale[start:end] = part_scale
    shapes = component_shapes(weight.shape, weights)
    return {"_data": data.reshape(shapes["_data"]), "_scale": scale.reshape(shapes["_scale"])}


def _encode_bits(weight: Any, weights: str, dtype: Any, name: str) -> dict[str, Any]:
    bits = BITS[weights]
    shapes = component_shapes(weight.shape, weights)
    rows, inner = _grouped(weight.shape, weights)
    grouped = weight.reshape(rows, *inner)
    packed = torch.zeros(shapes["_data"], dtype=torch.uint8, device=weight.device)
    scale = torch.empty(shapes["_scale"], dtype=dtype, device=weight.device)
    shift = torch.empty_like(scale)
    stride = packed.shape[0]
    # With a single row the library keeps the last dimension apart, and not the first.
    dims = tuple(range(1, grouped.ndim)) if rows > 1 else tuple(range(grouped.ndim - 1))
    for place in range(8 // bits):
        first = place * stride
        for start, end in _chunks(min(stride, rows - first), math.prod(inner)):
            part = grouped[first + start : first + end].to(dtype)
            smallest = part.amin(dim=dims, keepdim=True)
            part_scale = (part.amax(dim=dims, keepdim=True) - smallest) / (2**bits - 1)
            _check_finite(part_scale, weight, weights, dtype, name)
            part_shift = -smallest
            codes = (part + part_shift).div_(part_scale).round_()
            # 0 / 0 in constant groups, which the shift alone gives back.
            codes = _without_nan(codes, part_scale).clamp_(0, 2**bits - 1).to(torch.uint8)
            packed[start:end] |= codes << (bits * place) if place else codes
            scale[first + start : first + end] = part_scale
            shift[first + start : first + end] = part_shift
    return {"_data": packed, "_scale": scale, "_shift": shift}


def _grouped(shape: Sequence[int], weights: str) -> tuple[int, tuple[int, ...]]:
    """Rows of the grouped view, and the dimensions inside a row."""
    size = group_size(shape, weights)
    return (math.prod(shape) // size, (size,)) if size else (shape[0], tuple(shape[1:]))


def _chunks(rows: int, row_weights: int) -> Any:
    step = max(1, _CHUNK_WEIGHTS // row_weights)
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _without_nan(codes: Any, scale: Any) -> Any:
    """Quotients with zeros in the place of NaN, which only scales of zero make."""
    return torch.nan_to_num_(codes, nan=0.0) if (scale == 0).any() else codes


def _check_finite(scale: Any, weight: Any, weights: str, dtype: Any, name: str) -> None:
    if torch.isfinite(scale).all():
        return
    where = torch.nonzero(~torch.isfinite(weight))
    if len(where):
        place = where[0].tolist()
        fact = f"value {weight[tuple(place)].item()} at {place} is not finite"
    else:
        fact = f"the range of a group overflows {_name(dtype)}"
    raise FormatError(f'quanto:{weights}: {fact} (tensor "{name}", shape {list(weight.shape)})')


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
