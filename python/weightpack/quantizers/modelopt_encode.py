"""Nearest codes of NF4 and E2M1, as ModelOpt 0.47 chooses them, without its arrays of distances.

ModelOpt takes all 16 distances of each number for NF4, in the number's own type, and the first of the
smallest; for E2M1 it compares with the bounds between values, ties to the even code.
"""

from __future__ import annotations

import functools
from typing import Any

from .._lazy import require
from .modelopt_decode import NF4

torch: Any = require("torch", "pack ModelOpt weights")


def nf4_codes(values: Any) -> Any:
    """Codes (uint8) of numbers from -1 to 1, in the shape of `values`."""
    if values.element_size() == 2:
        return _nf4_of_every(values.dtype)[values.contiguous().view(torch.int16).int() + 32768]
    table = torch.tensor(NF4, dtype=torch.bfloat16).to(values.dtype)
    above = torch.searchsorted(table, values.contiguous(), out_int32=True).clamp_(1, 15)
    is_above = (values - table[above]).abs() < (values - table[above - 1]).abs()
    return (above - 1 + is_above).to(torch.uint8)


@functools.cache
def _nf4_of_every(dtype: Any) -> Any:
    """The code of every number that a type of two bytes has, from the bits -32768 on."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    table = torch.tensor(NF4, dtype=torch.bfloat16).to(dtype)
    return (every[:, None] - table).abs().argmin(dim=-1).to(torch.uint8)


def e2m1_codes(values: Any) -> Any:
    """Codes (uint8, the sign in bit 3) of float32 numbers, beyond 6 those of 6, in the shape of `values`."""
    size = values.abs()
    # Steps of a half, of one and of two; `round` takes ties to even.
    codes = (size * 0.5).round_().add_(4).clamp_(max=7)
    codes = torch.where(size < 4, size.round().add_(2), codes)
    codes = torch.where(size < 2, size.mul_(2).round_(), codes).to(torch.uint8)
    return codes | ((values < 0).to(torch.uint8) << 3)
