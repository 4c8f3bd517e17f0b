"""How tokens are drawn, as `generation_config.json` recommends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .hyperparameters import Pair
from .text_files import read_json

_KEYS = {
    "top_k": ("top_k", "i32"),
    "top_p": ("top_p", "f32"),
    "min_p": ("min_p", "f32"),
    "temperature": ("temp", "f32"),
    "repetition_penalty": ("penalty_repeat", "f32"),
}
"""Key in the file, and key and type in GGUF below `general.sampling`."""

_LARGEST = 2**31 - 1


def sampling_metadata(folder: Path) -> list[Pair]:
    """The pairs that recommend how to draw tokens; none where the model does not say."""
    told = read_json(folder / "generation_config.json") or {}
    return [
        (f"general.sampling.{key}", kind, int(told[name]) if kind == "i32" else float(told[name]))
        for name, (key, kind) in _KEYS.items()
        if _is_number(told.get(name))
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST
