"""ModelOpt's weights that the engine has formats for: which these are, and what becomes of its arrays.

ModelOpt's layers compute scales and codes of FP8 and INT8 in the type of the weight, and quanto's layers
likewise, row by row. So the weights that share a scale are encoded as rows:

| quant_type | a scale for | format | rows |
|---|---|---|---|
| FP8, INT8 | the weight | `quanto:float8`, `quanto:int8` | all of it in one |
| FP8, INT8 | a row | the same | as they are |
| FP8, INT8 | a block of a row | the same | the blocks |
| NVFP4 in blocks of 16 | a block, and the weight | `modelopt:nvfp4` | as they are |

Where a block has scale 0, as its weights are zero or too small for their type, ModelOpt stores NaN or what a
processor makes of it. Here the scale is 1, and the codes are zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .._lazy import require

torch: Any = require("torch", "pack ModelOpt weights")

_ROWS = {"fp8": "quanto:float8", "int8": "quanto:int8"}


def form_of(plan: Any) -> tuple[str, tuple[int, int]] | None:
    """The format with the codes of a layer, and the matrix as which its weight is encoded; `None`: there is none."""
    shape, blocks = plan.shape, plan.blocks
    count, columns = math.prod(shape), shape[-1]
    if plan.kind == "nvfp4":
        return ("modelopt:nvfp4", (count // columns, columns)) if blocks == {-1: 16} else None
    if plan.kind not in _ROWS or not count:
        return None
    if blocks:
        size = blocks.get(-1, 0)
        fits = set(blocks) == {-1} and size and not columns % size
        return (_ROWS[plan.kind], (count // size, size)) if fits else None
    axis = plan.weight.get("axis")
    if axis is None:
        return _ROWS[plan.kind], (1, count)
    return (_ROWS[plan.kind], (shape[0], count // shape[0])) if axis in (0, (0,), [0]) else None


def is_whole(plan: Any, element_bytes: int) -> bool:
    """Whether all that a layer keeps of a weight follows from the engine's arrays. The largest magnitude, where it
    is kept, does so for NVFP4 of 16 bits: its scale is a quotient of more."""
    return element_bytes == 2 or (element_bytes == 4 and plan.kind != "nvfp4") if plan.blocks else False


def parts_of(plan: Any, found: Mapping[str, Any], dtype: Any) -> tuple[Any, dict[str, Any]]:
    """The codes of a weight of `dtype`, and its scales by the name of the buffer, from the engine's arrays."""
    if plan.kind == "nvfp4":
        second = found["weight_scale_2"]
        # What the scale was divided from is a number of `dtype`, so that rounding finds it.
        scales = {
            "_amax": (second * (6.0 * 448.0)).to(dtype),
            "_scale": found["weight_scale"].reshape(*plan.shape[:-1], -1),
            "_double_scale": second,
        }
        return found[""].reshape(*plan.shape[:-1], -1), scales
    codes, scale = found["_data"], found["_scale"]
    if not plan.blocks:
        per_row = plan.weight.get("axis") is not None and plan.shape[0] > 1
        return codes.reshape(plan.shape), {
            "_scale": scale.reshape((-1, *(1 for _ in plan.shape[1:])) if per_row else ())
        }
    empty = scale == 0
    if empty.any():
        codes.view(torch.uint8)[empty.reshape(-1)] = 0
        scale = scale.masked_fill(empty, 1)
    return codes.reshape(plan.shape), {"_scale": scale.reshape(*plan.shape[:-1], -1)}
