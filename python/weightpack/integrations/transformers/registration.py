"""weightpack behind transformers' own `from_pretrained`: written into transformers' tables, and taken out
again."""

from __future__ import annotations

from typing import Any

from ..._lazy import require
from ...errors import ConfigError
from ...quantizers.auto import config_class, quantizer_names
from ...quantizers.base import Requirement, check_version

_PURPOSE = "register with it"
_NEEDED = Requirement("transformers", "5.22", _PURPOSE)
_UNTOUCHED = frozenset({"gguf"})
"""transformers reads GGUF files by `gguf_file=`, in its own way."""
_OWN_CONFIG = frozenset({"quanto"})
"""Methods whose section of a `config.json` is read by weightpack: transformers takes what diffusers wrote
for its own default."""
_CHOICES = ("from_config", "merge_quantization_configs")
"""Methods of transformers that choose by a config, and know the classes of their own configs alone."""
_MISSING = object()

_before: dict[str, dict[str, Any]] = {}
"""What stood in each table, by key, before `register`; and the methods."""


def register() -> None:
    """Makes transformers' own `from_pretrained` pack through weightpack.

    From now on every quantization config for bitsandbytes, quanto, torchao and ModelOpt, transformers' own
    object or weightpack's, leads to weightpack's quantizer, and packed checkpoints of these methods are
    read by it. The same bytes come out, in the same classes. Backends added by
    `weightpack.register_quantizer` are known to transformers too. GGUF files stay with transformers.
    Calling it again only adds what is new. Raises `BackendError` where transformers is not installed, or
    is older than 5.22.
    """
    check_version(_NEEDED, require("transformers", _PURPOSE).__version__)
    from .quantizer import WeightpackQuantizer

    quantizers, configs, _ = _tables()
    for name in quantizer_names():
        if name in _UNTOUCHED:
            continue
        _put("quantizers", quantizers, name, WeightpackQuantizer)
        if name in _OWN_CONFIG or name not in configs or name in _before.get("configs", {}):
            _put("configs", configs, name, config_class(name))
    _choose_by_any_config()


def unregister() -> None:
    """Takes back `register`: transformers is as it was. Does nothing where that is so already."""
    if not _before:
        return
    quantizers, configs, chooser = _tables()
    for entries, before in ((quantizers, _before["quantizers"]), (configs, _before.get("configs", {}))):
        for key, value in before.items():
            if value is _MISSING:
                entries.pop(key, None)
            else:
                entries[key] = value
    for key, value in _before["methods"].items():
        setattr(chooser, key, value)
    _before.clear()


def is_registered() -> bool:
    """Whether `register` is in force."""
    return bool(_before)


def _tables() -> tuple[dict[str, Any], dict[str, Any], Any]:
    auto = require("transformers.quantizers.auto", _PURPOSE)
    return auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AutoHfQuantizer


def _put(table: str, entries: dict[str, Any], key: str, value: Any) -> None:
    _before.setdefault(table, {}).setdefault(key, entries.get(key, _MISSING))
    entries[key] = value


def _choose_by_any_config() -> None:
    """Lets transformers' methods take weightpack's configs too."""
    if "methods" in _before:
        return
    from .quantizer import host_config

    chooser = _tables()[2]
    methods = {name: chooser.__dict__[name] for name in _CHOICES}
    _before["methods"] = methods

    def known(config: Any) -> Any:
        if isinstance(config, config_class("gguf")):
            raise ConfigError(
                "transformers reads GGUF files in its own way, from gguf_file=",
                hint="weightpack.from_pretrained takes the config",
            )
        return host_config(config)

    def from_config(cls: Any, /, quantization_config: Any, **options: Any) -> Any:
        return methods["from_config"].__func__(cls, known(quantization_config), **options)

    def merge_quantization_configs(
        cls: Any, /, quantization_config: Any, quantization_config_from_args: Any = None
    ) -> Any:
        merge = methods["merge_quantization_configs"].__func__
        return merge(cls, known(quantization_config), known(quantization_config_from_args))

    chooser.from_config = classmethod(from_config)
    chooser.merge_quantization_configs = classmethod(merge_quantization_configs)
