"""What ModelOpt keeps beside the weights of a model that it compressed: `modelopt_state.pth`.

It lists what was done to the model, and how each quantizer ended up. With it ModelOpt restores a model by
itself: `mto.enable_huggingface_checkpointing()` and the host's `from_pretrained`, or
`mto.restore_from_modelopt_state` before the weights are loaded. Measured with ModelOpt 0.47 on CPU: its own
files and these load alike, `torch.load(weights_only=True)` reads both, and outputs are the same.

ModelOpt makes quantizers for all layers that it knows, packed or not, and refuses a list that lacks some.
So a model without weights goes through its own conversion, and the packed layers are put in after that.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from .._lazy import require
from ..errors import ConfigError

FILE = "modelopt_state.pth"
_PURPOSE = "describe a model for ModelOpt"


def made_for(skeleton: Any, model: Any, plans: Mapping[str, Any]) -> dict[str, Any]:
    """The state of `model`, whose packed layers `plans` describes; `skeleton` is such a model with ordinary
    layers on the meta device, and is changed.

    Raises `ConfigError` for packed layers that ModelOpt does not restore: convolutions, and NF4 with more
    scales than one block of them, which it cannot decode.
    """
    from .modelopt_layers import quiet

    for path, plan in plans.items():
        if len(plan.shape) != 2:
            raise ConfigError(f'"{path}" is a convolution, which ModelOpt does not restore packed')
        if plan.kind == "nf4" and model.get_submodule(path).weight_quantizer._double_scale.numel() > 1:
            raise ConfigError(f'"{path}" is packed as NF4 with several blocks of scales, which ModelOpt cannot decode')
    optimise = require("modelopt.torch.opt", _PURPOSE)
    modes = require("modelopt.torch.quantization.mode", _PURPOSE)
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for path, plan in plans.items():
        for name, chosen in plan.chosen.items():
            if chosen is not None:
                entries.append({"quantizer_name": f"{path}.{name}", "cfg": dict(chosen)})
    config = {"quant_cfg": entries, "algorithm": "max"}
    with quiet():
        optimise.apply_mode(skeleton, [("quantize", config)], registry=modes.QuantizeModeRegistry)
    state: dict[str, Any] = optimise.modelopt_state(skeleton)
    ((name, converted),) = state["modelopt_state_dict"]
    calibrated = copy.deepcopy(converted["metadata"]["quantizer_state"])
    real, tensors = {}, {}
    for path in plans:
        layer = model.get_submodule(path)
        for leaf in ("weight_quantizer", "input_quantizer"):
            calibrated[f"{path}.{leaf}"] = _before(getattr(layer, leaf).get_modelopt_state())
        real[path] = layer.weight_quantizer.get_modelopt_state()
        tensors[path] = _of_modelopt(layer.weight.get_state())
    state["modelopt_state_dict"] = [
        (name, converted),
        ("max_calibrate", {"config": {"method": "max"}, "metadata": {"quantizer_state": calibrated}}),
        (
            "real_quantize",
            {
                "config": {"compress": {"*": True}, "quant_gemm": False},
                "metadata": {"real_quantizer_state": real, "q_tensor_state": tensors},
            },
        ),
    ]
    return state


def _before(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a quantizer before its weight was packed: it knows the range alone."""
    found = {**copy.deepcopy(state), "_fake_quant": True, "_dequantize": False}
    known = found["_pytorch_state_metadata"]
    known["buffers"] = {name: value for name, value in known["buffers"].items() if name in ("_amax",)}
    return found


def _of_modelopt(state: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a packed weight with ModelOpt's own class in place of one that is based on it."""
    kind = state["metadata"]["qtensor_class"]
    own = next(base for base in kind.__mro__ if base.__module__.startswith("modelopt."))
    return {**state, "metadata": {**state["metadata"], "qtensor_class": own}}
