"""Tensors of a result that are made of rows of source tensors: as entries for the rules, and as rows
of a request for the engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .decision import Decision
from .entry import FLOATS, Entry, Part
from .errors import UnsupportedError
from .mapping import MappedTensor
from .targets import COPY


def source_row(decision: Decision, mapped: MappedTensor | None, number: int) -> dict[str, Any]:
    """How the engine is asked for one tensor: `mapped` says what it is made of in checkpoint
    `number`, `None` that it is there under its own name."""
    name = decision.entry.name
    row: dict[str, Any] = {
        "checkpoint": number,
        "name": name if mapped is None else mapped.sources[0].name,
        "as": name,
        "format": decision.format,
        "params": dict(decision.params),
        "why": decision.why,
    }
    if mapped is not None and not mapped.is_renamed:
        if not (len(mapped.sources) == 1 and mapped.sources[0].is_whole):
            row["rows"] = [rows.to_dict() for rows in mapped.sources]
        if mapped.shape is not None:
            row["shape"] = list(mapped.shape)
        if mapped.add is not None:
            row["add"] = mapped.add
            if decision.format == COPY:
                # In the type that it has: what is added to is not copied.
                row["format"] = FLOATS[decision.entry.dtype]
    return row


def joined(mapped: MappedTensor, by_name: Mapping[str, Entry]) -> Entry:
    """The tensor of an architecture, as if a file held it."""
    if mapped.values is not None:
        count = len(mapped.values)
        part = Part(mapped.name, "F32", (count,), 4 * count)
        return Entry(mapped.name, (count,), "F32", "f32", 4 * count, count, (part,))
    sources = [by_name[rows.name] for rows in mapped.sources]
    first = sources[0]
    if mapped.is_renamed:
        return replace(first, name=mapped.name)
    for entry in sources:
        if entry.dtype != first.dtype or entry.format != first.format:
            raise UnsupportedError(
                f'"{mapped.name}" joins "{first.name}", stored as {first.dtype}, and "{entry.name}", '
                f"stored as {entry.dtype}",
                hint="convert the model to one type first",
            )
    count = sum(
        _count(entry) - rows.first if rows.count is None else rows.count
        for rows, entry in zip(mapped.sources, sources, strict=True)
    )
    shape = mapped.shape
    if shape is None:
        is_whole = len(sources) == 1 and mapped.sources[0].is_whole
        shape = first.shape if is_whole else (count, first.shape[-1]) if len(first.shape) > 1 else (count,)
    weights = math.prod(shape)
    nbytes = first.nbytes * weights // first.weights if first.weights else 0
    return replace(
        first,
        name=mapped.name,
        shape=shape,
        nbytes=nbytes,
        weights=weights,
        parts=(Part(mapped.name, first.dtype, shape, nbytes),) if first.is_plain else first.parts,
    )


def _count(entry: Entry) -> int:
    return math.prod(entry.shape[:-1]) if len(entry.shape) > 1 else math.prod(entry.shape)
