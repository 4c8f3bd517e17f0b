"""The quantization config that diffusers saves with a model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from ...quantizers.auto import AutoQuantizer
from ...quantizers.base import Quantizer
from ...skip_list import settle, skipped_by_diffusers


def saved_config(config: Any, model: Any, quantizer: Quantizer) -> Any:
    """The config that goes into the `config.json` of `model`, whose layers are in place.

    It is `config`, unless diffusers on its own would read its skip list otherwise than weightpack has:
    then its list names what was left unpacked, in words that diffusers reads the same way. Warns where
    there are no such words.
    """
    if quantizer.pre_quantized or quantizer.name not in _READERS:
        return config
    field, reads = _READERS[quantizer.name]
    fixed = model._keep_in_fp32_modules or ()
    fixed = [fixed] if isinstance(fixed, str) else list(fixed)
    packed = set(quantizer.quantized)
    kept = {
        path for path, module in model.named_modules() if path and path not in packed and quantizer.takes(path, module)
    }
    given = [*quantizer.config.skip_list, *fixed]
    if all(reads(given, path) for path in kept) and not any(reads(given, path) for path in packed):
        return config
    if quantizer.name == "quanto":
        entries = sorted({path.rpartition(".")[2] for path in kept})
    else:
        entries, _ = settle("diffusers", packed, kept, fixed=fixed)
    misread = sorted(path for path in packed if reads([*entries, *fixed], path))
    if misread:
        warnings.warn(
            f"no skip list makes diffusers itself leave out the same layers: it would take {misread[0]} for one "
            "of them; once saved, the model loads with weightpack alone",
            stacklevel=4,
        )
        return config
    return dataclasses.replace(AutoQuantizer.as_config(config), **{field: tuple(entries)})


def _quanto_skips(entries: Sequence[str], path: str) -> bool:
    """diffusers compares the last segment of a path."""
    return path.rpartition(".")[2] in entries


def _bitsandbytes_skips(entries: Iterable[str], path: str) -> bool:
    return skipped_by_diffusers(list(entries), path)


_READERS: dict[str, tuple[str, Any]] = {
    "bitsandbytes_4bit": ("llm_int8_skip_modules", _bitsandbytes_skips),
    "bitsandbytes_8bit": ("llm_int8_skip_modules", _bitsandbytes_skips),
    "quanto": ("modules_to_not_convert", _quanto_skips),
}
"""For each quantizer whose list diffusers applies to packed files too: its field, and how diffusers reads it."""
