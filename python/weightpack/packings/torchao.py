"""torchao: one format for all packed weights.

Hosts find the packed weights by the metadata of the safetensors files, which names the class and the
attributes of each, and plain tensors too; the skip list plays no part in loading. The section and the
metadata are those that transformers 5.23 and diffusers 0.42.1 write with torchao 0.18, in every shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..decision import OPTIONS, Decision, Target
from ..entry import Part
from ..targets import COPY
from .table import HostConfig, backend_of, one_format, packed_of

__all__ = ["FORMATS", "METHODS", "describes", "host_config", "leftovers", "one_kind", "settle"]

METHODS = ("torchao",)
FORMATS = ("torchao:",)

_KERNELS = {"_type": "KernelPreference", "_data": "AUTO"}
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}
_INT4_GROUP = 128
"""Weights of a row that share a scale in packed 4-bit weights, unless something else is asked for."""
_ARRAYS = ("_qdata", "_scale_and_zero", "_per_tensor_scale")
"""Ends of names that no plain tensor has."""


@dataclass(frozen=True)
class _Kind:
    """How torchao describes one format.

    `config` is the name of its config, `version` of the config's layout, and `fields` gives all of the
    config's fields for a packed weight; `tensor` is the class of such a weight, `attributes` gives those of
    the class, in its order, and `arrays` the names of its arrays.
    """

    config: str
    version: int
    fields: Callable[[Decision], dict[str, Any]]
    tensor: str
    attributes: Callable[[Decision], dict[str, Any]]
    arrays: tuple[str, ...]


def one_kind(decisions: list[Decision], target: Target) -> list[Decision]:
    """One config describes one format."""
    return one_format(decisions, target, "torchao")


def settle(
    host: str | None,
    packed: Iterable[str],
    kept: Iterable[str],
    *,
    fixed: Sequence[str] = (),
    prefix: str = "",
) -> tuple[list[str], dict[str, str]]:
    """No list, and no layer that must be left unpacked: the metadata says what is packed."""
    return [], {}


def host_config(decisions: Sequence[Decision], skip_list: Sequence[str], compute: str, host: str | None) -> HostConfig:
    """The section, and in the files' metadata a description of each tensor."""
    section: dict[str, Any] = {
        "modules_to_not_convert": list(skip_list) or None,
        "quant_method": "torchao",
        # A layer whose rows are one group each does not tell whether others have more.
        "quant_type": {"default": _config(max(packed_of(decisions), key=_has_groups))},
    }
    if host != "diffusers":
        section |= {"include_input_output_embeddings": False, "untie_embedding_weights": False}
    metadata = {decision.entry.name: json.dumps(_described(decision)) for decision in decisions}
    metadata["tensor_names"] = json.dumps([decision.entry.name for decision in decisions])
    return HostConfig(dict(sorted(section.items())), metadata=metadata)


def leftovers(names: Iterable[str]) -> list[str]:
    """Codes, and scales that only torchao has."""
    return [name for name in names if name.rpartition(".")[2].startswith("_") and name.endswith(_ARRAYS)]


def describes(key: str, value: str) -> bool:
    """The list of tensors, and what JSON says of the class of each."""
    if key == "tensor_names":
        return True
    try:
        found = json.loads(value)
    except ValueError:
        return False
    return isinstance(found, dict) and "_type" in found


def _described(decision: Decision) -> dict[str, Any]:
    """What torchao's `flatten_tensor_state_dict` says of a tensor."""
    if backend_of(decision.result) is None:
        return {"_type": "Tensor"}
    kind = _KINDS[decision.result]
    return {"_type": kind.tensor, "_data": kind.attributes(decision), "_tensor_data_names": list(kind.arrays)}


def _config(decision: Decision) -> dict[str, Any]:
    """torchao's config of a packed weight, with all its fields."""
    kind = _KINDS[decision.result]
    return {"_data": kind.fields(decision), "_type": kind.config, "_version": kind.version}


def _dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


def _computed(decision: Decision) -> dict[str, str]:
    """The type that the weight is packed from."""
    return _dtype(_DTYPES.get(str(decision.params.get("dtype", decision.entry.dtype)), "float32"))


def _scale(decision: Decision) -> Part | None:
    """The stored scales of a weight that is copied as it is packed."""
    if decision.format != COPY:
        return None
    return next((part for part in decision.entry.parts if part.name.endswith("_scale")), None)


def _group(decision: Decision) -> int | None:
    """Weights of a row that share a scale; `None` where all do."""
    scale = _scale(decision)
    if scale is None:
        return cast("int | None", decision.params.get("block_size"))
    columns, groups = decision.entry.shape[-1], scale.shape[-1]
    return None if groups == 1 else columns // groups


def _int4_group(decision: Decision) -> int:
    """Weights of a row that share a scale, in the format that has scales column by column."""
    scale = _scale(decision)
    if scale is not None:
        return decision.entry.shape[-1] // scale.shape[0]
    return cast("int | None", decision.params.get("block_size")) or _INT4_GROUP


def _has_groups(decision: Decision) -> bool:
    """Whether a weight of a format that can have groups is divided into some."""
    return decision.result in OPTIONS["group_size"] and _group(decision) is not None


def _block(decision: Decision) -> list[int]:
    """The block of weights that share a scale, where that is a row or a part of one."""
    return [1, _group(decision) or decision.entry.shape[-1]]


def _granularity(kind: str, **fields: int) -> dict[str, Any]:
    return {"_type": kind, "_version": 1, "_data": fields}


def _in_groups(decision: Decision, otherwise: dict[str, Any]) -> dict[str, Any]:
    """The granularity of a weight in groups, or of one whose rows are not divided."""
    group = _group(decision)
    return otherwise if group is None else _granularity("PerGroup", group_size=group)


def _scale_type(decision: Decision) -> dict[str, str] | None:
    """The type of the scales, where it is not that of the weights."""
    scale = _scale(decision)
    if scale is None or scale.dtype == decision.entry.dtype:
        return None
    return _dtype(_DTYPES.get(scale.dtype, "float32"))


def _float8(granularity: Callable[[Decision], dict[str, Any]], block: Callable[[Decision], list[int]]) -> _Kind:
    return _Kind(
        config="Float8WeightOnlyConfig",
        version=2,
        fields=lambda d: {
            "granularity": granularity(d),
            "set_inductor_config": True,
            "weight_dtype": _dtype("float8_e4m3fn"),
        },
        tensor="Float8Tensor",
        attributes=lambda d: {
            "block_size": block(d),
            "mm_config": None,
            "act_quant_kwargs": None,
            "kernel_preference": _KERNELS,
            "dtype": _computed(d),
        },
        arrays=("qdata", "scale"),
    )


def _microscaling(codes: str) -> _Kind:
    """A format of blocks with powers of two, for weights and activations; torchao has it for bfloat16 only."""
    shared = {"block_size": 32, "scaling_mode": {"_type": "ScaleCalculationMode", "_data": "RCEIL"}}
    shared["kernel_preference"] = _KERNELS
    activations = {"elem_dtype": _dtype(codes), **shared, "is_swizzled_scales": True}
    return _Kind(
        config="MXDynamicActivationMXWeightConfig",
        version=1,
        fields=lambda _: {"activation_dtype": _dtype(codes), "weight_dtype": _dtype(codes), **shared},
        tensor="MXTensor",
        attributes=lambda d: {
            "elem_dtype": _dtype(codes),
            "block_size": 32,
            "orig_dtype": _computed(d) if d.format == "copy" else _dtype("bfloat16"),
            "kernel_preference": _KERNELS,
            "act_quant_kwargs": {"_type": "QuantizeTensorToMXKwargs", "_data": activations},
            "is_swizzled_scales": True,
        },
        arrays=("qdata", "scale"),
    )


def _intx(bits: int) -> _Kind:
    return _Kind(
        config="IntxWeightOnlyConfig",
        version=2,
        fields=lambda d: {
            "weight_dtype": _dtype(f"int{bits}"),
            "granularity": _in_groups(d, _granularity("PerAxis", axis=0)),
            "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
            "scale_dtype": _scale_type(d),
            "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
            "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
        },
        tensor="IntxUnpackedToInt8Tensor",
        attributes=lambda d: {
            "target_dtype": _dtype(f"int{bits}"),
            "block_size": _block(d),
            "dtype": _computed(d),
            "activation_quantization": None,
        },
        arrays=("qdata", "scale", "zero_point"),
    )


_PER_ROW = _granularity("PerRow", dim=-1)
_KINDS = {
    "torchao:int8": _Kind(
        config="Int8WeightOnlyConfig",
        version=2,
        fields=lambda d: {
            "granularity": _in_groups(d, _PER_ROW),
            "group_size": None,
            "set_inductor_config": True,
        },
        tensor="Int8Tensor",
        attributes=lambda d: {
            "act_quant_kwargs": None,
            "reduce_range": False,
            "block_size": _block(d),
            "dtype": _computed(d),
        },
        arrays=("zero_point", "qdata", "scale"),
    ),
    **{f"torchao:intx{bits}": _intx(bits) for bits in range(2, 9)},
    "torchao:int4": _Kind(
        config="Int4WeightOnlyConfig",
        version=2,
        fields=lambda d: {
            "group_size": _int4_group(d),
            "set_inductor_config": True,
            "int4_packing_format": {"_type": "Int4PackingFormat", "_data": "PLAIN"},
            "int4_choose_qparams_algorithm": {"_type": "Int4ChooseQParamsAlgorithm", "_data": "TINYGEMM"},
            "int4_tile_packed_ntile": 8,
        },
        tensor="Int4Tensor",
        attributes=lambda d: {
            "activation_dtype": _dtype("bfloat16"),
            "block_size": [1, _int4_group(d)],
            "shape": list(d.entry.shape),
        },
        arrays=("qdata", "scale", "zero_point"),
    ),
    "torchao:float8": _float8(lambda d: _in_groups(d, _PER_ROW), _block),
    "torchao:float8_tensor": _float8(lambda _: _granularity("PerTensor"), lambda d: list(d.entry.shape)),
    "torchao:nvfp4": _Kind(
        config="NVFP4WeightOnlyConfig",
        version=1,
        fields=lambda _: {"use_dynamic_per_tensor_scale": True},
        tensor="NVFP4Tensor",
        attributes=lambda d: {
            "is_swizzled_scales": True,
            "use_triton_kernel": False,
            "act_quant_kwargs": None,
            "block_size": 16,
            "orig_dtype": _computed(d),
        },
        arrays=("per_tensor_scale", "qdata", "scale"),
    ),
    "torchao:mxfp8": _microscaling("float8_e4m3fn"),
    "torchao:mxfp4": _microscaling("float4_e2m1fn_x2"),
}
"""By format."""
