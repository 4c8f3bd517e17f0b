"""Models that transformers packed by itself, with its own quantizers: what is known of them for saving."""

from __future__ import annotations

from typing import Any

from ..._lazy import require
from ...errors import ConfigError
from ...quantizers.auto import AutoQuantizer
from ...quantizers.base import Quantizer

_PURPOSE = "save its models"
_KNOWN = ("bitsandbytes_4bit", "bitsandbytes_8bit", "torchao")
"""Backends whose own layers hold the arrays that files hold."""


def quantizer_for(model: Any) -> Quantizer | None:
    """A quantizer that says of a model which transformers packed how it is stored; `None` where nobody but
    transformers knows.

    Raises `ConfigError` for weights that bitsandbytes has rearranged for the processor: its way back gives
    their scales in another order (bitsandbytes-foundation/bitsandbytes#2078).
    """
    try:
        made = AutoQuantizer.from_config(model.hf_quantizer.quantization_config)
    except ConfigError:
        return None
    if made.name not in _KNOWN:
        return None
    made.torch_dtype = model.dtype
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or not _is_packed(made, weight):
            continue
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ConfigError(
                f'bitsandbytes has rearranged "{path}.weight" for this processor, and does not bring it back whole',
                hint="save before the first forward pass, or load the model with weightpack.from_pretrained",
            )
        made.quantized[path] = type(module)
    return made


def _is_packed(quantizer: Quantizer, weight: Any) -> bool:
    if quantizer.name == "torchao":
        found: bool = require("weightpack.quantizers.torchao_weights", _PURPOSE).is_packed(weight)
        return found
    kinds = require("bitsandbytes.nn", _PURPOSE)
    return isinstance(weight, kinds.Params4bit | kinds.Int8Params)
