"""NVIDIA ModelOpt: FP8, INT8, INT4, NF4 and NVFP4 weights, in the layers of ModelOpt 0.44 and later.

| quant_type | packed as | default scale |
|---|---|---|
| FP8 | e4m3 codes | one for the weight; `channel_quantize=0`: one a row; `block_quantize`: one a block |
| INT8 | int8 codes | the same choices |
| INT4 | two codes a byte, even element high | one for 128 weights |
| NF4 | two codes a byte, even element high | one for 64 weights, itself int8 in blocks of 256 |
| NVFP4 | two e2m1 codes a byte, even element low | one e4m3 for 16 weights, times one for the weight |

Each layer that the skip list leaves becomes ModelOpt's own, on its own: nothing else of the model is
touched. Weights are packed one by one as they come from the file: by the engine's formats what `modelopt_engine`
lists, other forms by ModelOpt's classes, a few million numbers at a time; the result holds the bytes of
`mtq.quantize` and `mtq.compress`. A checkpoint so
saved is read back from its `config.json`: no `modelopt_state.pth` is needed, and none is unpickled. The
largest magnitude of each block, which ModelOpt keeps besides its scale, is left out.

What differs from ModelOpt 0.47, and from diffusers 0.42.1 with it:

- diffusers' config class cannot be made with ModelOpt 0.44 and later (NVIDIA/Model-Optimizer#2001), its
  skip list fails there, and its layers stay half converted, so that the forward is a TypeError.
- An unknown `quant_type` is an error, and not FP8 with a warning; a skip list is not written into.
- NF4 weights of more than one block of scales cannot be decoded by ModelOpt 0.47; here they are.
- Zero rows and weights give zeros where ModelOpt 0.47 stores NaN; what is not finite is refused.

Checkpoints in the form that vLLM, TensorRT-LLM and SGLang read are those of `modelopt_export`; models
packed here are saved so with `form="unified"`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .._lazy import require
from ..errors import BackendError, ConfigError
from .base import Exported, Packing, Quantizer, Requirement
from .config import QuantizationConfig, flag, names_of, one_of
from .dtypes import stored_name, torch_dtype
from .modelopt_entries import default_entries, normalised, own_entries, refuse_bare_codes

WEIGHTS = ("FP8", "INT8", "INT4", "NF4", "NVFP4")
ACTIVATIONS = ("FP8", "INT8", "INT4", "NVFP4")
"""NF4 has no activations: ModelOpt knows it for weights alone."""
_SCALED_TWICE = ("NF4", "NVFP4")
_EXPORT_KEYS = ("quant_algo", "config_groups", "quantization")
_STORED = ("weight_quantizer", "input_quantizer")
_PURPOSE = "run ModelOpt weights"


@dataclass(frozen=True)
class NVIDIAModelOptConfig(QuantizationConfig):
    """How ModelOpt packs a model; the fields are those of diffusers.

    `quant_type` is the type of weights, or of weights and activations: `NVFP4`, `FP8_FP8`.
    `weight_only` leaves activations as they are; by default it follows from `quant_type`.
    `channel_quantize` is the axis along which scales differ, `block_quantize` the weights that share
    one along it (axis -1 unless said); `scale_channel_quantize` and `scale_block_quantize` say the same
    of NF4's scales. `algorithm` is `max`: what ModelOpt can do weight by weight. `forward_loop` takes
    the loaded model and runs typical inputs through it, to fix the ranges of activations; without it
    ranges come from each input. It is not written to JSON. `modelopt_config` is a config of ModelOpt
    itself, and goes before the other fields; its `quant_cfg` may be a list, or a mapping as before
    ModelOpt 0.44. `disable_conv_quantization` leaves convolutions as they are. Without `modelopt_config`
    ModelOpt's own list of layers that should stay (`lm_head`, `proj_out`, `router`, ...) applies too.

    Raises `ConfigError` for an unknown type, or fields that contradict each other.

    >>> NVIDIAModelOptConfig("NVFP4").to_diff_dict()
    {'quant_type': 'NVFP4', 'weight_only': True, 'quant_method': 'modelopt'}
    """

    quant_method = "modelopt"

    quant_type: str
    modules_to_not_convert: tuple[str, ...] | None = None
    weight_only: bool | None = None
    channel_quantize: int | None = None
    block_quantize: int | None = None
    scale_channel_quantize: int | None = None
    scale_block_quantize: int | None = None
    algorithm: str = "max"
    forward_loop: Callable[[Any], Any] | None = field(default=None, compare=False)
    modelopt_config: Mapping[str, Any] | None = None
    disable_conv_quantization: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.quant_type, str):
            raise ConfigError(f"quant_type {self.quant_type!r} is not a name like FP8 or FP8_INT8")
        weights, *activations = self.quant_type.upper().split("_")
        one_of(weights, WEIGHTS, "quant_type")
        if len(activations) > 1:
            raise ConfigError(f"quant_type {self.quant_type!r} has more parts than weights and activations")
        for kind in activations:
            one_of(kind, ACTIVATIONS, "quant_type of activations")
        self._set("quant_type", "_".join([weights, *activations]))
        self._set("modules_to_not_convert", names_of(self.modules_to_not_convert, "modules_to_not_convert"))
        if self.weight_only is None:
            self._set("weight_only", not activations)
        if not flag(self.weight_only, "weight_only") and not activations and self.modelopt_config is None:
            raise ConfigError(
                f"weight_only is False, and quant_type {self.quant_type} names no type of activations",
                hint=f"write {weights}_FP8, for instance",
            )
        self._check_sizes(weights)
        one_of(self.algorithm, ["max"], "algorithm")
        flag(self.disable_conv_quantization, "disable_conv_quantization")
        if self.forward_loop is not None and not callable(self.forward_loop):
            raise ConfigError(f"forward_loop {self.forward_loop!r} cannot be called")
        if self.modelopt_config is not None:
            self._set("modelopt_config", normalised(self.modelopt_config))

    def _check_sizes(self, weights: str) -> None:
        for name in ("channel_quantize", "scale_channel_quantize", "block_quantize", "scale_block_quantize"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or ("block" in name and value < 1):
                raise ConfigError(f"{name} {value!r} is not {'a size' if 'block' in name else 'an axis'}")
            if name.startswith("scale") and weights not in _SCALED_TWICE and self.modelopt_config is None:
                raise ConfigError(f"{name} means nothing for {weights}, whose scales are not packed")
        if weights in ("INT4", "NF4", "NVFP4") and self.channel_quantize not in (None, -1):
            raise ConfigError(f"channel_quantize {self.channel_quantize}: blocks of {weights} lie along axis -1")
        if weights in ("INT4", "NF4", "NVFP4") and (self.block_quantize or 2) % 2:
            raise ConfigError(f"block_quantize {self.block_quantize} is odd, and {weights} packs two codes a byte")

    @property
    def weight_type(self) -> str:
        """The type of weights: `FP8` of `FP8_INT8`."""
        return self.quant_type.partition("_")[0]

    @property
    def activation_type(self) -> str | None:
        """The type of activations, `None` where they stay as they are."""
        return None if self.weight_only else self.quant_type.partition("_")[2] or None

    def entries(self) -> list[dict[str, Any]]:
        """The `quant_cfg` for ModelOpt 0.44 and later: a list, later entries win."""
        if self.modelopt_config is not None:
            found: list[dict[str, Any]] = [dict(entry) for entry in self.modelopt_config["quant_cfg"]]
            return found
        return own_entries(
            self.weight_type,
            self.activation_type,
            axis=self.channel_quantize,
            block=self.block_quantize,
            scale_axis=self.scale_channel_quantize,
            scale_block=self.scale_block_quantize,
        )

    def with_loading_choices(self, given: Any) -> NVIDIAModelOptConfig:
        """A packed model keeps its own config; how to calibrate it is the caller's."""
        from dataclasses import replace

        loop = getattr(given, "forward_loop", None)
        return self if loop is None else replace(self, forward_loop=loop)

    def to_dict(self) -> dict[str, Any]:
        """All fields but `forward_loop`, which is code, and `quant_method`."""
        return _written(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        """`quant_method` and the fields that differ from their default, without `forward_loop`."""
        return _written(super().to_diff_dict())

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], *, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A config from a dictionary of diffusers or of this class.

        The section of an exported checkpoint (`quant_algo`, `config_groups`) gives a `ModelOptExportConfig`.
        """
        if cls is NVIDIAModelOptConfig and any(key in config_dict for key in _EXPORT_KEYS):
            from .modelopt_export import ModelOptExportConfig

            return ModelOptExportConfig.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)
        return super().from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def _read(cls, config_dict: Mapping[str, Any]) -> dict[str, Any]:
        fields = dict(config_dict)
        # diffusers keeps its `algorithm` under another name.
        calibration = fields.pop("calib_cfg", None)
        if isinstance(calibration, Mapping) and calibration.get("method") is not None:
            fields.setdefault("algorithm", calibration["method"])
        return super()._read(fields)


def _written(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: _with_text_keys(value) for key, value in fields.items() if key != "forward_loop"}


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _with_text_keys(item) for key, item in value.items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, list) else value


class NVIDIAModelOptQuantizer(Quantizer):
    """Loads and packs with ModelOpt's layers; see the module for the forms."""

    name = "modelopt"
    requirements = (Requirement("modelopt", "0.44", _PURPOSE),)
    is_serializable = True
    is_trainable = True
    config: NVIDIAModelOptConfig

    def __init__(self, config: NVIDIAModelOptConfig, *, pre_quantized: bool = True) -> None:
        super().__init__(config, pre_quantized=pre_quantized)
        self._plans: dict[str, Any] = {}

    def validate_environment(self, *, torch_dtype: Any = None, device_map: Any = None) -> None:
        super().validate_environment(torch_dtype=torch_dtype, device_map=device_map)
        if self.config.activation_type == "NVFP4" and not require("torch", _PURPOSE).cuda.is_available():
            raise BackendError(
                "ModelOpt quantizes activations to NVFP4 on a CUDA device only, and there is none",
                hint='quant_type="NVFP4" packs the weights alone, which runs on any device',
            )

    def takes(self, path: str, module: Any) -> bool:
        nn = require("torch", _PURPOSE).nn
        if type(module) is nn.Linear:
            return True
        convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        return type(module) in convolutions and not self.config.disable_conv_quantization

    def preprocess_model(
        self,
        model: Any,
        *,
        skip: Iterable[str] = (),
        keep_in_fp32: Iterable[str] = (),
        packed: Collection[str] | None = None,
    ) -> None:
        entries = self.config.entries()
        if self.config.modelopt_config is None:
            entries += default_entries()
        algorithm = (self.config.modelopt_config or {}).get("algorithm", "max")
        method = algorithm.get("method", "max") if isinstance(algorithm, Mapping) else algorithm
        if not self.pre_quantized and method not in (None, "max"):
            raise ConfigError(
                f"algorithm {method!r} needs the whole model in full precision, and weights are packed one by one here",
                hint='take "max", or run ModelOpt on the loaded model and export it',
            )
        if self.pre_quantized:
            refuse_bare_codes(getattr(self, "entries", {}), packed or ())
        self._entries = entries
        self._plans = {}
        self._left: list[str] = []
        super().preprocess_model(model, skip=skip, keep_in_fp32=keep_in_fp32, packed=packed)
        # Layers were converted in place: these are the classes from before.
        self.quantized = {path: self._plans[path].layer for path in self.quantized}
        if self._left:
            named = ", ".join(self._left[:3]) + (", ..." if len(self._left) > 3 else "")
            warnings.warn(
                f"{len(self._left)} layers stay in full precision, as their shapes are not those of blocks of"
                f" {self.config.weight_type}: {named}",
                stacklevel=2,
            )

    def replace_layer(self, path: str, module: Any) -> Any:
        from . import modelopt_layers

        plan = modelopt_layers.Plan(path, module, self._entries, packed=self.pre_quantized)
        if plan.chosen["weight_quantizer"] is None:
            return None
        if not plan.fits:
            self._left.append(path)
            return None
        self._plans[path] = plan
        return modelopt_layers.convert(module, plan)

    def packed_bytes(self, model: Any, name: str) -> int | None:
        if not self.check_if_quantized_param(model, name):
            return None
        from . import modelopt_layers

        return modelopt_layers.packed_bytes(self._plans[name.rpartition(".")[0]], self.torch_dtype)

    def weight_shape(self, model: Any, name: str) -> tuple[int, ...] | None:
        shape: tuple[int, ...] = self._plans[name.rpartition(".")[0]].shape
        return shape

    def component_of(self, key: str) -> tuple[str, str] | None:
        for quantizer in _STORED:
            path, found, buffer = key.rpartition(f".{quantizer}.")
            if found:
                return f"{path}.weight", f"{quantizer}.{buffer}"
        return None

    def packing(self, model: Any, name: str) -> Packing | None:
        """Forms of which all that the layer keeps follows from the engine's arrays. What else the engine has a
        format for is packed from memory; INT4 and NF4 by ModelOpt, whose layers have them in other bytes than its
        export."""
        from . import modelopt_engine

        plan = self._plans[name.rpartition(".")[0]]
        form = None if self.pre_quantized or self.torch_dtype is None else modelopt_engine.form_of(plan)
        if form is None or not modelopt_engine.is_whole(plan, self.torch_dtype.itemsize):
            return None
        return Packing(form[0], through=stored_name(self.torch_dtype), shape=form[1])

    def create_quantized_param(self, model: Any, name: str, value: Any, *, device: Any, dtype: Any = None) -> None:
        from . import modelopt_layers

        path = name.rpartition(".")[0]
        layer, plan = model.get_submodule(path), self._plans[path]
        if isinstance(value, Mapping) and not self.pre_quantized:
            packed, scales = modelopt_layers.of_engine(layer, plan, value, self.torch_dtype)
            modelopt_layers.install(layer, packed, scales, device=device)
            return
        if not isinstance(value, Mapping):
            weight = value if dtype is None else value.to(dtype)
            packed, scales = modelopt_layers.pack(layer, plan, weight, name=name)
            modelopt_layers.install(layer, packed, scales, device=device)
            return
        modelopt_layers.restore(layer, plan, value, device=device, dtype=dtype, name=name)

    def postprocess_model(self, model: Any) -> None:
        if self.config.forward_loop is not None:
            from . import modelopt_layers

            modelopt_layers.calibrate_inputs(model, list(self.quantized), self.config.forward_loop)

    def exported(self, model: Any, form: str, skeleton: Callable[[], Any]) -> Exported:
        """`unified`: what ModelOpt exports for vLLM, TensorRT-LLM and SGLang, see `modelopt_unified`;
        `modelopt`: as without a form, with the `modelopt_state.pth` by which ModelOpt restores it."""
        from . import modelopt_state, modelopt_unified

        if form == "unified":
            tensors, file = modelopt_unified.exported(model, model.state_dict(), self._plans)
            beside = {modelopt_unified.FILE: json.dumps(file, indent=4) + "\n"}
            return Exported(tensors, modelopt_unified.section(file), beside)
        if form == "modelopt":
            state = modelopt_state.made_for(skeleton(), model, self._plans)
            return Exported(self.stored_state(model)[0], self.config.to_dict(), objects={modelopt_state.FILE: state})
        raise ConfigError(f"form={form!r}: ModelOpt's models have the forms 'unified' and 'modelopt' besides their own")

    def dequantize(self, model: Any, *, dtype: Any = None) -> Any:
        from . import modelopt_layers
        from .modules import replace_layers

        wanted = None if dtype is None else torch_dtype(dtype)

        def plain(path: str, layer: Any) -> Any:
            if path not in self.quantized:
                return None
            return modelopt_layers.plain(layer, self._plans[path], wanted)

        replace_layers(model, plain)
        self.quantized = {}
        return model
