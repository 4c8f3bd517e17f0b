"""Models that belong to no host: any `torch.nn.Module` class."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from ..folder import CONFIG
from ..stored import Stored, distinct
from .host import KeyPlan, Target


class PlainHost:
    """Builds `model_class(**config)`, or `model_class.from_config(config)` where there is one."""

    name = "plain"
    stem: str | None = None

    def load_config(self, model_class: Any, config: Mapping[str, Any], folder: Any) -> tuple[Any, Any]:
        """The class itself, and the config without what only describes it."""
        return model_class, {key: value for key, value in config.items() if not key.startswith("_")}

    def build(self, model_class: Any, config: Any, torch_dtype: Any) -> Any:
        """Raises `ConfigError` where the config has no value for an argument, or one too many."""
        if callable(getattr(model_class, "from_config", None)):
            return model_class.from_config(config)
        signature = inspect.signature(model_class)
        takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in signature.parameters.values())
        arguments = {key: value for key, value in config.items() if takes_all or key in signature.parameters}
        lacking = [
            one.name
            for one in signature.parameters.values()
            if one.default is inspect.Parameter.empty
            and one.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
            and one.name not in arguments
        ]
        if lacking:
            raise ConfigError(
                f"{_title(model_class)} takes {', '.join(lacking)}, which config.json does not give",
                hint="config= takes a dictionary of arguments",
            )
        return model_class(**arguments)

    def default_dtype(self, config: Any, stored: Any, quantized: bool) -> Any:
        """The stored type."""
        return stored

    def plan_keys(self, model: Any, entries: Mapping[str, tuple[int, ...]]) -> KeyPlan:
        """Keys are the names of parameters and buffers."""
        return KeyPlan([Target(name, (name,)) for name in entries])

    def protected(self, model: Any) -> Iterable[str]:
        """Nothing but the class's own list, `_modules_to_not_convert`."""
        return tuple(getattr(model, "_modules_to_not_convert", None) or ())

    def keep_in_fp32(self, model: Any, torch_dtype: Any) -> Iterable[str]:
        """The class's own list, `_keep_in_fp32_modules`."""
        return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())

    def no_split(self, model: Any) -> list[str]:
        """The class's own list, `_no_split_modules`."""
        return list(getattr(model, "_no_split_modules", None) or ())

    def tie(self, model: Any, missing: Sequence[str]) -> None:
        """Calls `tie_weights`, where the class has it."""
        if callable(getattr(model, "tie_weights", None)):
            model.tie_weights()

    def may_miss(self, model: Any, names: Sequence[str]) -> list[str]:
        """All of them matter."""
        return list(names)

    def initialise(self, model: Any, names: Sequence[str]) -> None:
        """By `reset_parameters` of a fresh layer; what has none becomes zeros, and ones in a norm's weight."""
        from .missing import initialise

        initialise(model, names)

    def finish(self, model: Any, config: Any, quantizer: Any, folder: Any, torch_dtype: Any) -> None:
        """Keeps the config where the class does not."""
        if not hasattr(model, "config"):
            model.config = dict(config)
        if quantizer is not None and isinstance(model.config, dict):
            model.config["quantization_config"] = quantizer.config.to_dict()

    def stored_tensors(self, model: Any, quantizer: Any, state: Mapping[str, Any]) -> list[Stored]:
        """As they are, each memory under its first name."""
        return [Stored(name, tensor) for name, tensor in distinct(state).items()]

    def files(self, model: Any, quantizer: Any) -> Mapping[str, str]:
        """`config.json`: the model's `config`, and how it is packed."""
        own = getattr(model, "config", None) or {}
        if not isinstance(own, Mapping):
            raise ConfigError(f"the config of {_title(type(model))} is a {type(own).__name__}, expected a dictionary")
        fields = {key: value for key, value in own.items() if key != "quantization_config"}
        if quantizer is not None:
            fields["quantization_config"] = quantizer.config.to_dict()
        try:
            return {CONFIG: json.dumps(fields, indent=2) + "\n"}
        except TypeError as error:
            raise ConfigError(f"the config of {_title(type(model))} is no JSON: {error}") from error


def _title(model_class: Any) -> str:
    return str(getattr(model_class, "__name__", model_class))
