"""weightpack behind transformers' own `from_pretrained`: written into transformers' tables, and taken out
again."""

from __future__ import annotations

from typing import Any

from ..._lazy import require
from ...errors import ConfigError
from ...quantizers.auto import config_class, quantizer_names
from ...quantizers.base import Requirement, check_version
from ..swaps import Swaps

_PURPOSE = "register with it"
_NEEDED = Requirement("transformers", "5.22", _PURPOSE)
_UNTOUCHED = frozenset({"gguf"})
"""transformers reads GGUF files by `gguf_file=`, in its own way."""
_OWN_CONFIG = frozenset({"quanto"})
"""Methods whose section of a `config.json` is read by weightpack: transformers takes what diffusers wrote
for its own default."""
_CHOICES = ("from_config", "merge_quantization_configs")
"""Methods of transformers that choose by a config, and know the classes of their own configs alone."""

_swaps = Swaps()
"""What `register` put into transformers' tables."""
_methods: dict[str, Any] = {}
"""The methods that `register` replaced."""


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
        _swaps.put(quantizers, name, WeightpackQuantizer)
        if name in _OWN_CONFIG or name not in configs or _swaps.has(configs, name):
            _swaps.put(configs, name, config_class(name))
    _choose_by_any_config()


def unregister() -> None:
    """Takes back `register`: transformers is as it was. Does nothing where that is so already."""
    _swaps.restore()
    for key, value in _methods.items():
        setattr(_tables()[2], key, value)
    _methods.clear()


def is_registered() -> bool:
    """Whether `register` is in force."""
    return bool(_swaps)


def _tables() -> tuple[dict[str, Any], dict[str, Any], Any]:
    auto = require("transformers.quantizers.auto", _PURPOSE)
    return auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AutoHfQuantizer


def _choose_by_any_config() -> None:
    """Lets transformers' methods take weightpack's configs too."""
    if _methods:
        return
    from .quantizer import host_config

    chooser = _tables()[2]
    methods = {name: chooser.__dict__[name] for name in _CHOICES}
    _methods.update(methods)

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
