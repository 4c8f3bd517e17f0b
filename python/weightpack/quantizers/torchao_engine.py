"""Weights that the engine packs as torchao does on a CPU: which configs these are, and torchao's tensor of them.

| config | what of it | format, after `torchao:` |
|---|---|---|
| `Int8WeightOnlyConfig` | rows, groups of a row | `int8` |
| `Int8DynamicActivationInt8WeightConfig` | rows, the whole range | `int8` |
| `IntxWeightOnlyConfig`, `Int8DynamicActivationIntxWeightConfig` | symmetric, 2 to 8 bits | `intx2` to `intx8` |
| `Float8WeightOnlyConfig` | E4M3: rows, groups of a row, the tensor | `float8`, `float8_tensor` |
| `Int4WeightOnlyConfig` | packing format `PLAIN`, `TINYGEMM` | `int4` |
| `NVFP4WeightOnlyConfig` | with a scale for the tensor | `nvfp4` |
| `MXDynamicActivationMXWeightConfig` | E4M3 or E2M1, blocks of 32, scales by `RCEIL` | `mxfp8`, `mxfp4` |

`int4` needs no MSLK to be packed; torchao multiplies with it where there is MSLK and a CUDA device.
What else a tensor of torchao's says of itself is taken from what torchao makes of a weight on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._lazy import require
from .base import Packing
from .torchao_weights import arrays_of, trial

_PURPOSE = "pack weights for torchao"

_AXES = {"PerRow": ("dim", -1), "PerAxis": ("axis", 0)}
"""Granularities of a scale for each row, and the axis that they have to name."""


def packing_of(config: Any) -> Packing | None:
    """The format and its choices, `None` where packing is torchao's own work."""
    find = _FORMATS.get(type(config).__name__)
    return None if find is None else find(config)


def is_packed_without_kernels(config: Any) -> bool:
    """Whether torchao packs by `config` only where it has the kernels that multiply, and the engine anywhere."""
    chosen = packing_of(config)
    return chosen is not None and chosen.format == "torchao:int4"


def pack(weight: Any, config: Any) -> Any:
    """torchao's tensor of a matrix of finite weights in memory, `None` where that is torchao's own work."""
    from ..formats_ import quantize

    chosen = packing_of(config)
    if chosen is None or weight.device.type != "cpu" or weight.dim() != 2 or weight.element_size() > 4:
        return None
    like = _like(config, tuple(weight.shape), weight.dtype)
    if isinstance(like, Exception):
        return None
    return _filled(like, quantize(weight.detach(), chosen.format, **chosen.params))


def assembled(config: Any, arrays: Mapping[str, Any], shape: tuple[int, ...], dtype: Any) -> Any:
    """torchao's tensor of arrays that the engine packed, for a weight of `shape` and `dtype`."""
    like = _like(config, shape, dtype)
    if isinstance(like, Exception):
        raise like
    return _filled(like, arrays)


def _like(config: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """What torchao makes of a weight on the meta device, or the error that says why it cannot."""
    if type(config).__name__ != "Int4WeightOnlyConfig" or shape[1] % int(config.group_size):
        return trial(config, shape, dtype, "meta")
    # torchao makes none without MSLK.
    torch = require("torch", _PURPOSE)
    (rows, columns), group = shape, int(config.group_size)
    with torch.device("meta"):
        codes = torch.empty(rows, columns // 2, dtype=torch.int8)
        scale, zero_point = (torch.empty(columns // group, rows, dtype=dtype) for _ in range(2))
    kind = require("torchao.quantization", _PURPOSE).Int4Tensor
    return kind(codes, scale, zero_point, block_size=[1, group], shape=torch.Size(shape))


def _filled(like: Any, arrays: Mapping[str, Any]) -> Any:
    """A tensor as `like`, which is on the meta device, with these arrays."""
    own = {name: arrays[name].reshape(array.shape) for name, array in arrays_of(like).items()}
    return type(like).__tensor_unflatten__(own, like.__tensor_flatten__()[1], like.shape, like.stride())


def _grouped(granularity: Any, format: str) -> Packing | None:
    """`format` with a scale for each row or group, as a granularity of torchao says."""
    kind = type(granularity).__name__
    if kind in _AXES:
        attribute, axis = _AXES[kind]
        return Packing(format) if getattr(granularity, attribute, axis) == axis else None
    return Packing(format, {"block_size": int(granularity.group_size)}) if kind == "PerGroup" else None


def _int8(config: Any) -> Packing | None:
    return _grouped(config.granularity, "torchao:int8")


def _int8_dynamic(config: Any) -> Packing | None:
    # A list of two granularities, for activations and weights, is torchao's own work.
    return None if config.reduce_range else _grouped(config.granularity, "torchao:int8")


def _intx(config: Any) -> Packing | None:
    return _whole_numbers(config, config.granularity, config.mapping_type, config.scale_dtype)


def _intx_dynamic(config: Any) -> Packing | None:
    return _whole_numbers(config, config.weight_granularity, config.weight_mapping_type, config.weight_scale_dtype)


def _whole_numbers(config: Any, granularity: Any, mapping: Any, scale_dtype: Any) -> Packing | None:
    bits = str(config.weight_dtype).removeprefix("torch.int")
    is_plain = (
        getattr(mapping, "name", None) == "SYMMETRIC"
        and scale_dtype is None
        and _name(config.intx_packing_format) == "unpacked_to_int8"
        and _name(config.intx_choose_qparams_algorithm) == "affine"
    )
    return _grouped(granularity, f"torchao:intx{bits}") if is_plain and bits != "1" else None


def _name(member: Any) -> str:
    """The name of a choice, which may be a member of an enumeration."""
    return str(getattr(member, "value", member))


def _float8(config: Any) -> Packing | None:
    if str(config.weight_dtype) != "torch.float8_e4m3fn":
        return None
    whole = type(config.granularity).__name__ == "PerTensor"
    return Packing("torchao:float8_tensor") if whole else _grouped(config.granularity, "torchao:float8")


def _nvfp4(config: Any) -> Packing | None:
    return Packing("torchao:nvfp4") if getattr(config, "use_dynamic_per_tensor_scale", False) else None


def _int4(config: Any) -> Packing | None:
    is_plain = _name(config.int4_packing_format) == "plain"
    is_plain = is_plain and _name(config.int4_choose_qparams_algorithm) == "tinygemm"
    return Packing("torchao:int4", {"block_size": int(config.group_size)}) if is_plain else None


def _mx(config: Any) -> Packing | None:
    codes = {"torch.float8_e4m3fn": "torchao:mxfp8", "torch.float4_e2m1fn_x2": "torchao:mxfp4"}
    chosen = codes.get(str(config.weight_dtype))
    return Packing(chosen) if chosen and config.block_size == 32 and config.scaling_mode.name == "RCEIL" else None


_FORMATS = {
    "Int8WeightOnlyConfig": _int8,
    "Int8DynamicActivationInt8WeightConfig": _int8_dynamic,
    "IntxWeightOnlyConfig": _intx,
    "Int8DynamicActivationIntxWeightConfig": _intx_dynamic,
    "Float8WeightOnlyConfig": _float8,
    "Int4WeightOnlyConfig": _int4,
    "NVFP4WeightOnlyConfig": _nvfp4,
    "MXDynamicActivationMXWeightConfig": _mx,
}
