"""A GGUF file on its way back to a host: its tensors under the names that transformers or diffusers has
for them, and in the shapes that they had before a writer flattened them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import keymaps
from .assembly import joined
from .checkpoint import Checkpoint
from .entry import Entry
from .errors import CheckpointError, ConfigError
from .language.host_names import host_names
from .mapping import MappedTensor, Rows

NAMES = ("source", "host")
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Key of the shape that a tensor had before ComfyUI-GGUF's converter made rows of 256 of it."""


@dataclass(frozen=True)
class HostModel:
    """The tensors of a result as they are there (`entries`), and what each is made of by its name."""

    entries: Sequence[Entry]
    mapped: Mapping[str, MappedTensor] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def prepare(checkpoint: Checkpoint, entries: Sequence[Entry], names: str) -> HostModel:
    """The tensors under the names of the source, or, for `names` "host", of the host.

    Raises `ConfigError` where the source is no GGUF file, `UnsupportedError` where the names are not
    known.
    """
    if checkpoint.container != "gguf":
        if names == "host":
            raise ConfigError("names of a host are given to tensors of a GGUF file, and the source is none")
        return HostModel(entries)
    by_name = {entry.name: entry for entry in entries}
    shapes = _original_shapes(checkpoint.metadata, by_name)
    if names == "source":
        if not shapes:
            return HostModel(entries)
        return _mapped(
            [MappedTensor(entry.name, (Rows(entry.name),), shapes.get(entry.name)) for entry in entries], by_name
        )
    stored = str(checkpoint.metadata.get("general.architecture", ""))
    keymap = keymaps.find(stored if stored in keymaps.NAMES else None, None, by_name)
    if keymap is not None:
        plan = keymap.host_plan(entries)
        return _mapped(plan.tensors, by_name, plan.left_out, "config.json is not made")
    found = host_names(entries, checkpoint.metadata)
    missing = "config.json and the tokenizer's files are not made"
    return _mapped(found.tensors, by_name, found.left_out, missing)


def _mapped(
    tensors: Sequence[MappedTensor],
    by_name: Mapping[str, Entry],
    left_out: Mapping[str, str] | None = None,
    missing: str = "",
) -> HostModel:
    warnings = [f"not in the result: {name} ({why})" for name, why in (left_out or {}).items()]
    if missing:
        warnings.append(f"{missing}: copy those of the original model beside the result")
    return HostModel(
        [joined(tensor, by_name) for tensor in tensors], {tensor.name: tensor for tensor in tensors}, tuple(warnings)
    )


def _original_shapes(metadata: Mapping[str, Any], by_name: Mapping[str, Entry]) -> dict[str, tuple[int, ...]]:
    """Shapes that the file's pairs say tensors had. Raises `CheckpointError` for one that holds
    another number of weights."""
    shapes = {}
    for key, value in metadata.items():
        name = key.removeprefix(ORIGINAL_SHAPE)
        if name == key or name not in by_name:
            continue
        is_shape = isinstance(value, list) and all(isinstance(size, int) and size > 0 for size in value)
        if not is_shape or math.prod(value) != by_name[name].weights:
            raise CheckpointError(
                f'{key} is {value}, and tensor "{name}" of shape {list(by_name[name].shape)} has no such shape'
            )
        if tuple(value) != by_name[name].shape:
            shapes[name] = tuple(value)
    return shapes
