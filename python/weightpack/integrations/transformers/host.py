"""What the loader asks about transformers' model classes.

Every answer is transformers' own: its config classes, its construction of a model, its names of tied,
protected and ignored parameters, its first values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..._lazy import require
from ...errors import ConfigError
from ...loading.host import KeyPlan
from ...mapping import MappedTensor
from ...matcher import Matcher
from ...quantizers.base import Quantizer, Requirement, check_version
from ...stored import Stored
from .floats import float32_names, state_of

_PURPOSE = "load its models"
_NEEDED = Requirement("transformers", "5.20", _PURPOSE)
_GENERATION = "generation_config.json"


class TransformersHost:
    """The adapter of transformers 5; see `weightpack.loading.host.Host` for the methods."""

    name = "transformers"
    stem: str | None = "model"

    def load_config(self, model_class: Any, config: Mapping[str, Any], folder: Any) -> tuple[Any, Any]:
        """The concrete class behind an Auto class, and its config object; unknown keys are kept in it.

        Code that comes with a checkpoint is never run: a model that needs it is a `ConfigError`. Raises
        `BackendError` for a transformers older than 5.20.
        """
        check_version(_NEEDED, require("transformers", _PURPOSE).__version__)
        known = {key: value for key, value in config.items() if key != "quantization_config"}
        if getattr(model_class, "_model_mapping", None) is not None:
            return _behind_auto(model_class, known)
        if model_class.config_class is None:
            raise ConfigError(f"{model_class.__name__} names no config class")
        return model_class, _own_config(model_class, known)

    def config_from_gguf(self, checkpoint: Any) -> dict[str, Any]:
        """The config in the metadata of a GGUF file that comes without one.

        Raises `UnsupportedError` for a model that its metadata does not fully describe.
        """
        from ...language.host_config import host_config

        rope = "rope_freqs.weight"
        factors = checkpoint.read(rope).tolist() if rope in checkpoint else None
        return host_config(checkpoint.metadata, {name: entry.shape for name, entry in checkpoint.items()}, factors)

    def gguf_names(self, model: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[MappedTensor] | None:
        """Names of the files that weightpack reads and does not write."""
        from .gguf_names import gguf_names

        return gguf_names(model, shapes)

    def build(self, model_class: Any, config: Any, torch_dtype: Any) -> Any:
        """The skeleton, built by `_from_config`. No first values are made, and nothing is tied."""
        initialization = require("transformers.initialization", _PURPOSE)
        with initialization.no_init_weights():
            return model_class._from_config(config, dtype=torch_dtype)

    def default_dtype(self, config: Any, stored: Any, quantized: bool) -> Any:
        """The type in the config, else the stored one, as transformers' `dtype="auto"`."""
        torch = require("torch", _PURPOSE)
        named = getattr(config, "dtype", None)
        if named is None and (stored is None or not stored.is_floating_point):
            named = getattr(config.get_text_config(), "dtype", None)
        if named is None:
            named = stored if stored is not None and stored.is_floating_point and stored.itemsize > 1 else None
        return getattr(torch, named) if isinstance(named, str) else named

    def dtype_of(self, name: str, own: Any, torch_dtype: Any) -> Any:
        """The type that the skeleton has for a tensor: a buffer may insist on its own."""
        return own

    def plan_keys(self, model: Any, entries: Mapping[str, tuple[int, ...]]) -> KeyPlan:
        """By transformers' own renamings and conversions."""
        from .keys import plan_keys

        return plan_keys(model, entries)

    def protected(self, model: Any) -> Iterable[str]:
        """The output layer, tied layers, the last layer, and what transformers keeps in float32: those that
        it leaves alone when it packs a model without a skip list.

        Entries that name the same layers to both libraries are kept short; elsewhere each layer is named.
        """
        default = require("transformers.quantizers.base", _PURPOSE).get_keys_to_not_convert(model)
        should_convert = require("transformers.quantizers.quantizers_utils", _PURPOSE).should_convert_module
        entries = sorted({*default, *(model._keep_in_fp32_modules or ())})
        layers = [path for path, module in model.named_modules() if path and "weight" in module._parameters]
        refused = {path for path in layers if not should_convert(path, entries)}
        found = []
        for entry in entries:
            matcher = Matcher([entry])
            named = {path for path in layers if matcher.matches(path)}
            if named and named <= refused:
                found.append(entry)
        matcher = Matcher(found)
        return [*found, *(path for path in layers if path in refused and not matcher.matches(path))]

    def keep_in_fp32(self, model: Any, torch_dtype: Any) -> Iterable[str]:
        """The names of the parameters that transformers keeps in float32 beside others of `torch_dtype`."""
        return float32_names(model, torch_dtype)

    def no_split(self, model: Any) -> list[str]:
        """The class's list, and those of the models inside it."""
        return sorted(getattr(model, "_no_split_modules", None) or ())

    def tie(self, model: Any, missing: Sequence[str]) -> None:
        """By the class's own list of ties. Of two tied names, the one that was in the checkpoint gives the
        value, whichever it is; two that were both there and differ stay two."""
        state = state_of(model)
        lacking = set(missing)
        for target, source in list(model.all_tied_weights_keys.items()):
            if not {target, source} <= state.keys() - lacking:
                continue
            if state[target].is_meta != state[source].is_meta:
                # One of them is on disk.
                model.all_tied_weights_keys.pop(target)
            elif _holds_tensors(state[target]):
                # Packed tensors that hold others cannot be compared by transformers.
                if _same(state[target], state[source]):
                    lacking.add(target)
                else:
                    model.all_tied_weights_keys.pop(target)
        model.tie_weights(missing_keys=lacking, recompute_mapping=False)

    def may_miss(self, model: Any, names: Sequence[str]) -> list[str]:
        """All but tied parameters of which another is there, and those that the class makes anew."""
        lacking = set(names)
        patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
        groups: dict[str, set[str]] = {}
        for target, source in model.all_tied_weights_keys.items():
            groups.setdefault(source, {source}).add(target)
        tied = {name for group in groups.values() if not group <= lacking for name in group}
        return [name for name in names if name not in tied and not any(one.search(name) for one in patterns)]

    def initialise(self, model: Any, names: Sequence[str]) -> None:
        """By the class's own `_init_weights`, which sees all other tensors marked as done."""
        anew = set(names)
        marked = []
        for path, module in model.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            own = {**module._parameters, **module._buffers}
            for name, value in own.items():
                if value is not None and prefix + name not in anew:
                    value._is_hf_initialized = True
                    marked.append(value)
            module._is_hf_initialized = not any(prefix + name in anew for name in own)
        try:
            model.initialize_weights()
        finally:
            for value in marked:
                # Backends make parameters anew from their attributes, and do not know this one.
                value.__dict__.pop("_is_hf_initialized", None)

    def finish(self, model: Any, config: Any, quantizer: Any, folder: Any, torch_dtype: Any) -> None:
        """Evaluation mode, the generation config of the folder, and for a packed model the adapter, the
        config and the flags by which transformers knows one."""
        model.eval()
        if folder is not None and model.can_generate():
            _load_generation_config(model, Path(folder))
        if quantizer is not None:
            from .quantizer import attach

            attach(model, quantizer, torch_dtype)

    def quantizer_for(self, model: Any) -> Quantizer | None:
        """See `foreign.quantizer_for`."""
        from .foreign import quantizer_for

        return quantizer_for(model)

    def stored_tensors(self, model: Any, quantizer: Any, state: Mapping[str, Any]) -> list[Stored]:
        """See `saving.stored_tensors`."""
        from .saving import stored_tensors

        return stored_tensors(model, quantizer, state)

    def unread(self, quantizer: Any) -> str | None:
        """See `saving.unread`."""
        from .saving import unread

        return unread(quantizer)

    def files(self, model: Any, quantizer: Any) -> Mapping[str, str]:
        """See `saved_config.files`."""
        from .saved_config import files

        return files(model, quantizer)


def _behind_auto(auto_class: Any, config: dict[str, Any]) -> tuple[Any, Any]:
    configs = require("transformers.models.auto.configuration_auto", _PURPOSE).CONFIG_MAPPING
    choose = require("transformers.models.auto.auto_factory", _PURPOSE)._get_model_class
    model_type = config.get("model_type")
    if model_type == "mistral" and "layer_types" in config:
        # Written so by some models of another family; transformers reads them as that one.
        model_type = "ministral"
    if model_type is None:
        raise ConfigError(f"config.json has no model_type, which {auto_class.__name__} goes by")
    if model_type not in configs:
        if "auto_map" in config:
            raise ConfigError(
                f'model_type "{model_type}" comes with code of its own, which is not run',
                hint="import its class and load with that",
            )
        raise ConfigError(f'transformers has no model_type "{model_type}"')
    made = configs[model_type].from_dict({**config, "model_type": model_type})
    mapping = auto_class._model_mapping
    if type(made) not in mapping:
        raise ConfigError(f'{auto_class.__name__} has no class for model_type "{model_type}"')
    model_class = choose(made, mapping)
    text = made.sub_configs.get("text_config")
    if text is not None and getattr(model_class, "config_class", None) == text:
        made = made.get_text_config()
    return model_class, made


def _own_config(model_class: Any, config: dict[str, Any]) -> Any:
    """The config object of a concrete class, also where `config` is that of a model around it."""
    config_class = model_class.config_class
    inner = getattr(config_class, "base_config_key", None)
    if inner and isinstance(config.get(inner), dict):
        config = config[inner]
    own_type = getattr(config_class, "model_type", None)
    if "model_type" in config and config["model_type"] != own_type:
        for value in config.values():
            if isinstance(value, dict) and value.get("model_type") == own_type:
                config = value
                break
    return config_class.from_dict({key: value for key, value in config.items() if key != "quantization_config"})


def _holds_tensors(value: Any) -> bool:
    found: bool = require("torch.utils._python_dispatch", _PURPOSE).is_traceable_wrapper_subclass(value)
    return found


def _same(one: Any, other: Any) -> bool:
    """Whether two tensors that hold others hold the same bits."""
    torch = require("torch", _PURPOSE)
    if type(one) is not type(other) or one.shape != other.shape:
        return False
    names = one.__tensor_flatten__()[0]
    if names != other.__tensor_flatten__()[0]:
        return False
    for name in names:
        left, right = getattr(one, name), getattr(other, name)
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        if not torch.equal(*(array.contiguous().reshape(-1).view(torch.uint8) for array in (left, right))):
            return False
    return True


def _load_generation_config(model: Any, folder: Path) -> None:
    GenerationConfig = require("transformers", _PURPOSE).GenerationConfig
    if (folder / _GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    elif (folder / "config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )
