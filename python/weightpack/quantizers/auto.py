"""The registry of quantizers, and the choice of one from a config."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..folder import CONFIG, read_json
from .base import Quantizer
from .config import QuantizationConfig, QuantizationMethod

_PACKAGE = __package__

BACKENDS: dict[str, tuple[str, str, str]] = {
    "bitsandbytes_4bit": ("bitsandbytes", "BitsAndBytes4BitQuantizer", "BitsAndBytesConfig"),
    "bitsandbytes_8bit": ("bitsandbytes", "BitsAndBytes8BitQuantizer", "BitsAndBytesConfig"),
    "gguf": ("gguf", "GGUFQuantizer", "GGUFQuantizationConfig"),
    "quanto": ("quanto", "QuantoQuantizer", "QuantoConfig"),
    "torchao": ("torchao", "TorchAoQuantizer", "TorchAoConfig"),
    "modelopt": ("modelopt", "NVIDIAModelOptQuantizer", "NVIDIAModelOptConfig"),
}
"""Name of each quantizer: module of this package, its quantizer class, its config class."""

FORMS: dict[str, tuple[str, str, str]] = {
    "modelopt_export": ("modelopt_export", "ModelOptExportQuantizer", "ModelOptExportConfig"),
}
"""Second forms of a backend's checkpoints, alike. Their `quant_method` is the backend's, whose config class
knows them; nobody asks for one by name."""

FILES_BESIDE = {"quanto_qmap.json": "quanto", "hf_quant_config.json": "modelopt_export"}
"""Files in which backends themselves say next to the weights how these are packed, and the quantizer."""

_registered: dict[str, tuple[type[Quantizer], type[QuantizationConfig]]] = {}


def register_quantizer(name: str, quantizer: type[Quantizer], config: type[QuantizationConfig]) -> None:
    """Adds a backend: from now on `name` as a `quant_method` leads to `config` and `quantizer`.

    `config.quantizer_name` must give `name`. Raises `ConfigError` for a name that is taken, or for
    classes that are not derived from `Quantizer` and `QuantizationConfig`.
    """
    if name in quantizer_names() or name in FORMS:
        raise ConfigError(f'quantizer "{name}" is there already')
    if not (isinstance(quantizer, type) and issubclass(quantizer, Quantizer)):
        raise ConfigError(f'quantizer "{name}": {quantizer!r} is not derived from Quantizer')
    if not (isinstance(config, type) and issubclass(config, QuantizationConfig)):
        raise ConfigError(f'quantizer "{name}": {config!r} is not derived from QuantizationConfig')
    _registered[name] = (quantizer, config)


def unregister_quantizer(name: str) -> None:
    """Takes back `register_quantizer`. Raises `ConfigError` for a name that was not registered."""
    if _registered.pop(name, None) is None:
        raise ConfigError(f'quantizer "{name}" was not registered')


def quantizer_names() -> list[str]:
    """The names of all quantizers, those of other people's backends last."""
    return [*BACKENDS, *_registered]


def quantizer_class(name: str) -> type[Quantizer]:
    """The class of a quantizer. Raises `ConfigError` for an unknown name."""
    if name in _registered:
        return _registered[name][0]
    module, quantizer, _ = _row(name)
    found: type[Quantizer] = getattr(import_module(f"{_PACKAGE}.{module}"), quantizer)
    return found


def config_class(name: str) -> type[QuantizationConfig]:
    """The config class of a quantizer. Raises `ConfigError` for an unknown name."""
    if name in _registered:
        return _registered[name][1]
    module, _, config = _row(name)
    found: type[QuantizationConfig] = getattr(import_module(f"{_PACKAGE}.{module}"), config)
    return found


def _row(name: str) -> tuple[str, str, str]:
    if name not in BACKENDS and name not in FORMS:
        raise ConfigError(f'quantization method "{name}" is none of {", ".join(_methods())}')
    return BACKENDS.get(name) or FORMS[name]


def _methods() -> list[str]:
    return [*(method.value for method in QuantizationMethod), *_registered]


class AutoQuantizer:
    """Finds the quantizer, or the config, that a checkpoint or a caller asks for."""

    @classmethod
    def from_config(
        cls, config: QuantizationConfig | Mapping[str, Any] | Any, *, pre_quantized: bool = True
    ) -> Quantizer:
        """The quantizer of a config: one of ours, a host's config object, or a dictionary.

        `pre_quantized` says whether the checkpoint holds packed weights already. Raises
        `ConfigError` for a missing or unknown method; lists those that are known.
        """
        config = cls.as_config(config)
        return quantizer_class(config.quantizer_name)(config, pre_quantized=pre_quantized)

    @classmethod
    def as_config(cls, config: Any) -> QuantizationConfig:
        """A config of ours from one of ours, from a host's config object, or from a dictionary."""
        if isinstance(config, QuantizationConfig):
            return config
        if isinstance(config, Mapping):
            return cls.from_dict(config)
        if callable(getattr(config, "to_dict", None)):
            return cls._from_host(config)
        raise ConfigError(f"{type(config).__name__} is not a quantization config")

    @classmethod
    def _from_host(cls, config: Any) -> QuantizationConfig:
        """From a host's own config object: fields that do not pass through JSON are taken as they are."""
        fields = dict(config.to_dict())
        known = cls._class_of(fields)
        for field in dataclasses.fields(known):
            value = getattr(config, field.name, None)
            if field.name in fields and value is not None:
                fields[field.name] = value
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> QuantizationConfig:
        """The config in the section `quantization_config` of a `config.json`.

        A bitsandbytes section without `quant_method` is known by `load_in_4bit` or `load_in_8bit`.
        Raises `ConfigError` for a missing or unknown method, or a key that the config does not have.
        """
        config: QuantizationConfig = cls._class_of(config_dict).from_dict(config_dict)
        return config

    @classmethod
    def _class_of(cls, config_dict: Mapping[str, Any]) -> type[QuantizationConfig]:
        method = config_dict.get("quant_method")
        if method is None and (config_dict.get("load_in_4bit") or config_dict.get("load_in_8bit")):
            method = QuantizationMethod.BITS_AND_BYTES
        if method is None:
            raise ConfigError(f"the quantization config has no quant_method, expected one of {', '.join(_methods())}")
        method = str(getattr(method, "value", method))
        if method in _registered:
            return _registered[method][1]
        if method == QuantizationMethod.BITS_AND_BYTES:
            return config_class("bitsandbytes_4bit")
        return config_class(method)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, subfolder: str | None = None) -> QuantizationConfig:
        """The config in the `config.json` of a model folder, or in a backend's own file beside it.

        Raises `ConfigError` when the model is not quantized, `CheckpointError` for a malformed file.
        """
        folder = Path(path, subfolder or "")
        file = folder / CONFIG
        beside = cls.from_file_beside(folder)
        found = embedded_config(read_json(file)) if beside is None or file.is_file() else None
        if found is not None:
            return cls.from_dict(found)
        if beside is None:
            raise ConfigError(f"the model is not quantized: {file} has no quantization_config")
        return beside

    @classmethod
    def from_file_beside(cls, folder: str | os.PathLike[str] | None) -> QuantizationConfig | None:
        """The config in one of `FILES_BESIDE` in `folder`, `None` where there is none."""
        for name, quantizer in FILES_BESIDE.items() if folder is not None else ():
            file = Path(str(folder), name)
            if file.is_file():
                return config_class(quantizer).from_file_beside(read_json(file))
        return None

    @classmethod
    def merge_quantization_configs(
        cls, embedded: Any, given: QuantizationConfig | Mapping[str, Any] | Any | None
    ) -> QuantizationConfig:
        """The config to load with: the model's own wins over the caller's, with a warning.

        Raises `ConfigError` when the two name different methods.
        """
        own = cls.as_config(embedded)
        if given is None:
            return own
        other = cls.as_config(given)
        if other.quant_method != own.quant_method:
            raise ConfigError(
                f"the model is packed for {own.quant_method}, and quantization_config is for {other.quant_method}",
                hint="leave quantization_config out, or dequantize the model first",
            )
        kept = own.with_loading_choices(other)
        if other != kept:
            warnings.warn(
                "the model is packed already: its own quantization config is used, and the one given is not",
                stacklevel=3,
            )
        return kept


def embedded_config(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The section `quantization_config` of a model's config, also below `text_config`, or `None`."""
    if config is None:
        return None
    for holder in (config, config.get("text_config")):
        if isinstance(holder, Mapping) and isinstance(holder.get("quantization_config"), Mapping):
            found: Mapping[str, Any] = holder["quantization_config"]
            return found
    return None
