"""What diffusers makes of a checkpoint, told by its own classes without loading a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..._lazy import require
from ..module_kinds import kind_of

_PURPOSE = "ask the model class for its linear layers"


def describe_layers(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Builds the class of `config` on the meta device and looks up each tensor of a checkpoint.

    Gives the same object as the transformers adapter. diffusers leaves no layer unpacked by
    default; the entries it adds to any skip list are those it keeps in float32.
    """
    torch = require("torch", _PURPOSE)
    diffusers = require("diffusers", _PURPOSE)
    name = str(config.get("_class_name"))
    cls = getattr(diffusers, name, None)
    if cls is None or not hasattr(cls, "from_config"):
        raise LookupError(f"diffusers has no model class {name}")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with torch.device("meta"):
        model = cls.from_config(plain)

    kinds = {path: _kind(torch, module) for path, module in model.named_modules()}
    fixed = sorted(cls._keep_in_fp32_modules or ())
    linears = sorted(path for path, kind in kinds.items() if kind == "linear")
    state = model.state_dict()
    return {
        "version": diffusers.__version__,
        "class": name,
        "prefix": "",
        "linears": linears,
        "skipped": {path: "layer that diffusers keeps in float32" for path in linears if _is_fixed(path, fixed)},
        "keep_in_fp32": fixed,
        "tensors": {tensor: _look_up(tensor, state, kinds) for tensor in tensors},
        "refusal": None,
    }


def _kind(torch: Any, module: Any) -> str:
    if isinstance(module, torch.nn.Linear):
        return "linear"
    return kind_of(torch, module)


def _is_fixed(path: str, fixed: list[str]) -> bool:
    from ...skip_list import skipped_by_diffusers

    return skipped_by_diffusers(fixed, path)


def _look_up(tensor: str, state: Mapping[str, Any], kinds: Mapping[str, str]) -> tuple[str, str]:
    module, _, leaf = tensor.rpartition(".")
    if tensor not in state:
        return "unknown", module
    if leaf != "weight":
        return "vector" if state[tensor].ndim <= 1 else "parameter", module
    return kinds.get(module, "other"), module
