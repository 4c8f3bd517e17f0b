"""One transformers quantizer for all backends: transformers' hooks, each passed on to a quantizer of weightpack.

| transformers calls | what it comes to |
|---|---|
| `validate_environment`, `update_device_map` | the same hook |
| `update_dtype` | `update_torch_dtype` |
| `preprocess_model` | sorts the keys of a packed checkpoint into weights and their components; `preprocess_model`: layers change places |
| `param_element_size`, `adjust_max_memory` | `packed_bytes`, `adjust_max_memory` |
| `param_needs_quantization` | `check_if_quantized_param` |
| `get_quantize_ops` | `Pack`: `create_quantized_param` with a full-precision tensor |
| `serialized_names`, `get_weight_conversions` | `Unpack`: `create_quantized_param` with the stored components |
| `postprocess_model`, `dequantize` | the same hook |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..._lazy import require
from ...errors import BackendError, UnsupportedError
from ...loading.source import safetensors_headers
from ...quantizers.auto import AutoQuantizer
from ...quantizers.base import Quantizer
from ...quantizers.config import QuantizationConfig
from ...quantizers.modules import owner
from .host import TransformersHost
from .keys import names_in_model

_PURPOSE = "pack its models"
_BASE: Any = require("transformers.quantizers.base", _PURPOSE)
_LOADING: Any = require("transformers.core_model_loading", _PURPOSE)
_CONFIGS: Any = require("transformers.utils.quantization_config", _PURPOSE)
_HOST = TransformersHost()

CONFIG_CLASSES = {"bitsandbytes": "BitsAndBytesConfig", "quanto": "QuantoConfig", "torchao": "TorchAoConfig"}
"""transformers' own config class for each method that both libraries know."""


class WeightpackQuantizer(_BASE.HfQuantizer):  # type: ignore[misc]
    """What transformers takes for one of its quantizers. `quantizer` is weightpack's.

    `quantization_config` is one of transformers' configs or of weightpack's; the former is kept where
    transformers has a class for it, so that everything which reads it finds its fields.
    """

    requires_calibration = False

    def __init__(
        self, quantization_config: Any, *, pre_quantized: bool = True, quantizer: Quantizer | None = None
    ) -> None:
        self.quantizer = quantizer or AutoQuantizer.from_config(quantization_config, pre_quantized=pre_quantized)
        super().__init__(host_config(quantization_config), pre_quantized=pre_quantized)
        self._dtype: Any = None
        self._names: dict[str, list[str]] = {}
        self._placed: set[str] = set()

    @property
    def modules_to_not_convert(self) -> list[str]:
        """The effective skip list."""
        return list(self.quantizer.modules_to_not_convert)

    # Before the model is built.

    def validate_environment(self, *, device_map: Any = None, weights_only: bool = True) -> None:
        """transformers calls it again once a device map has been worked out."""
        self.quantizer.validate_environment(device_map=device_map)

    def update_device_map(self, device_map: Any) -> Any:
        return self.quantizer.update_device_map(device_map)

    def update_dtype(self, dtype: Any) -> Any:
        self.quantizer.torch_dtype = self.quantizer.update_torch_dtype(dtype)
        return self.quantizer.torch_dtype

    # The skeleton.

    def _process_model_before_weight_loading(
        self,
        model: Any,
        *,
        device_map: Any = None,
        checkpoint_files: Sequence[Any] | None = None,
        use_kernels: bool = False,
    ) -> Any:
        self._dtype = self.quantizer.torch_dtype
        packed = None
        if self.pre_quantized:
            if not checkpoint_files:
                raise UnsupportedError("packed weights are loaded from files, and not from a state dict in memory")
            packed = self._sort(model, checkpoint_files)
        # transformers builds everything on the meta device. What a backend's layer computes for itself is real,
        # as in weightpack's own loader.
        with require("torch", _PURPOSE).device("cpu"):
            self.quantizer.preprocess_model(
                model,
                skip=[*_HOST.protected(model), *_on_disk(device_map)],
                keep_in_fp32=_HOST.keep_in_fp32(model, self._dtype),
                packed=packed,
            )
        for path in self.quantizer.quantized:
            layer = model.get_submodule(path)
            # transformers cannot give packed weights first values: that is done at the end.
            layer._is_hf_initialized = True
            weight = layer._parameters.get("weight")
            if not self.pre_quantized and weight is not None and not weight.is_floating_point():
                # Before 5.23 transformers casts what it reads to the type that it finds here, integers too.
                weight.data = weight.data.to(self._dtype)
        return model

    def _sort(self, model: Any, files: Sequence[Any]) -> frozenset[str]:
        """Learns from the keys what the components of packed weights are called; gives the parameters of
        the model that are packed."""
        keys, metadata = _headers(files)
        if hasattr(self.quantizer, "file_metadata"):
            self.quantizer.file_metadata = metadata
        stored = set()
        for key in keys:
            found = self.quantizer.component_of(key)
            if found is None:
                continue
            stored.add(found[0])
            path, _, leaf = found[0].rpartition(".")
            names = self._names.setdefault(leaf, [leaf])
            name = key[len(path) + 1 :] if path else key
            if name not in names:
                names.append(name)
        return frozenset(name for _, name in names_in_model(model, stored))

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        size = self.quantizer.packed_bytes(model, param_name)
        return float(param.element_size()) if size is None else size / param.numel()

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        return self.quantizer.adjust_max_memory(max_memory)

    # The weights.

    def param_needs_quantization(self, model: Any, param_name: str) -> bool:
        return self.quantizer.check_if_quantized_param(model, param_name)

    def get_quantize_ops(self) -> Any:
        return Pack(self)

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        """For each kind of packed parameter (`weight`), what its components are called beside it."""
        return self._names

    def get_weight_conversions(self) -> list[Any]:
        if not self.pre_quantized:
            return []
        # The first pattern that fits is taken, and `weight` fits `weight.absmax`.
        longest_first = {leaf: sorted(names, key=len, reverse=True) for leaf, names in self._names.items()}
        return [_LOADING.WeightConverter(names, leaf, [Unpack(self)]) for leaf, names in longest_first.items()]

    def place(self, model: Any, name: str, value: Any, device: Any, missing: Any) -> None:
        """Has parameter `name` set from a tensor or from components; what is there then is not missing."""
        self.quantizer.create_quantized_param(model, name, value, device=device, dtype=self._dtype)
        self._placed.add(name)
        layer, leaf = owner(model, name)
        prefix = name[: len(name) - len(leaf)]
        if missing is not None:
            missing.discard(name)
        for own, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
            if tensor is None or tensor.device.type == "meta":
                continue
            if own == leaf or own in layer._buffers:
                # Without the mark transformers would take it for new and give it a first value.
                tensor._is_hf_initialized = True
                if missing is not None:
                    missing.discard(prefix + own)

    def _make_missing(self, model: Any) -> None:
        """Gives layers that the checkpoint lacks, wholly or in part, the first values of their class."""
        torch = require("torch", _PURPOSE)
        for path in self.quantizer.quantized:
            layer, name = model.get_submodule(path), f"{path}.weight"
            bias = getattr(layer, "bias", None)
            lacks_bias = bias is not None and not getattr(bias, "_is_hf_initialized", False)
            shape = self.quantizer.weight_shape(model, name)
            if shape is None or not (lacks_bias or name not in self._placed):
                continue
            fresh = torch.nn.Linear(shape[1], shape[0], bias=lacks_bias)
            model._init_weights(fresh)
            if name not in self._placed:
                self.place(model, name, fresh.weight.detach().to(self._dtype), layer.weight.device, None)
            if lacks_bias:
                layer.bias.data.copy_(fresh.bias.detach())

    # The model.

    def _process_model_after_weight_loading(self, model: Any) -> Any:
        self._make_missing(model)
        self.quantizer.postprocess_model(model)
        # What undoes the model's own conversions on saving: packed weights are saved as they are, which
        # transformers does not know of its own (huggingface/transformers#43096).
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or ()
            if not any(isinstance(step, Unpack) for step in getattr(conversion, "operations", ()))
        ]
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, Any]]:
        if self.quantizer.name != "torchao":
            return None, {}
        flatten = require("torchao.prototype.safetensors.safetensors_support", "save its weights")
        flat: tuple[Any, dict[str, Any]] = flatten.flatten_tensor_state_dict(model.state_dict())
        return flat

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        try:
            return self.quantizer.dequantize(model, dtype=dtype)
        except BackendError as error:
            raise NotImplementedError(str(error)) from error

    def is_serializable(self) -> bool:
        return bool(self.quantizer.is_saved_by_host)

    @property
    def is_trainable(self) -> bool:
        return bool(self.quantizer.is_trainable)

    @property
    def is_compileable(self) -> bool:
        return bool(self.quantizer.is_compileable)


class Pack(_LOADING.ConversionOps):  # type: ignore[misc]
    """Packs full-precision weights, on the CPU, and sets them in the model."""

    def __init__(self, hf_quantizer: WeightpackQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], *, model: Any = None, missing_keys: Any = None, **rest: Any
    ) -> dict[str, Any]:
        """Gives back what is not to be packed."""
        left = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if self.hf_quantizer.param_needs_quantization(model, name):
                self.hf_quantizer.place(model, name, tensor.to("cpu"), tensor.device, missing_keys)
            else:
                left[name] = tensor
        return left


class Unpack(_LOADING.ConversionOps):  # type: ignore[misc]
    """Sets packed weights from their stored components."""

    def __init__(self, hf_quantizer: WeightpackQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> Unpack:
        """transformers copies its conversions for every parameter: the quantizer stays one."""
        return self

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str = "",
        model: Any = None,
        missing_keys: Any = None,
        **rest: Any,
    ) -> dict[str, Any]:
        """Gives back an ordinary tensor, in the type that the model holds it in."""
        adapter = self.hf_quantizer
        found: dict[str, Any] = {name: one[0] if isinstance(one, list) else one for name, one in input_dict.items()}
        path, _, leaf = full_layer_name.rpartition(".")
        if set(found) == {leaf} and not adapter.param_needs_quantization(model, full_layer_name):
            tensor = found[leaf]
            if tensor.is_floating_point():
                tensor = tensor.to(model.get_parameter_or_buffer(full_layer_name).dtype)
            return {leaf: tensor}
        components = {}
        for name, part in found.items():
            known = adapter.quantizer.component_of(f"{path}.{name}" if path else name)
            components["" if known is None else known[1]] = part
        device = next(iter(components.values())).device
        adapter.place(model, full_layer_name, components, device, missing_keys)
        return {}


def host_config(config: Any) -> Any:
    """transformers' own config object for one of weightpack's, where it can say the same; anything else as it is."""
    if not isinstance(config, QuantizationConfig) or config.quant_method not in CONFIG_CLASSES:
        return config
    made = getattr(_CONFIGS, CONFIG_CLASSES[config.quant_method]).from_dict(config.to_dict())
    return made if AutoQuantizer.as_config(made) == config else config


def attach(model: Any, quantizer: Quantizer, torch_dtype: Any) -> None:
    """Leaves on a model that weightpack loaded what transformers' own loader leaves on one."""
    adapter = WeightpackQuantizer(quantizer.config, pre_quantized=quantizer.pre_quantized, quantizer=quantizer)
    adapter._dtype = torch_dtype
    config = adapter.quantization_config
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.hf_quantizer = adapter
    model.config.quantization_config = config
    # Not on the config, which transformers writes to JSON as it is.
    model._pre_quantization_dtype = torch_dtype
    _BASE._assign_is_quantized(model)


def _on_disk(device_map: Any) -> list[str]:
    """The modules whose weights stay on disk: these are not packed."""
    if not isinstance(device_map, Mapping):
        return []
    return [path for path, device in device_map.items() if str(device) == "disk"]


def _headers(files: Sequence[Any]) -> tuple[list[str], Mapping[str, str]]:
    """The keys of all files of a checkpoint, and what the headers of safetensors files say besides."""
    load = require("transformers.modeling_utils", _PURPOSE).load_state_dict
    keys, metadata = safetensors_headers(files)
    for file in files:
        if not str(file).endswith(".safetensors"):
            keys += load(file, map_location="meta")
    return keys, metadata
