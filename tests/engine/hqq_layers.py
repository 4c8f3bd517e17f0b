"""Layers as hqq's `HQQLinear.state_dict` stores them, by the published formula, written here in full."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ..conftest import Tensor

TYPES = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32)}
PACKINGS = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
SHARING = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def stored(dtype: str, array: Any) -> Tensor:
    array = np.asarray(array)
    return dtype, list(array.shape), array.tobytes()


def packed_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Lines of codes: those that share a byte or word lie as far apart as can be, the first in the highest bits."""
    sharing = SHARING[bits]
    codes = np.pad(codes, ((0, -len(codes) % sharing), (0, 0))).astype(np.uint32)
    rows = len(codes) // sharing
    result = np.zeros((rows, codes.shape[1]), np.uint32)
    for part in range(sharing):
        result |= codes[part * rows : (part + 1) * rows] << (bits * (sharing - 1 - part))
    return result.view(np.int32) if bits == 3 else result.astype(np.uint8)


def layer(
    seed: int,
    rows: int,
    columns: int,
    bits: int = 4,
    group: int = 64,
    axis: int = 1,
    scale: str = "BF16",
    as_float: bool = False,
) -> tuple[np.ndarray, dict[str, Tensor]]:
    """The weight in float64, and the layer's arrays by the last segment of their names."""
    rng = np.random.default_rng(seed)
    groups = rows * columns // group
    codes = rng.integers(0, 1 << bits, (groups, group) if axis == 1 else (group, groups))
    of_groups = (groups, 1) if axis == 1 else (1, groups)
    scales = (rng.standard_normal(of_groups) * 0.02).astype(TYPES[scale])
    zeros = (rng.random(of_groups) * (1 << bits)).astype(TYPES[scale])
    weights = ((codes - zeros.astype(np.float64)) * scales.astype(np.float64)).reshape(rows, columns)
    array = packed_codes(codes, bits)
    kept = ("I32" if bits == 3 else "U8", array)
    if as_float:
        kept = (scale, array.view(TYPES[scale]))
    return weights, {"W_q": stored(*kept), "scale": stored(scale, scales), "zero": stored(scale, zeros)} | record(
        {"F16": "torch.float16", "BF16": "torch.bfloat16", "F32": "torch.float32"}[scale],
        nbits=bits,
        group_size=group,
        axis=axis,
        packing=PACKINGS[bits],
        view_as_float=as_float,
        shape=(rows, columns),
        unpack_view_dtype="torch.int32" if bits == 3 else "torch.uint8",
    )


def record(compute_dtype: str, **told: Any) -> dict[str, Tensor]:
    """What a layer says of itself: texts, numbers and yes or no as arrays."""
    more = {"quant_scale": False, "quant_zero": False, "offload_meta": False, "encoded_state_dict": True}
    more |= {"stores_quant_config": True, "channel_wise": True, "optimize": True, "round_zero": False}
    return {name: encoded(value) for name, value in (told | more | {"compute_dtype": compute_dtype}).items()}


def encoded(value: Any) -> Tensor:
    match value:
        case bool():
            return stored("U8", np.uint8(value))
        case int():
            return stored("I32", np.int32(value))
        case str():
            return stored("U8", np.frombuffer(value.encode(), np.uint8))
        case _:
            return stored("I64", np.array(value, np.int64))


def section(**weights: Any) -> Mapping[str, Any]:
    """The section `quantization_config` that transformers writes."""
    params = {"nbits": 4, "channel_wise": True, "group_size": 64, "optimize": True, "round_zero": False, "axis": 1}
    quant = {"weight_quant_params": params | {"view_as_float": False} | weights, "offload_meta": False}
    quant |= {"scale_quant_params": None, "zero_quant_params": None}
    return {"quant_config": quant, "quant_method": "hqq", "skip_modules": ["lm_head"]}
