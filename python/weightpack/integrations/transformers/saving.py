"""What of a transformers model is stored, under which names, and the configs beside it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ..._lazy import require
from ...errors import ConfigError
from ...stored import Stored, distinct

_PURPOSE = "save its models"


def stored_tensors(model: Any, state: Mapping[str, Any]) -> list[Stored]:
    """`state` without tied parameters and what the class does not save."""
    ignored = set(model._keys_to_ignore_on_save or ())
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    kept = {}
    for name, tensor in state.items():
        source = state.get(tied.get(name, ""))
        is_tied = source is not None and source.data_ptr() == tensor.data_ptr() and source.shape == tensor.shape
        if name not in ignored and not is_tied:
            kept[name] = tensor
    return [Stored(name, tensor) for name, tensor in distinct(kept).items()]


def files(model: Any, quantizer: Any) -> dict[str, str]:
    """`config.json`, and for models that generate `generation_config.json`."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    if quantizer is not None:
        config.quantization_config = quantizer.config.to_dict()
    try:
        texts = {"config.json": config.to_json_string(use_diff=True)}
        if model.can_generate():
            generation = model.generation_config
            require("transformers", _PURPOSE)
            texts["generation_config.json"] = generation.to_json_string(use_diff=True)
    except TypeError as error:
        raise ConfigError(f"the config of {type(model).__name__} is no JSON: {error}") from error
    return texts
