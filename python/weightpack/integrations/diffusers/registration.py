"""weightpack behind diffusers' own `from_pretrained`: written into diffusers' tables, and taken out again."""

from __future__ import annotations

from typing import Any

from ..._lazy import require
from ...quantizers.auto import config_class, quantizer_names
from ..swaps import Swaps

_PURPOSE = "register with it"
_OWN_CONFIG = frozenset({"quanto", "torchao", "modelopt"})
"""Methods whose section of a `config.json` is read by weightpack: diffusers reads a list that
transformers wrote as its own default, or cannot make its config at all."""

_swaps = Swaps()
"""What `register` put into diffusers' tables."""


def register() -> None:
    """Makes diffusers' own `from_pretrained` pack through weightpack.

    From now on every quantization config that diffusers knows for bitsandbytes, quanto, torchao and
    ModelOpt, diffusers' own object or weightpack's, leads to weightpack's quantizer: for one model, and
    for the models of a pipeline. The same bytes come out, in the same classes; no GPU is needed to pack.
    A GGUF file that `from_single_file` reads stays with diffusers, unless the config is weightpack's.
    Backends added by `weightpack.register_quantizer` are known to diffusers too. Calling it again only
    adds what is new. Raises `BackendError` where diffusers is not installed.
    """
    from .quantizer import WeightpackQuantizer

    quantizers, configs = _tables()
    for name in quantizer_names():
        own = config_class(name)
        theirs = configs.get(name)
        if theirs is own:
            continue
        chosen: Any = WeightpackQuantizer
        if name == "gguf":
            chosen = _by_config(own, WeightpackQuantizer, _swaps.before(quantizers, name))
        _swaps.put(quantizers, name, chosen)
        if theirs is None or name in _OWN_CONFIG:
            _swaps.put(configs, name, own)
            if theirs is not None:
                # A pipeline's config takes any object whose class is in the table.
                _swaps.put(configs, f"diffusers {name}", theirs)
        else:
            _swaps.put(configs, f"weightpack {name}", own)


def _by_config(own: type, ours: Any, theirs: Any) -> Any:
    """Calls `ours` with a config of class `own`, and `theirs` with any other."""

    def choose(quantization_config: Any, **options: Any) -> Any:
        return (ours if isinstance(quantization_config, own) else theirs)(quantization_config, **options)

    return choose


def unregister() -> None:
    """Takes back `register`: diffusers' tables are as they were. Does nothing where that is so already."""
    _swaps.restore()


def is_registered() -> bool:
    """Whether `register` is in force."""
    return bool(_swaps)


def _tables() -> tuple[dict[str, Any], dict[str, Any]]:
    auto = require("diffusers.quantizers.auto", _PURPOSE)
    return auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING
