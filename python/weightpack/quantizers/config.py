"""What every quantization config has in common: fields, checks, and its way to JSON and back.

A config is a frozen dataclass whose fields are the keys of `config.json`'s `quantization_config`.
Types of elements are kept by name (`"bfloat16"`), lists as tuples; `to_dict` gives plain JSON values
and no private keys. Configs written by diffusers and by transformers are read alike.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import os
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..errors import ConfigError

Config = TypeVar("Config", bound="QuantizationConfig")


class QuantizationMethod(str, Enum):
    """The values of `quant_method` that weightpack knows."""

    BITS_AND_BYTES = "bitsandbytes"
    GGUF = "gguf"
    QUANTO = "quanto"
    TORCHAO = "torchao"
    MODELOPT = "modelopt"

    def __str__(self) -> str:
        return self.value


class _Method(str):
    """The name of someone else's backend, with a `value` like a `QuantizationMethod`: diffusers reads it."""

    @property
    def value(self) -> str:
        return str(self)


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Base of all configs.

    A subclass is a frozen dataclass that sets `quant_method`, lists its fields, and checks and
    normalises them in `__post_init__` (with `_set`). `ALIASES` maps keys that some host writes to
    field names, `IGNORED` are keys that hosts write and that mean nothing here.
    """

    quant_method: ClassVar[str]
    ALIASES: ClassVar[Mapping[str, str]] = {}
    IGNORED: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls) -> None:
        """Lets `quant_method` be given as a plain name."""
        super().__init_subclass__()
        name = cls.__dict__.get("quant_method")
        if type(name) is str:
            known = name in {method.value for method in QuantizationMethod}
            cls.quant_method = QuantizationMethod(name) if known else _Method(name)

    @property
    def quantizer_name(self) -> str:
        """Name of its quantizer in the registry: `bitsandbytes_4bit`, `gguf` and so on."""
        return str(self.quant_method)

    @property
    def skip_list(self) -> tuple[str, ...]:
        """Entries that name the modules to leave as they are; see `weightpack.matcher`."""
        return getattr(self, "modules_to_not_convert", None) or ()

    def with_loading_choices(self: Config, given: Any) -> Config:
        """This config of a packed model, with what `given`, one of the same method, may still choose:
        by default nothing. A backend whose config also says how to compute overrides this."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """All fields and `quant_method`, as JSON values of their own."""
        fields = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {**fields, "quant_method": str(self.quant_method)}

    def to_diff_dict(self) -> dict[str, Any]:
        """`quant_method` and the fields that differ from their default."""
        different = {}
        for field in dataclasses.fields(self):
            default = field.default_factory() if callable(field.default_factory) else field.default
            value = getattr(self, field.name)
            if default is dataclasses.MISSING or value != default:
                different[field.name] = _plain(value)
        return {**different, "quant_method": str(self.quant_method)}

    def to_json_string(self, use_diff: bool = True) -> str:
        """As JSON text, sorted and indented; only what differs from the defaults if `use_diff`."""
        fields = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_json_string` with all fields."""
        Path(path).write_text(self.to_json_string(use_diff=False), encoding="utf-8")

    @classmethod
    def from_dict(
        cls: type[Config], config_dict: Mapping[str, Any], *, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """A config from a dictionary as any host writes it; `kwargs` take precedence over it.

        Private keys and `quant_method` are passed over. With `return_unused_kwargs` gives the config
        and those of `kwargs` that are no field. Raises `ConfigError` for an unknown key.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        own = {key: value for key, value in kwargs.items() if key in fields}
        left = {key: value for key, value in kwargs.items() if key not in fields}
        config = cls(**{**cls._read(config_dict), **own})
        if return_unused_kwargs:
            return config, left
        if left:
            raise unknown_key(next(iter(left)), fields, cls.__name__)
        return config

    @classmethod
    def from_file_beside(cls: type[Config], content: Any) -> Config:
        """The config in a backend's own file next to the weights, from its parsed JSON; see `FILES_BESIDE` in
        `weightpack.quantizers.auto`. Raises `ConfigError` where the backend has no such file."""
        raise ConfigError(f"{cls.quant_method} keeps its config in config.json alone")

    @classmethod
    def from_json_file(cls: type[Config], path: str | os.PathLike[str]) -> Config:
        """Reads what `to_json_file` wrote."""
        config: Config = cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        return config

    @classmethod
    def _read(cls, config_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The fields in a dictionary that a host wrote."""
        names = {field.name for field in dataclasses.fields(cls)}
        found: dict[str, Any] = {}
        for key, value in config_dict.items():
            name = cls.ALIASES.get(key, key)
            if name in names:
                if name in found and found[name] != value:
                    raise ConfigError(f"{cls.__name__}: {key} {value!r} contradicts {name} {found[name]!r}")
                found[name] = copy.deepcopy(value)
            elif key != "quant_method" and key not in cls.IGNORED and not key.startswith("_"):
                raise unknown_key(key, names, cls.__name__)
        return found

    def _set(self, name: str, value: Any) -> None:
        """Sets a field of the frozen object while it is made."""
        object.__setattr__(self, name, value)


def unknown_key(key: str, known: Iterable[str], owner: str) -> ConfigError:
    """The error for a key that a config does not have; names the closest one that it has."""
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}"
    return ConfigError(f'{owner} has no field "{key}"', hint=hint)


def names_of(entries: Any, field: str) -> tuple[str, ...] | None:
    """A list of module names as a tuple of its own; `None` stays `None`. Raises `ConfigError`."""
    if entries is None:
        return None
    if isinstance(entries, str):
        return (entries,)
    names: tuple[str, ...] = tuple(entries)
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{field} {list(names)!r} does not hold names of modules")
    return names


def one_of(value: Any, choices: Iterable[str], field: str) -> str:
    """`value`, which must be one of `choices`. Raises `ConfigError` that lists them."""
    choices = list(choices)
    if value not in choices:
        raise ConfigError(f"{field} {value!r} is none of {', '.join(choices)}")
    return str(value)


def flag(value: Any, field: str) -> bool:
    """`value`, which must be a bool. Raises `ConfigError`."""
    if not isinstance(value, bool):
        raise ConfigError(f"{field} {value!r} is neither True nor False")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Enum) else value
