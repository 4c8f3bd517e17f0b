"""Which tensors of a model transformers keeps in float32."""

from __future__ import annotations

from typing import Any

from ..._lazy import require

_PURPOSE = "load its models"


def float32_names(model: Any, torch_dtype: Any) -> list[str]:
    """The parameters and buffers that transformers' own plan puts in float32 beside others of `torch_dtype`."""
    plan = model._get_dtype_plan(torch_dtype)
    if not plan:
        return []
    build = require("transformers.core_model_loading", _PURPOSE).build_glob_alternation
    pattern = build(list(plan))[0]
    return [name for name in state_of(model) if pattern.search(name)]


def state_of(model: Any) -> dict[str, Any]:
    """Parameters and persistent buffers themselves, by name."""
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    return state
