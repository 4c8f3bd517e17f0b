"""One diffusers quantizer for all backends: diffusers' hooks, each passed on to a quantizer of weightpack.

| diffusers calls | what it comes to |
|---|---|
| `validate_environment`, `update_torch_dtype`, `update_device_map` | the same hook |
| `maybe_update_loaded_keys` | sorts the keys of a packed checkpoint into weights and their components |
| `preprocess_model` | `preprocess_model`: layers change places |
| `get_special_dtypes_update`, `adjust_target_dtype`, `adjust_max_memory` | sizes for `device_map="auto"` |
| `update_missing_keys` | the same hook, for what is not packed |
| `maybe_update_state_dict` | takes every weight that is the quantizer's out of what was read, and sets it |
| `postprocess_model`, `dequantize` | the same hook |

A weight of a packed checkpoint is set as soon as its last component has come, whichever shards hold
them. diffusers' own loop over tensors, which compares shapes and casts, only sees what is left.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ..._lazy import require
from ...entry import Entry
from ...errors import BackendError, CheckpointError, ConfigError
from ...loading.source import safetensors_headers
from ...quantizers.auto import AutoQuantizer
from ...quantizers.base import Quantizer
from ...stored import distinct
from .configs import left_unpacked, misread_warning, saved_config
from .gguf_file import blocks_of, decoded, entries_of

_PURPOSE = "pack its models"
_BASE: Any = require("diffusers.quantizers.base", _PURPOSE).DiffusersQuantizer


class WeightpackQuantizer(_BASE):  # type: ignore[misc]
    """What diffusers takes for one of its quantizers. `quantizer` is weightpack's own."""

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
        self.quantization_config: Any
        super().__init__(
            quantization_config, pre_quantized=pre_quantized, modules_to_not_convert=list(modules_to_not_convert)
        )
        self.quantizer = quantizer or AutoQuantizer.from_config(quantization_config, pre_quantized=pre_quantized)
        self.misread: str | None = None
        self._model: Any = None
        self._device_map: Any = None
        self._keys: list[str] = []
        self._groups: dict[str, dict[str, str]] = {}
        self._held: dict[str, Any] = {}
        self._blocks: dict[str, Entry] = {}

    # Before the model is built.

    def validate_environment(self, *, torch_dtype: Any = None, device_map: Any = None) -> None:
        """diffusers calls it twice, the second time with the final device map."""
        self._device_map = device_map
        self.quantizer.validate_environment(torch_dtype=torch_dtype, device_map=device_map)

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """The quantizer's choice; it packs with it in mind."""
        self.quantizer.torch_dtype = self.quantizer.update_torch_dtype(torch_dtype)
        return self.quantizer.torch_dtype

    def update_device_map(self, device_map: Any) -> Any:
        """The quantizer's choice: no GPU is no obstacle."""
        return self.quantizer.update_device_map(device_map)

    # The keys of the checkpoint.

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[Any]) -> list[str]:
        """The keys without the components of packed weights."""
        self._keys = list(loaded_keys)
        if self.pre_quantized:
            quantizer: Any = self.quantizer
            _, quantizer.file_metadata = safetensors_headers(checkpoint_files)
            self._keys = self._group(loaded_keys)
        return self._keys

    def _group(self, keys: Sequence[str]) -> list[str]:
        """Finds the components of packed weights; gives the keys that are none."""
        left = []
        for key in keys:
            found = self.quantizer.component_of(key)
            if found is not None:
                self._groups.setdefault(found[0], {})[found[1]] = key
            else:
                left.append(key)
        for name in left:
            if name in self._groups:
                # The main component has the name of the weight itself.
                self._groups[name][""] = name
        return [key for key in left if key not in self._groups]

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Those that are neither part of a packed weight nor set while a layer is made."""
        unknown = [key for key in missing_keys if not self._is_packed(model, key)]
        return self.quantizer.update_missing_keys(model, unknown)

    def _is_packed(self, model: Any, key: str) -> bool:
        owner = (self.quantizer.component_of(key) or (key, ""))[0]
        return owner in self._groups and self.quantizer.check_if_quantized_param(model, owner)

    # The model.

    def _process_model_before_weight_loading(
        self, model: Any, *, device_map: Any = None, keep_in_fp32_modules: Sequence[str] = (), state_dict: Any = None
    ) -> None:
        self._model = model
        if state_dict is not None:
            self._open_single_file(state_dict)
        packed = frozenset(self._groups) if self.quantizer.pre_quantized else None
        self.quantizer.device_map = device_map
        spared = left_unpacked(model, self.quantizer, keep_in_fp32_modules)
        self.quantizer.preprocess_model(model, keep_in_fp32=spared, packed=packed)
        self.modules_to_not_convert = list(self.quantizer.modules_to_not_convert)
        mark(model, self.quantizer)
        self.quantization_config, self.misread = saved_config(self.quantization_config, model, self.quantizer)
        model.register_to_config(quantization_config=self.quantization_config)
        self._expect(model, self._keys if state_dict is None else list(state_dict))
        if state_dict is not None:
            for name in self._blocks.keys() - self._groups.keys():
                state_dict[name] = decoded(state_dict[name])
            self._take(state_dict)

    def _open_single_file(self, state_dict: dict[str, Any]) -> None:
        """`from_single_file` takes every file for a packed one, and tells its content only here."""
        self._blocks = entries_of(state_dict)
        if self._blocks and not self.quantizer.pre_quantized:
            state_dict |= {name: decoded(state_dict[name]) for name in self._blocks}
            self._blocks = {}
        elif self._blocks:
            quantizer: Any = self.quantizer
            quantizer.entries = self._blocks
            self._groups = {name: {"": name} for name in self._blocks}
        else:
            self._group(list(state_dict))
            self.quantizer.pre_quantized = bool(self._groups)

    def _expect(self, model: Any, keys: list[str]) -> None:
        """Settles which keys are the quantizer's. `keys` is the very list that diffusers compares with the
        model's own: what is left in it, and what is not in it, counts as unexpected and as missing."""
        if self.quantizer.pre_quantized:
            # Packed weights for which the model has no layer are unexpected.
            for name in [name for name in self._groups if not self.quantizer.check_if_quantized_param(model, name)]:
                keys += self._groups.pop(name).values()
        else:
            names = {key for key in keys if self.quantizer.check_if_quantized_param(model, key)}
            self._groups = {name: {"": name} for name in keys if name in names}
            keys[:] = [key for key in keys if key not in names]

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What was read, without what the quantizer has taken."""
        if self._model is None:
            return state_dict
        left = dict(state_dict)
        self._take(left)
        return left

    @property
    def supports_parallel_loading(self) -> bool:
        """Shards are read one after the other: components of a weight may come from several."""
        return False

    def _take(self, state_dict: dict[str, Any]) -> None:
        """Takes the arrays of packed weights out of `state_dict`, and sets every weight that is whole."""
        wanted = {key for keys in self._groups.values() for key in keys.values()}
        for key in [key for key in state_dict if key in wanted]:
            self._held[key] = state_dict.pop(key)
        whole = [name for name, keys in self._groups.items() if all(key in self._held for key in keys.values())]
        for name in whole:
            components = {component: self._held.pop(key) for component, key in self._groups.pop(name).items()}
            self._set(name, components)

    def _set(self, name: str, components: dict[str, Any]) -> None:
        device = _device_of(name, self._device_map)
        if str(device) == "disk":
            raise ConfigError(f'the device map puts "{name}" on disk, where diffusers keeps no packed weights')
        value: Any = components
        if not self.quantizer.pre_quantized:
            value = components[""]
            shape = self.quantizer.weight_shape(self._model, name)
            if shape is not None and tuple(value.shape) != shape:
                raise CheckpointError(
                    f'"{name}" has shape {list(value.shape)} in the checkpoint, and {list(shape)} in the model'
                )
        elif self._blocks:
            value = {"": blocks_of(components[""])}
        elif str(device) == "cpu":
            # Memory of its own, not that of a mapped file.
            value = {component: array.clone() for component, array in components.items()}
        self.quantizer.create_quantized_param(self._model, name, value, device=device, dtype=self.quantizer.torch_dtype)

    def _process_model_after_weight_loading(self, model: Any) -> Any:
        """Raises `CheckpointError` when components of a weight are in no file."""
        if self._groups:
            name, keys = next(iter(self._groups.items()))
            lacking = [key for key in keys.values() if key not in self._held]
            raise CheckpointError(f'the packed weight "{name}" is not whole: {", ".join(lacking)} is in no file')
        self.quantizer.postprocess_model(model)
        self._model = None
        return model

    # Sizes, for `device_map="auto"`.

    def get_special_dtypes_update(self, model: Any, torch_dtype: Any) -> dict[str, Any]:
        """The type of every parameter that is not packed."""
        names = [name for name, _ in model.named_parameters()]
        return {name: torch_dtype for name in names if not self.quantizer.check_if_quantized_param(model, name)}

    def adjust_target_dtype(self, torch_dtype: Any) -> Any:
        """The element type whose size is closest to that of the packed weights."""
        custom = require("accelerate.utils", _PURPOSE).CustomDtype
        bits = self._bits_per_weight()
        if bits is None or bits > 8.5:
            return torch_dtype
        if bits > 5:
            return require("torch", _PURPOSE).int8
        return custom.INT4 if bits > 3 else custom.INT2

    def _bits_per_weight(self) -> float | None:
        packed = weights = 0
        for path in self.quantizer.quantized:
            size = self.quantizer.packed_bytes(self._model, f"{path}.weight")
            shape = self.quantizer.weight_shape(self._model, f"{path}.weight")
            if size is not None and shape is not None:
                packed += size
                weights += prod(shape)
        return 8 * packed / weights if weights else None

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """A tenth less, for scales, which the element type does not count."""
        adjusted = self.quantizer.adjust_max_memory(max_memory)
        return {device: int(size * 0.9) for device, size in adjusted.items()}

    # Later.

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What diffusers' `save_pretrained` writes: the same tensors as `weightpack.save_pretrained`.

        Warns where diffusers by itself will not be able to load it.
        """
        if self.misread is not None:
            warnings.warn(misread_warning(self.misread), stacklevel=3)
        if not safe_serialization:
            # torch's own files have no metadata: packed tensors stay whole.
            return state_dict, {}
        stored, metadata = self.quantizer.stored_form(state_dict)
        # safetensors refuses memory that has two names; diffusers takes each for a tensor of its own.
        first = distinct(stored)
        return {key: one if key in first else one.clone() for key, one in stored.items()}, dict(metadata)

    def _dequantize(self, model: Any) -> Any:
        """Ordinary layers, and a config that no longer speaks of packed ones."""
        try:
            model = self.quantizer.dequantize(model)
        except BackendError as error:
            raise NotImplementedError(str(error)) from error
        unmark(model)
        return model

    @property
    def is_serializable(self) -> bool:
        """As the quantizer says."""
        return self.quantizer.is_saved_by_host

    @property
    def is_trainable(self) -> bool:
        """As the quantizer says."""
        return self.quantizer.is_trainable

    @property
    def is_compileable(self) -> bool:
        """As the quantizer says."""
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


def unmark(model: Any) -> None:
    """Takes back `mark`, and what the config says of packed weights: what is saved now is not packed."""
    for name in ("quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(name, None)
    packed = ("quantization_config", "_pre_quantization_dtype")
    kept = {key: value for key, value in model.config.items() if key not in packed}
    model._internal_dict = type(model.config)(kept)


def attach(model: Any, quantizer: Quantizer, torch_dtype: Any) -> None:
    """Leaves on a model that weightpack loaded what diffusers' own loader leaves on one."""
    mark(model, quantizer)
    config, misread = saved_config(quantizer.config, model, quantizer)
    adapter = WeightpackQuantizer(config, pre_quantized=quantizer.pre_quantized, quantizer=quantizer)
    adapter.modules_to_not_convert = list(quantizer.modules_to_not_convert)
    adapter.misread = misread
    model.hf_quantizer = adapter
    model.register_to_config(quantization_config=config, _pre_quantization_dtype=torch_dtype)


def _device_of(name: str, device_map: Any) -> Any:
    """The device of a parameter: that of the innermost module which the map names."""
    if not isinstance(device_map, Mapping):
        return "cpu"
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    if name not in device_map:
        raise ConfigError('the device map does not cover the whole model: it has no ""')
    return device_map[name]
