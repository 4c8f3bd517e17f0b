"""torchao: one 8-bit format for all packed weights.

Hosts find the packed weights by the metadata of the safetensors files, which names the class and the
attributes of each, and plain tensors too; the skip list plays no part in loading. The section and the
metadata are those that transformers 5.23 and diffusers 0.42.1 write with torchao 0.18, in every shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from ..decision import Decision, Target
from ..entry import Entry
from .table import HostConfig, backend_of, one_format, packed_of

__all__ = ["FORMATS", "METHODS", "describes", "host_config", "leftovers", "one_kind", "settle"]

METHODS = ("torchao",)
FORMATS = ("torchao:",)

_PER_ROW = {"_data": {"dim": -1}, "_type": "PerRow", "_version": 1}
_CONFIGS: dict[str, dict[str, Any]] = {
    "torchao:int8": {
        "_data": {"granularity": _PER_ROW, "group_size": None, "set_inductor_config": True},
        "_type": "Int8WeightOnlyConfig",
        "_version": 2,
    },
    "torchao:float8": {
        "_data": {
            "granularity": _PER_ROW,
            "set_inductor_config": True,
            "weight_dtype": {"_data": "float8_e4m3fn", "_type": "torch.dtype"},
        },
        "_type": "Float8WeightOnlyConfig",
        "_version": 2,
    },
}
"""torchao's configs with all their fields."""
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}
_ARRAYS = ("_qdata", "_scale_and_zero", "_per_tensor_scale")
"""Ends of names that no plain tensor has."""


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
        "quant_type": {"default": _CONFIGS[packed_of(decisions)[0].result]},
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
    entry = decision.entry
    block: dict[str, Any] = {"block_size": [1, entry.shape[-1]]}
    dtype = {"dtype": {"_type": "torch.dtype", "_data": _computed(entry, decision)}}
    none: dict[str, Any] = {"act_quant_kwargs": None}
    if decision.result == "torchao:int8":
        return {
            "_type": "Int8Tensor",
            "_data": {**none, "reduce_range": False, **block, **dtype},
            "_tensor_data_names": ["zero_point", "qdata", "scale"],
        }
    kernels = {"kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"}}
    return {
        "_type": "Float8Tensor",
        "_data": {**block, "mm_config": None, **none, **kernels, **dtype},
        "_tensor_data_names": ["qdata", "scale"],
    }


def _computed(entry: Entry, decision: Decision) -> str:
    """torch's name of the type that the weight is packed from."""
    return _DTYPES.get(str(decision.params.get("dtype", entry.dtype)), "float32")
