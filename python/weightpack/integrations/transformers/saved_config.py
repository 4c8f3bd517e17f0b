"""`config.json` and `generation_config.json` of a model, as transformers writes them."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from ..._lazy import require
from ...errors import ConfigError
from ...skip_list import is_skipped, settle

_PURPOSE = "save its models"
_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert")


def files(model: Any, quantizer: Any) -> dict[str, str]:
    """The texts by name. The model and its config stay as they are."""
    config = copy.deepcopy(model.config)
    config.dtype = str(_dtype(model, quantizer)).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    # Where the weights were read from.
    config.__dict__.pop("transformers_weights", None)
    if quantizer is not None:
        config.quantization_config = quantization_config(model, quantizer)
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        texts = {"config.json": config.to_json_string(use_diff=True)}
        generation = getattr(model, "generation_config", None)
        if model.can_generate() and generation is not None:
            texts["generation_config.json"] = generation.to_json_string(use_diff=True, keys_to_pop=["compile_config"])
    except TypeError as error:
        raise ConfigError(f"the config of {type(model).__name__} is no JSON: {error}") from error
    return texts


def quantization_config(model: Any, quantizer: Any) -> dict[str, Any]:
    """The section on packing. Its list of modules that are not packed is such that transformers takes the packed
    layers for packed, and no others: a list of one's own takes the place of its defaults there
    (huggingface/transformers#45734)."""
    section: dict[str, Any] = quantizer.config.to_dict()
    for key in _LISTS:
        if key in section:
            section[key] = _skip_list(model, quantizer, section[key])
    return section


def _skip_list(model: Any, quantizer: Any, given: Sequence[str] | None) -> list[str] | None:
    """`given` where transformers reads it so, else a list of whole paths."""
    packed = set(quantizer.quantized)
    kinds = _linear(quantizer)
    left = {path for path, module in model.named_modules() if type(module) in kinds and path not in packed}
    fixed = sorted(model._keep_in_fp32_modules or ())
    default = require("transformers.quantizers.base", _PURPOSE).get_keys_to_not_convert
    entries = [*(default(model) if given is None else given), *fixed]
    skipped = {path for path in packed | left if is_skipped("transformers", entries, path)}
    if skipped == left:
        return None if given is None else list(given)
    found, caught = settle("transformers", packed, left, fixed=fixed, prefix=model.base_model_prefix)
    return [f"^{re.escape(path)}$" for path in sorted(left)] if caught else found


def _linear(quantizer: Any) -> tuple[type, ...]:
    """The layers that transformers packs with this backend."""
    linear = require("torch", _PURPOSE).nn.Linear
    if not quantizer.name.startswith("bitsandbytes"):
        return (linear,)
    return linear, require("transformers.pytorch_utils", _PURPOSE).Conv1D


def _dtype(model: Any, quantizer: Any) -> Any:
    """The type of what is not packed."""
    found = model.dtype
    if quantizer is not None and found.itemsize == 1 and quantizer.torch_dtype is not None:
        return quantizer.torch_dtype
    return found
