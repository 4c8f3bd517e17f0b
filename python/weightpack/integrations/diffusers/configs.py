"""The quantization config that diffusers saves with a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from ..._lazy import require
from ...quantizers.auto import AutoQuantizer
from ...quantizers.base import Quantizer
from ...skip_list import settle, skipped_by_diffusers


def saved_config(config: Any, model: Any, quantizer: Quantizer) -> tuple[Any, str | None]:
    """The config that goes into the `config.json` of `model`, whose layers are in place.

    It is `config`, unless diffusers on its own would read its skip list otherwise than weightpack has:
    then its list names what was left unpacked, in words that diffusers reads the same way. Where there
    are no such words, also a packed layer that diffusers would take for one left unpacked.
    """
    if quantizer.name not in _READERS:
        return config, None
    field, reads = _READERS[quantizer.name]
    fixed = fixed_entries(model)
    packed = set(quantizer.quantized)
    linear = require("torch", "load models").nn.Linear
    # Only such layers does diffusers look up in these lists, and those of derived classes too.
    kept = {path for path, module in model.named_modules() if path not in packed and isinstance(module, linear)}
    given = [*quantizer.config.skip_list, *fixed]
    if all(reads(given, path) for path in kept) and not any(reads(given, path) for path in packed):
        return config, None
    if quantizer.name == "quanto":
        entries = sorted({path.rpartition(".")[2] for path in kept})
    else:
        entries, _ = settle("diffusers", packed, kept, fixed=fixed)
    misread = sorted(path for path in packed if reads([*entries, *fixed], path))
    if misread:
        return config, misread[0]
    return dataclasses.replace(AutoQuantizer.as_config(config), **{field: tuple(entries)}), None


def misread_warning(path: str) -> str:
    """What to say of a model for which there is no such config: `path` is the layer that `saved_config` gave."""
    return (
        f"no skip list tells diffusers which layers are not packed: it takes {path} for one of them; what is "
        "saved loads with weightpack alone"
    )


def _quanto_skips(entries: Sequence[str], path: str) -> bool:
    """diffusers compares the last segment of a path."""
    return path.rpartition(".")[2] in entries


def _bitsandbytes_skips(entries: Iterable[str], path: str) -> bool:
    return skipped_by_diffusers(list(entries), path)


def left_unpacked(model: Any, quantizer: Quantizer, in_fp32: Sequence[str]) -> list[str]:
    """Those of the modules kept in float32 that are not packed either: all of them, except that quanto in
    diffusers compares the entries of the model's class with the last segment of a path alone. What it
    packs all the same has to be packed here too, or diffusers could not load the saved model."""
    if quantizer.name != "quanto":
        return list(in_fp32)
    own = fixed_entries(model)
    paths = [
        path for path, module in model.named_modules() if _quanto_skips(own, path) and quantizer.takes(path, module)
    ]
    return [*(entry for entry in in_fp32 if entry not in own), *paths]


def fixed_entries(model: Any) -> list[str]:
    """The class's own list of what stays in float32."""
    entries = model._keep_in_fp32_modules or ()
    return [entries] if isinstance(entries, str) else list(entries)


_READERS: dict[str, tuple[str, Any]] = {
    "bitsandbytes_4bit": ("llm_int8_skip_modules", _bitsandbytes_skips),
    "bitsandbytes_8bit": ("llm_int8_skip_modules", _bitsandbytes_skips),
    "quanto": ("modules_to_not_convert", _quanto_skips),
}
"""For each quantizer whose list diffusers applies to packed files too: its field, and how diffusers reads it."""
