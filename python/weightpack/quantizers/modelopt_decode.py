"""Weights that ModelOpt packed, as numbers: the same values on every device, in bounded memory.

Values of the forms that ModelOpt runs itself are those of ModelOpt 0.47's decoders, operation by operation;
that it cannot run one of them (NF4 with more than one block of scales) or makes 64-bit numbers on the way
(INT4, NVFP4) is avoided. Exported forms are computed in float32 and rounded once.
Every function takes the stored codes and scales, and gives a tensor of `dtype` on their device.

| form | codes | value |
|---|---|---|
| INT4 | uint8, even element high | (code - 8) / scale: the scale is stored inverted, one a block of the flat weight |
| NF4 | uint8, even element high | table[code] * (scale / double_scale + scale_zeros), blocks of the flat weight |
| NVFP4 | uint8, even element low | e2m1[code] * (scale * double_scale), blocks along the last axis |
| exported FP8, INT8, MXFP8 | one a byte | code * scale |
| exported INT4 | uint8, even row low, two's complement | code * scale, blocks along the last axis |
| MXFP4 | uint8, even element low | e2m1[code] * 2 ** (scale - 127), blocks of 32 |
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from .._lazy import require

torch: Any = require("torch", "decode ModelOpt weights")

SLAB_WEIGHTS = 1 << 18
"""Weights decoded or packed at a time: few enough that what is made on the way stays in the cache."""
NF4 = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
       0.7230, 1.0)  # fmt: skip
"""ModelOpt's table; it is used rounded to bfloat16."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def int4(codes: Any, scale: Any, shape: Sequence[int], dtype: Any, block: int) -> Any:
    """INT4 codes of a weight of `shape`; `scale` holds 7 / largest for each block of the flat weight."""
    scale = scale.to(codes.device, torch.promote_types(scale.dtype, dtype)).reshape(-1, 1)
    out = torch.empty(math.prod(shape), dtype=dtype, device=codes.device)
    for first, last in _slabs(out.numel(), block):
        values = _nibbles(codes.reshape(-1)[first // 2 : -(-last // 2)], high_first=True).to(scale.dtype) - 8
        decoded = _blocks(values, block) / scale[first // block : -(-last // block)]
        out[first:last] = decoded.reshape(-1)[: last - first]
    return out.reshape(*shape)


def nf4(codes: Any, scale: Any, double_scale: Any, zeros: Any, shape: Sequence[int], dtype: Any, block: int) -> Any:
    """NF4 codes of a weight of `shape`. `scale` is int8 [scale blocks, their size], `double_scale` has one
    number for each of these rows, `zeros` one for all."""
    device = codes.device
    scale, double_scale, zeros = scale.to(device), double_scale.to(device), zeros.to(device)
    scale = scale.reshape(double_scale.numel(), -1)
    scales = ((scale / double_scale.reshape(-1, 1)).to(dtype) + zeros).reshape(-1, 1)
    table = torch.tensor(NF4, dtype=torch.bfloat16, device=device)
    out = torch.empty(math.prod(shape), dtype=dtype, device=device)
    for first, last in _slabs(out.numel(), block):
        values = table[_nibbles(codes.reshape(-1)[first // 2 : -(-last // 2)], high_first=True).int()]
        decoded = _blocks(values, block) * scales[first // block : -(-last // block)]
        out[first:last] = decoded.reshape(-1)[: last - first]
    return out.reshape(*shape)


def nvfp4(codes: Any, scale: Any, double_scale: Any, shape: Sequence[int], dtype: Any, block: int) -> Any:
    """NVFP4 codes [..., K / 2] with `scale` e4m3 [..., K / block] and `double_scale` of one number."""
    device = codes.device
    scale = scale.reshape(-1, 1)
    table = torch.tensor(E2M1, dtype=torch.float32, device=device)
    out = torch.empty(math.prod(shape), dtype=dtype, device=device)
    for first, last in _slabs(out.numel(), block):
        values = table[_nibbles(codes.reshape(-1)[first // 2 : last // 2], high_first=False).int()]
        per_block = scale[first // block : last // block].to(device, torch.float32) * double_scale.to(device)
        out[first:last] = (_blocks(values, block) * per_block).reshape(-1)
    return out.reshape(*shape)


def mxfp4(codes: Any, scale: Any, shape: Sequence[int], dtype: Any, block: int = 32) -> Any:
    """MXFP4 codes [..., K / 2] with `scale` uint8 [..., K / block]: exponents of two, 127 stands for 1."""
    powers = torch.exp2(scale.to(torch.float32) - 127)
    return nvfp4(codes, powers, torch.ones((), device=codes.device), shape, dtype, block)


def int4_rows(codes: Any, scale: Any, dtype: Any) -> Any:
    """Exported INT4: `codes` [N / 2, K] with rows 2n low and 2n + 1 high, `scale` [N, K / block]."""
    halves = torch.stack([codes & 15, codes >> 4], dim=1).reshape(-1, codes.shape[-1]).to(torch.int8)
    return exported(halves - ((halves & 8) << 1), scale, dtype)


def exported(codes: Any, scale: Any, dtype: Any) -> Any:
    """Codes [N, K] times `scale`: one number, one a row, or one a block; rounded once, to `dtype`.

    Blocks are [N / b, K / c] or [N / b, 1, K / c, 1]; those at the edges may be partial.
    """
    sizes = blocks_of(tuple(scale.shape), tuple(codes.shape))
    assert sizes is not None
    rows, columns = sizes
    scale = scale.to(codes.device, torch.float32).reshape(-(-codes.shape[0] // rows), -1)
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    step = max(SLAB_WEIGHTS // (codes.shape[1] * rows), 1) * rows
    for first in range(0, codes.shape[0], step):
        part = codes[first : first + step].to(torch.float32)
        factors = scale[first // rows : -(-(first + len(part)) // rows)]
        if rows > 1 and len(scale) > 1:
            factors = factors.repeat_interleave(rows, dim=0)[: len(part)]
        if columns > 1 and scale.shape[1] > 1:
            factors = factors.repeat_interleave(columns, dim=1)[:, : codes.shape[1]]
        out[first : first + step] = part * factors
    return out


def blocks_of(scales: Sequence[int], shape: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, by the shapes of the scales and the weight; `None`: they do not fit."""
    rows, columns = shape
    if math.prod(scales) == 1:
        return rows, columns
    if len(scales) == 4 and scales[1] == scales[3] == 1:
        scales = (scales[0], scales[2])
    if len(scales) == 1:
        scales = (scales[0], 1)
    if len(scales) != 2:
        return None
    found = [_block(count, size) for count, size in zip(scales, (rows, columns), strict=True)]
    return (found[0], found[1]) if found[0] and found[1] else None


def _block(count: int, size: int) -> int:
    """Length of `count` blocks along an axis of `size`; 128 where the last may be partial, 0 for none."""
    if count and -(-size // 128) == count:
        return 128 if count > 1 else size
    return size // count if count and size % count == 0 else 0


def _nibbles(packed: Any, *, high_first: bool) -> Any:
    """Two codes of each byte, in the order of the elements they stand for."""
    halves = [packed >> 4, packed & 15] if high_first else [packed & 15, packed >> 4]
    return torch.stack(halves, dim=-1).reshape(-1)


def _blocks(values: Any, block: int) -> Any:
    missing = -values.numel() % block
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.reshape(-1, block)


def _slabs(count: int, block: int) -> Iterator[tuple[int, int]]:
    step = max(SLAB_WEIGHTS // block, 1) * block
    for first in range(0, count, step):
        yield first, min(first + step, count)
