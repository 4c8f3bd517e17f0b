"""Models that belong to no host: any `torch.nn.Module` class, and the base class that gives it both methods."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError
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


class ModelMixin:
    """Gives a person's own `torch.nn.Module` `from_pretrained` and `dequantize`.

    ```python
    class Net(weightpack.ModelMixin, torch.nn.Module):
        def __init__(self, width: int): ...

    net = Net.from_pretrained("folder", quantization_config=weightpack.BitsAndBytesConfig(load_in_4bit=True))
    ```

    The keys of the folder's `config.json` are the arguments of `__init__`; `config` is set to them.
    """

    @classmethod
    def from_pretrained(cls, path: Any, **options: Any) -> Any:
        """As `weightpack.from_pretrained(cls, path, ...)`."""
        from .load import from_pretrained

        return from_pretrained(cls, path, **options)

    def dequantize(self, dtype: Any = None) -> Any:
        """Puts ordinary layers with decoded weights in place of packed ones; gives the model.

        `dtype` is their type, by default the one that the weights were packed from. Raises `ConfigError`
        for a model that is not packed.
        """
        from ..quantizers.base import quantizer_of

        quantizer = quantizer_of(self)
        if quantizer is None:
            raise ConfigError("the model is not packed")
        model = quantizer.dequantize(self, dtype=dtype)
        del model.hf_quantizer
        model.is_quantized = False
        if isinstance(model.config, dict):
            model.config.pop("quantization_config", None)
        return model


def _title(model_class: Any) -> str:
    return str(getattr(model_class, "__name__", model_class))
