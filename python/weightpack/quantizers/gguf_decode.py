"""Blocks of GGUF types decoded by torch, on whatever device they lie.

weightpack's own kernels decode on the CPU; this is for weights on an accelerator, which are decoded
there, and for `torch.compile`. Every type is a function from blocks, uint8 [n, bytes of a block], to
weights, float32 [n, weights of a block], in the order of operations of the kernels, so that the
numbers are the same. Byte layouts are told in `rust/formats/ggml_*.rs` and `mx.rs`.

The points of the IQ types' grids are not kept twice: the kernels are asked for them once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from ..errors import UnsupportedError
from ..gguf.blocks import dequantize as decode_on_cpu
from ..gguf.blocks import find_type

WEIGHTS_AT_ONCE = 1 << 24
"""Weights decoded at a time: what stands beside the result stays below some hundred megabytes."""

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_HALVES_OF_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _half_of_ue4m3(byte: int) -> float:
    if byte == 127:
        # Only this byte is a zero: with its top bit set it is a number like the others.
        return 0.0
    exponent, fraction = byte >> 3 & 15, byte & 7
    return math.ldexp(fraction, -10) if exponent == 0 else math.ldexp(8 + fraction, exponent - 11)


_HALVES_OF_UE4M3 = tuple(_half_of_ue4m3(byte) for byte in range(256))


def decode(data: Any, type: str, shape: Sequence[int], dtype: Any = torch.float32) -> Any:
    """The weights of `data`, uint8 of whole blocks of one type, as a tensor of `shape` on its device.

    Computed in float32 and rounded once to `dtype`. Raises `UnsupportedError` for a type that is not
    decoded here, `ConfigError` for a name that is none.
    """
    name = type.upper()
    weights, nbytes = sizes(name)
    if name not in _DECODERS:
        raise UnsupportedError(f"{name} is not decoded by torch")
    blocks = data.reshape(-1, nbytes)
    step = max(1, WEIGHTS_AT_ONCE // weights)
    if len(blocks) <= step:
        return _DECODERS[name](blocks).reshape(tuple(shape)).to(dtype)
    out = torch.empty((len(blocks), weights), dtype=dtype, device=data.device)
    for first in range(0, len(blocks), step):
        part = blocks[first : first + step]
        out[first : first + step] = _DECODERS[name](part).reshape(len(part), -1)
    return out.reshape(tuple(shape))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def sizes(type: str) -> tuple[int, int]:
    """Weights and bytes of a block of a type. Raises `ConfigError` for a type that does not exist."""
    info = find_type(type)
    return info.block_weights, info.block_bytes


def decodable_types() -> tuple[str, ...]:
    """Names of the types that `decode` takes."""
    return tuple(_DECODERS)


# Fields of blocks.


def _half(blocks: Any, at: int) -> Any:
    """The f16 at byte `at` of each block, as float32 [n, 1]."""
    return _in_one_piece(blocks[:, at : at + 2]).view(torch.float16).to(torch.float32)


def _in_one_piece(part: Any) -> Any:
    # Even a part that counts as contiguous may begin at an odd byte.
    return part.clone(memory_format=torch.contiguous_format)


def _words(blocks: Any, at: int, count: int, size: int = 2) -> Any:
    """`count` little-endian whole numbers of `size` bytes from byte `at` on, as int64 [n, count]."""
    found = blocks[:, at : at + count * size].reshape(len(blocks), count, size).to(torch.int64)
    return sum(found[:, :, number] << (8 * number) for number in range(size))


def _shifted(values: Any, steps: Sequence[int], mask: int) -> Any:
    """`values` [n, k] shifted right by each of `steps` and masked, as [n, k, steps]."""
    return torch.stack([values >> step & mask for step in steps], dim=-1)


def _nibbles(data: Any) -> Any:
    """The two nibbles of each byte, one after the other, the low one first: [n, k] gives [n, 2k]."""
    return _shifted(data, (0, 4), 15).flatten(1)


def _split_nibbles(data: Any, run: int) -> Any:
    """Byte j of `run` / 2 has code j in its low half and code j + `run` / 2 in its high one: [n, codes]."""
    halves = data.reshape(len(data), -1, run // 2)
    return torch.cat((halves & 15, halves >> 4), dim=-1).flatten(1)


def _planes(data: Any, width: int, bits: int) -> Any:
    """Byte l of `width` holds `bits` bits of the codes l, `width` + l and so on, low bits first: [n, codes]."""
    steps = torch.arange(0, 8, bits, dtype=data.dtype, device=data.device).reshape(1, 1, -1, 1)
    return (data.reshape(len(data), -1, 1, width) >> steps & ((1 << bits) - 1)).flatten(1)


def _bits(data: Any) -> Any:
    """The bits of each byte, lowest first: [n, k] gives [n, 8k]."""
    return _shifted(data, range(8), 1).flatten(1)


def _signed(data: Any) -> Any:
    return _in_one_piece(data).view(torch.int8)


def _by_group(scales: Any, codes: Any) -> Any:
    """`codes` [n, weights] in the groups that `scales` [n, groups] has, and the scales to go with them."""
    return scales.unsqueeze(-1), codes.reshape(len(codes), scales.shape[1], -1)


def _table(values: tuple[float, ...], codes: Any) -> Any:
    make = _constants.__wrapped__ if torch.compiler.is_compiling() else _constants
    return make(values, codes.device)[codes.long()]


@cache
def _constants(values: tuple[float, ...], device: Any) -> Any:
    """Kept on the device: to bring them there each time would make it wait."""
    return torch.tensor(values, dtype=torch.float32, device=device)


# Types of 32 weights.


def _q4_0(blocks: Any) -> Any:
    return (_split_nibbles(blocks[:, 2:], 32).float() - 8) * _half(blocks, 0)


def _q4_1(blocks: Any) -> Any:
    return _split_nibbles(blocks[:, 4:], 32).float() * _half(blocks, 0) + _half(blocks, 2)


def _q5_codes(blocks: Any, at: int) -> Any:
    high = _bits(blocks[:, at : at + 4])
    return (_split_nibbles(blocks[:, at + 4 :], 32) | high << 4).float()


def _q5_0(blocks: Any) -> Any:
    return (_q5_codes(blocks, 2) - 16) * _half(blocks, 0)


def _q5_1(blocks: Any) -> Any:
    return _q5_codes(blocks, 4) * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: Any) -> Any:
    return _signed(blocks[:, 2:]).float() * _half(blocks, 0)


def _q8_1(blocks: Any) -> Any:
    return _signed(blocks[:, 4:]).float() * _half(blocks, 0)


def _q8_k(blocks: Any) -> Any:
    return _signed(blocks[:, 4:260]).float() * _in_one_piece(blocks[:, :4]).view(torch.float32)


# K types.


def _q2_k(blocks: Any) -> Any:
    scale, codes = _by_group(_half(blocks, 80) * (blocks[:, :16] & 15).float(), _planes(blocks[:, 16:80], 32, 2))
    least = _half(blocks, 82) * (blocks[:, :16] >> 4).float()
    return scale * codes.float() - least.unsqueeze(-1)


def _q3_k(blocks: Any) -> Any:
    low, high = _nibbles_apart(blocks[:, 96:104]), _planes(blocks[:, 104:108], 4, 2)
    scales = _half(blocks, 108) * ((low | high << 4).float() - 32)
    codes = _planes(blocks[:, 32:96], 32, 2) | _planes(blocks[:, :32], 32, 1) << 2
    scale, codes = _by_group(scales, codes)
    return scale * (codes.float() - 4)


def _nibbles_apart(data: Any) -> Any:
    """The low nibbles of all bytes, then the high ones."""
    return torch.cat((data & 15, data >> 4), dim=-1)


def _six_bits(blocks: Any) -> tuple[Any, Any]:
    """The scales and mins of Q4_K and Q5_K, [n, 8] each."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=-1)
    mins = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=-1)
    return scales, mins


def _affine_k(blocks: Any, codes: Any) -> Any:
    scales, mins = _six_bits(blocks)
    scale, codes = _by_group(_half(blocks, 0) * scales.float(), codes)
    return scale * codes.float() - (_half(blocks, 2) * mins.float()).unsqueeze(-1)


def _q4_k(blocks: Any) -> Any:
    return _affine_k(blocks, _split_nibbles(blocks[:, 16:], 64))


def _q5_k(blocks: Any) -> Any:
    return _affine_k(blocks, _split_nibbles(blocks[:, 48:], 64) | _planes(blocks[:, 16:48], 32, 1) << 4)


def _q6_k(blocks: Any) -> Any:
    codes = _split_nibbles(blocks[:, :128], 128) | _planes(blocks[:, 128:192], 32, 2) << 4
    scale, codes = _by_group(_half(blocks, 208) * _signed(blocks[:, 192:208]).float(), codes)
    return scale * (codes.float() - 32)


# Signs, and small whole numbers times one scale.


def _tq1_0(blocks: Any) -> Any:
    def trits(data: Any, count: int) -> Any:
        powers = torch.tensor([3**n for n in range(count)], dtype=torch.uint8, device=data.device)
        # Bytes wrap round, as in the kernels.
        parts = data.unsqueeze(1) * powers.reshape(1, -1, 1)
        return (parts.to(torch.int16) * 3 >> 8).flatten(1)

    runs = (trits(blocks[:, :32], 5), trits(blocks[:, 32:48], 5), trits(blocks[:, 48:52], 4))
    return (torch.cat(runs, dim=-1).float() - 1) * _half(blocks, 52)


def _tq2_0(blocks: Any) -> Any:
    return (_planes(blocks[:, :64], 32, 2).float() - 1) * _half(blocks, 64)


def _q1_0(blocks: Any) -> Any:
    d = _half(blocks, 0)
    return torch.where(_bits(blocks[:, 2:]).bool(), d, -d)


def _q2_0(blocks: Any) -> Any:
    return (_shifted(blocks[:, 2:], (0, 2, 4, 6), 3).flatten(1).float() - 1) * _half(blocks, 0)


# Microscaling types.


def _mxfp4(blocks: Any) -> Any:
    # Half of 2^(e - 127), as bits: subnormal for e below 2.
    e = blocks[:, :1].to(torch.int32)
    bits = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23)
    return _table(_HALVES_OF_E2M1, _split_nibbles(blocks[:, 1:], 32)) * bits.view(torch.float32)


def _nvfp4(blocks: Any) -> Any:
    scale, codes = _by_group(_table(_HALVES_OF_UE4M3, blocks[:, :4]), _split_nibbles(blocks[:, 4:], 16))
    return _table(_HALVES_OF_E2M1, codes) * scale


# Types on uneven levels and on grids.


def _iq4_nl(blocks: Any) -> Any:
    return _half(blocks, 0) * _table(_IQ4_LEVELS, _split_nibbles(blocks[:, 2:], 32))


def _iq4_xs(blocks: Any) -> Any:
    high = _shifted(_words(blocks, 2, 1), range(0, 16, 2), 3).flatten(1)
    scales = _nibbles(blocks[:, 4:8]) | high << 4
    scale, codes = _by_group(_half(blocks, 0) * (scales.float() - 32), _split_nibbles(blocks[:, 8:], 32))
    return scale * _table(_IQ4_LEVELS, codes)


def _on_grid(scales: Any, points: Any, signs: Any) -> Any:
    """`scales` [n, groups] times points [n, runs, weights], negated where the bit in `signs` [n, bytes] is set."""
    scale, levels = _by_group(scales, points.flatten(1))
    magnitude = scale * levels.float()
    return torch.where(_bits(signs).reshape(magnitude.shape).bool(), -magnitude, magnitude)


def _even(codes: Any) -> Any:
    """Sign bytes of codes of seven bits: bit 7 makes the number of minus signs even."""
    parity = codes ^ codes >> 4
    parity = parity ^ parity >> 2
    parity = parity ^ parity >> 1
    return codes | (parity & 1) << 7


def _code_words(blocks: Any, first: int, step: int) -> tuple[Any, Any]:
    """The scale in the top four bits, [n, 8], and the sign bytes, [n, 32], of the words of IQ2_XXS and IQ3_XXS."""
    words = torch.cat([_words(blocks, first + step * group, 1, 4) for group in range(8)], dim=-1)
    return words >> 28, _even(_shifted(words, (0, 7, 14, 21), 127).flatten(1))


def _iq2_xxs(blocks: Any) -> Any:
    scales, signs = _code_words(blocks, 6, 8)
    indices = blocks[:, 2:].reshape(len(blocks), 8, 8)[:, :, :4].flatten(1)
    points = _grid("IQ2_XXS", blocks.device)[indices.long()]
    return _on_grid(_half(blocks, 0) * (scales.float() + 0.5) * 0.25, points, signs)


def _iq2_xs(blocks: Any) -> Any:
    both = _words(blocks, 2, 32)
    points = _grid("IQ2_XS", blocks.device)[both & 511]
    scales = _half(blocks, 0) * (_nibbles(blocks[:, 66:]).float() + 0.5) * 0.25
    return _on_grid(scales, points, _even(both >> 9))


def _iq2_s(blocks: Any) -> Any:
    high = _shifted(blocks[:, 66:74], (0, 2, 4, 6), 3).flatten(1).long()
    points = _grid("IQ2_S", blocks.device)[blocks[:, 2:34].long() | high << 8]
    scales = _half(blocks, 0) * (_nibbles(blocks[:, 74:]).float() + 0.5) * 0.25
    return _on_grid(scales, points, blocks[:, 34:66])


def _iq3_xxs(blocks: Any) -> Any:
    scales, signs = _code_words(blocks, 66, 4)
    points = _grid("IQ3_XXS", blocks.device)[blocks[:, 2:66].long()]
    return _on_grid(_half(blocks, 0) * (scales.float() + 0.5) * 0.5, points, signs)


def _iq3_s(blocks: Any) -> Any:
    points = _grid("IQ3_S", blocks.device)[blocks[:, 2:66].long() | _bits(blocks[:, 66:74]).long() << 8]
    scales = _half(blocks, 0) * (_nibbles(blocks[:, 106:]).float() * 2 + 1)
    return _on_grid(scales, points, blocks[:, 74:106])


def _shifted_points(scales: Any, indices: Any, is_down: Any) -> Any:
    """`scales` [n, groups] times the points of IQ1, an eighth up or down: `indices` and `is_down` are [n, 32]."""
    points = _grid("IQ1_S", indices.device)[indices].float()
    levels = points + (0.125 - 0.25 * is_down.float()).unsqueeze(-1)
    scale, levels = _by_group(scales, levels.flatten(1))
    return scale * levels


def _iq1_s(blocks: Any) -> Any:
    words = _words(blocks, 34, 8)
    indices = blocks[:, 2:34].long() | _shifted(words, (0, 3, 6, 9), 7).flatten(1) << 8
    scales = _half(blocks, 0) * ((words >> 12 & 7) * 2 + 1).float()
    return _shifted_points(scales, indices, (words >> 15).repeat_interleave(4, dim=-1))


def _iq1_m(blocks: Any) -> Any:
    words = _words(blocks, 48, 4)
    bits = sum((words[:, number] >> 12) << (4 * number) for number in range(4))
    d = bits.to(torch.int32).to(torch.int16).view(torch.float16).float().unsqueeze(-1)
    high = _nibbles(blocks[:, 32:48]).long()
    scales = d * (_shifted(words, (0, 3, 6, 9), 7).flatten(1) * 2 + 1).float()
    return _shifted_points(scales, blocks[:, :32].long() | (high & 7) << 8, high >> 3)


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q8_1": _q8_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q8_K": _q8_k,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ3_XXS": _iq3_xxs,
    "IQ1_S": _iq1_s,
    "IQ4_NL": _iq4_nl,
    "IQ3_S": _iq3_s,
    "IQ2_S": _iq2_s,
    "IQ4_XS": _iq4_xs,
    "IQ1_M": _iq1_m,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
}

# The points of the grids.

_POINTS = {"IQ2_XXS": 256, "IQ2_XS": 512, "IQ2_S": 1024, "IQ3_XXS": 256, "IQ3_S": 512, "IQ1_S": 2048}
"""Points of the grid of each type; that of IQ1_S is IQ1_M's as well."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _grid(type: str, device: Any) -> Any:
    """The points of a type's grid, int8 [points, 4 or 8], on `device`."""
    return _decoded_points(type, device)


@cache
def _decoded_points(type: str, device: Any) -> Any:
    """What the kernels make of blocks that name one point after the other, with all signs plus and a
    scale of one."""
    per_run = 4 if type.startswith("IQ3") else 8
    per_block = 256 // per_run
    count = _POINTS[type]
    blocks = torch.zeros((count // per_block, find_type(type).block_bytes), dtype=torch.uint8)
    indices = torch.arange(count).reshape(-1, per_block)
    low, high = (indices & 255).to(torch.uint8), indices >> 8
    if type == "IQ2_XXS":
        blocks[:, 2:].reshape(len(blocks), 8, 8)[:, :, :4] = low.reshape(-1, 8, 4)
    elif type == "IQ2_XS":
        blocks[:, 2:66].reshape(len(blocks), 32, 2)[:] = torch.stack((low, high.to(torch.uint8)), dim=-1)
    elif type in ("IQ2_S", "IQ3_S", "IQ1_S"):
        blocks[:, 2 : 2 + per_block] = low
        # All indices of a block have the same high bits.
        if type == "IQ2_S":
            blocks[:, 66:74] = (high[:, :1] * 0b01010101).to(torch.uint8)
        elif type == "IQ3_S":
            blocks[:, 66:74] = (high[:, :1] * 255).to(torch.uint8)
        else:
            words = high[:, :1] * 0b001001001001
            blocks[:, 34::2], blocks[:, 35::2] = (words & 255).to(torch.uint8), (words >> 8).to(torch.uint8)
    else:
        blocks[:, 2:66] = low
    # The least scale is d times an eighth (IQ2), a quarter (IQ3_XXS) or one.
    d = {"IQ2": 8.0, "IQ3_XXS": 4.0}.get(type if type == "IQ3_XXS" else type[:3], 1.0)
    blocks[:, :2] = torch.tensor([d], dtype=torch.float16).view(torch.uint8)
    points = decode_on_cpu(blocks, type).reshape(count, per_run)
    if type == "IQ1_S":
        points = points - 0.125
    return points.to(torch.int8).to(device)
