"""A model that came from no GGUF file, as one: in the layout that a conversion of its folder would have.

Tensors get the names of the architecture where weightpack knows it, and keep their own elsewhere
(`convert --arch none`). Packed tensors are written as they are, and vectors and norms as float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from .. import gguf_rules, recipes
from .._lazy import require
from ..architectures import find_architecture
from ..assembly import joined, source_row
from ..decision import GGML_DIMENSIONS, GgufChoices, Target
from ..entry import FLOATS, Entry, Part
from ..errors import CheckpointError, ConfigError, UnsupportedError
from ..gguf_metadata import gguf_metadata
from ..host_target import ORIGINAL_SHAPE
from ..language.architecture import LanguageArchitecture
from ..mapping import ArchitecturePlan, Facts
from ..quantizers.gguf import block_sizes
from ..stored import Stored
from ..targets import COPY, find_format
from .gguf_draft import Draft

_FOLDER = "a path that does not end in .gguf gets a folder, under the model's own names"


def draft_anew(name: str, tensors: Sequence[Stored], config: Mapping[str, Any] | None, folder: Path | None) -> Draft:
    """The file of a model called `name`: `tensors` by the names that a checkpoint has for them, its
    `config.json`, and the folder that its tokenizer is in.

    Raises `ConfigError` for a language model whose tokenizer is not known, and `UnsupportedError` or
    `CheckpointError` for one that does not fit its architecture.
    """
    draft = Draft()
    entries = [_entry(stored) for stored in tensors]
    for stored, entry in zip(tensors, entries, strict=True):
        draft.source(stored.name, entry.dtype, entry.shape, stored.tensor)
    plan = _plan(entries, config, folder)
    mapped = {tensor.name: tensor for tensor in plan.tensors} if plan is not None else {}
    choices = _choices(plan, entries, config)
    if plan is not None:
        by_name = {entry.name: entry for entry in entries}
        entries = [joined(tensor, by_name) for tensor in plan.tensors]
        left_out = [f"not in the file: {one} ({why})" for one, why in plan.left_out.items()]
        for told in (*plan.warnings, *left_out):
            warnings.warn(told, stacklevel=4)
    target = Target(
        replace(find_format("f32"), name=COPY), "gguf", lambda name, shape, params: None, for_host=False, gguf=choices
    )
    decide = gguf_rules.built_in(entries, target)
    decisions = [decide(entry) for entry in entries]
    for decision in decisions:
        made = mapped.get(decision.entry.name)
        if made is not None and made.values is not None:
            torch = require("torch", "save models")
            draft.source(made.name, "F32", (len(made.values),), torch.tensor(made.values, dtype=torch.float32))
            made = None
        draft.tensors.append(source_row(decision, made, 0))
    draft.most_dimensions = choices.most_dimensions
    draft.pairs = gguf_metadata(decisions, config, name, plan.metadata if plan is not None else ())
    draft.pairs += _original_shapes(tensors, plan)
    return draft


def _entry(stored: Stored) -> Entry:
    """A tensor of the model as if a file held it, blocks in the rows that they lie in."""
    tensor, kind = stored.tensor, getattr(stored.tensor, "quant_type", None)
    nbytes = int(tensor.numel() * tensor.element_size())
    if kind is None:
        shape, dtype = tuple(stored.shape), stored.dtype
        format = FLOATS.get(dtype)
    else:
        weights, block = block_sizes(str(kind))
        shape, dtype = (*tensor.shape[:-1], tensor.shape[-1] // block * weights), str(kind)
        format = f"gguf:{dtype.lower()}"
    part = Part(stored.name, dtype, shape, nbytes)
    return Entry(stored.name, shape, dtype, format, nbytes, prod(shape), (part,))


def _plan(entries: Sequence[Entry], config: Mapping[str, Any] | None, folder: Path | None) -> ArchitecturePlan | None:
    architecture = find_architecture(None, config, [entry.name for entry in entries])
    if architecture is None:
        return None
    if isinstance(architecture, LanguageArchitecture) and folder is None:
        raise ConfigError(
            f"a {architecture.name} file holds the tokenizer, and the model does not know the folder with its own",
            hint=_FOLDER,
        )
    try:
        return architecture.plan(entries, config, folder)
    except (CheckpointError, UnsupportedError) as error:
        raise type(error)(error.message, hint=_FOLDER) from error


def _choices(plan: ArchitecturePlan | None, entries: Sequence[Entry], config: Mapping[str, Any] | None) -> GgufChoices:
    """What the rules of conversions go by."""
    is_image = plan.recipes == recipes.IMAGE if plan is not None else config is not None and "_class_name" in config
    most = max((len(entry.shape) for entry in entries), default=0)
    return GgufChoices(
        recipes.IMAGE if is_image else recipes.LLAMA,
        facts=plan.facts if plan is not None else Facts(),
        mapped={tensor.name: tensor for tensor in plan.tensors} if plan is not None else {},
        most_dimensions=max(most, GGML_DIMENSIONS) if is_image else GGML_DIMENSIONS,
    )


def _original_shapes(tensors: Sequence[Stored], plan: ArchitecturePlan | None) -> list[tuple[str, str, Any]]:
    """Pairs with the shapes of weights whose rows are not those of their blocks."""
    pairs: list[tuple[str, str, Any]] = []
    names = {tensor.sources[0].name: tensor.name for tensor in plan.tensors if tensor.sources} if plan else {}
    for stored in tensors:
        shape = getattr(stored.tensor, "quant_shape", None)
        if shape is not None and tuple(shape) != _entry(stored).shape:
            key = ORIGINAL_SHAPE + names.get(stored.name, stored.name)
            pairs.append((key, "[i32]", [int(size) for size in shape]))
    return pairs
