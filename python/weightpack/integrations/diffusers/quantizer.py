"""One diffusers quantizer for all backends: diffusers' hooks, each passed on to a quantizer of weightpack.

| diffusers calls | what it comes to |
|---|---|
| `validate_environment`, `update_torch_dtype`, `update_device_map` | the same hook |
| `maybe_update_loaded_keys` | sorts the keys of a packed checkpoint into weights and their components |
| `preprocess_model` | `preprocess_model`: layers change places |
| `maybe_update_state_dict` | sets every weight whose components have all been read |
| `check_if_quantized_param`, `create_quantized_param` | packs a full-precision weight |
| `update_missing_keys`, `postprocess_model`, `dequantize` | the same hook |

A weight of a packed checkpoint is set as soon as its last component has come, whichever shards hold them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..._lazy import require
from ...errors import BackendError, CheckpointError
from ...quantizers.auto import AutoQuantizer
from ...quantizers.base import Quantizer

_PURPOSE = "pack its models"
_BASE: Any = require("diffusers.quantizers.base", _PURPOSE).DiffusersQuantizer


class WeightpackQuantizer(_BASE):  # type: ignore[misc]
    """What diffusers takes for one of its quantizers. `quantizer` is weightpack's."""

    use_keep_in_fp32_modules = True
    requires_calibration = False

    def __init__(
        self,
        quantization_config: Any,
        *,
        pre_quantized: bool = True,
        modules_to_not_convert: Sequence[str] = (),
        quantizer: Quantizer | None = None,
    ) -> None:
        super().__init__(
            quantization_config, pre_quantized=pre_quantized, modules_to_not_convert=list(modules_to_not_convert)
        )
        self.quantizer = quantizer or AutoQuantizer.from_config(quantization_config, pre_quantized=pre_quantized)
        self._device_map: Any = None
        self._model: Any = None
        self._groups: dict[str, dict[str, str]] = {}
        self._read: dict[str, Any] = {}

    # Before the model is built.

    def validate_environment(self, *, torch_dtype: Any = None, device_map: Any = None) -> None:
        """diffusers calls it twice; the second time with the final device map."""
        self._device_map = device_map
        self.quantizer.validate_environment(torch_dtype=torch_dtype, device_map=device_map)

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        self.quantizer.torch_dtype = self.quantizer.update_torch_dtype(torch_dtype)
        return self.quantizer.torch_dtype

    def update_device_map(self, device_map: Any) -> Any:
        return self.quantizer.update_device_map(device_map)

    # The keys of a packed checkpoint.

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        """The keys without those of packed weights, which this object sets by itself."""
        if not self.pre_quantized:
            return loaded_keys
        if hasattr(self.quantizer, "file_metadata"):
            self.quantizer.file_metadata = _metadata(checkpoint_files)
        left = []
        for key in loaded_keys:
            found = self.quantizer.component_of(key)
            if found is None:
                left.append(key)
            else:
                self._groups.setdefault(found[0], {})[found[1]] = key
        # A main component alone is an ordinary weight, `a.weight`.
        for name in [name for name, keys in self._groups.items() if set(keys) == {""}]:
            left.append(self._groups.pop(name)[""])
        return left

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Takes the components of packed weights out of what was read, and sets the weights that are whole."""
        if not self._groups:
            return state_dict
        owned = {key for keys in self._groups.values() for key in keys.values()}
        self._read.update({key: value for key, value in state_dict.items() if key in owned})
        for name in [name for name, keys in self._groups.items() if all(key in self._read for key in keys.values())]:
            keys = self._groups.pop(name)
            components = {component: self._read.pop(key) for component, key in keys.items()}
            if self.quantizer.check_if_quantized_param(self._model, name):
                self._set(name, components)
        return {key: value for key, value in state_dict.items() if key not in owned}

    def _set(self, name: str, value: Any) -> None:
        device = _device_of(name, self._device_map)
        self.quantizer.create_quantized_param(self._model, name, value, device=device, dtype=self.quantizer.torch_dtype)

    @property
    def supports_parallel_loading(self) -> bool:
        return not self.pre_quantized

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        packed = {key for key in missing_keys if (self.quantizer.component_of(key) or (key,))[0] in self._groups}
        return self.quantizer.update_missing_keys(model, [key for key in missing_keys if key not in packed])

    # The model.

    def _process_model_before_weight_loading(
        self, model: Any, *, device_map: Any = None, keep_in_fp32_modules: Sequence[str] = (), state_dict: Any = None
    ) -> None:
        self._model = model
        self.quantizer.preprocess_model(
            model,
            keep_in_fp32=[entry for entry in keep_in_fp32_modules if entry is not None],
            packed=frozenset(self._groups) if self.pre_quantized else None,
        )
        self.modules_to_not_convert = list(self.quantizer.modules_to_not_convert)
        mark(model, self.quantizer)

    def check_if_quantized_param(
        self, model: Any, param_value: Any, param_name: str, state_dict: Any, *, param_device: Any = None
    ) -> bool:
        return not self.pre_quantized and self.quantizer.check_if_quantized_param(model, param_name)

    def create_quantized_param(
        self,
        model: Any,
        param_value: Any,
        param_name: str,
        target_device: Any,
        state_dict: Any = None,
        unexpected_keys: Any = None,
        *,
        dtype: Any = None,
    ) -> None:
        self.quantizer.create_quantized_param(model, param_name, param_value, device=target_device, dtype=dtype)

    def _process_model_after_weight_loading(self, model: Any) -> Any:
        """Raises `CheckpointError` when components of a weight are not in the files."""
        if self._groups:
            name, keys = next(iter(self._groups.items()))
            lacking = [key for key in keys.values() if key not in self._read]
            raise CheckpointError(f'"{name}" is not whole: {", ".join(lacking)} of it is in no file')
        self.quantizer.postprocess_model(model)
        self._model = None
        return model

    # Later.

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        if self.quantizer.name != "torchao":
            return state_dict, {}
        torchao = require("diffusers.quantizers.torchao.torchao_quantizer", _PURPOSE).TorchAoHfQuantizer
        flat: tuple[dict[str, Any], dict[str, Any]] = torchao.get_state_dict_and_metadata(
            self, state_dict, safe_serialization=safe_serialization
        )
        return flat

    def _dequantize(self, model: Any) -> Any:
        try:
            return self.quantizer.dequantize(model)
        except BackendError as error:
            raise NotImplementedError(str(error)) from error

    @property
    def is_serializable(self) -> bool:
        return self.quantizer.is_serializable

    @property
    def is_trainable(self) -> bool:
        return self.quantizer.is_trainable

    @property
    def is_compileable(self) -> bool:
        return self.quantizer.is_compileable


def mark(model: Any, quantizer: Quantizer) -> None:
    """Sets what diffusers' own methods ask a packed model for."""
    methods = require("diffusers.quantizers.quantization_config", _PURPOSE).QuantizationMethod
    method = str(quantizer.config.quant_method)
    model.is_quantized = True
    model.quantization_method = next((one for one in methods if one.value == method), method)
    for bits in ("4bit", "8bit"):
        if quantizer.name == f"bitsandbytes_{bits}":
            setattr(model, f"is_loaded_in_{bits}", True)
            setattr(model, f"is_{bits}_serializable", quantizer.is_serializable)


def attach(model: Any, quantizer: Quantizer, torch_dtype: Any) -> None:
    """Leaves on a model that weightpack loaded what diffusers' own loader leaves on one."""
    mark(model, quantizer)
    adapter = WeightpackQuantizer(quantizer.config, pre_quantized=quantizer.pre_quantized, quantizer=quantizer)
    adapter.modules_to_not_convert = list(quantizer.modules_to_not_convert)
    model.hf_quantizer = adapter
    model.register_to_config(quantization_config=quantizer.config, _pre_quantization_dtype=torch_dtype)


def _metadata(files: Sequence[Any]) -> Mapping[str, str]:
    """What the headers of safetensors files say besides their tensors."""
    safe_open = require("safetensors", "read checkpoints").safe_open
    merged: dict[str, str] = {}
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                merged.update(opened.metadata() or {})
    return merged


def _device_of(name: str, device_map: Any) -> Any:
    """The device of a parameter: that of the innermost module which the map names."""
    if not isinstance(device_map, Mapping):
        return "cpu"
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    if name not in device_map:
        raise CheckpointError(f'the device map says nothing of "{name}"')
    return device_map[name]
