"""Tensors of a result that are made of rows of source tensors: as entries for the rules, and as rows
of a request for the engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    counts = [
        _count(entry) - rows.first if rows.count is None else rows.count
        for rows, entry in zip(mapped.sources, sources, strict=True)
    ]
    shape = mapped.shape
    if shape is None:
        is_whole = len(sources) == 1 and mapped.sources[0].is_whole
        shape = first.shape if is_whole else (sum(counts), first.shape[-1]) if len(first.shape) > 1 else (sum(counts),)
    if any(entry.dtype != first.dtype or entry.format != first.format for entry in sources):
        return _mixed(mapped.name, shape, sources, counts)
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


def _mixed(name: str, shape: tuple[int, ...], sources: Sequence[Entry], counts: Sequence[int]) -> Entry:
    """Rows in different formats, as they are once they are decoded: in f32 where the types that this gives back
    differ too. Of the formats, the first that packs is named."""
    for entry in sources:
        if not entry.is_float:
            raise UnsupportedError(
                f'"{name}" joins "{sources[0].name}", stored as {sources[0].dtype}, and "{entry.name}", '
                f"stored as {entry.dtype}",
                hint="convert the model to one type first",
            )
    packed = next((entry for entry in sources if not entry.is_plain), None)
    dtypes = {entry.dtype for entry in sources}
    dtype = sources[0].dtype if len(dtypes) == 1 else "F32"
    weights = math.prod(shape)
    nbytes = sum(entry.nbytes * count // max(_count(entry), 1) for entry, count in zip(sources, counts, strict=True))
    return Entry(
        name,
        shape,
        dtype,
        FLOATS[dtype] if packed is None else packed.format,
        nbytes,
        weights,
        (Part(name, dtype, shape, nbytes),) if packed is None else tuple(p for entry in sources for p in entry.parts),
        sources[0].file,
        is_mixed=True,
    )


def _count(entry: Entry) -> int:
    return math.prod(entry.shape[:-1]) if len(entry.shape) > 1 else math.prod(entry.shape)
