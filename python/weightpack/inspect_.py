"""What a checkpoint holds, from its headers alone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from . import model_config
from .checkpoint import Checkpoint, open_checkpoint
from .entry import FLOATS, Entry
from .errors import UnsupportedError
from .packings.table import holds, sources_of, unrecognised
from .report import CheckpointInfo, FileReport, TensorInfo
from .rules import GGUF_LONGEST_NAME

__all__ = ["CheckpointInfo", "inspect"]


def inspect(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Reads the headers of the checkpoint at `path` (a file, a model folder or a pipeline folder).

    Gives every tensor with shape, stored type, detected format and size, and sentences about what a
    loader would stumble on. Raises `CheckpointError` for malformed files, `OSError` for unreadable
    ones.
    """
    with open_checkpoint(path) as checkpoint:
        entries = list(checkpoint.values())
        method, problems = _problems(checkpoint, entries)
        total = sum(entry.nbytes for entry in entries)
        weights = sum(entry.weights for entry in entries)
        return CheckpointInfo(
            path=str(path),
            container=checkpoint.container,
            files=tuple(FileReport(str(file["path"]), file["bytes"]) for file in checkpoint.files),
            tensors=tuple(_tensor(entry) for entry in entries),
            weights=weights,
            bytes=total,
            bits_per_weight=8 * total / weights if weights else 0.0,
            formats=_formats(entries),
            metadata=checkpoint.metadata,
            method=method,
            problems=tuple(problems),
        )


def shown_format(entry: Entry) -> str:
    """The format of a tensor, or its stored type where no format decodes it."""
    return entry.format or FLOATS.get(entry.dtype, entry.dtype)


def _tensor(entry: Entry) -> TensorInfo:
    return TensorInfo(
        entry.name, entry.shape, entry.dtype, entry.format, entry.nbytes, entry.bits_per_weight, entry.file
    )


def _formats(entries: Iterable[Entry]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for entry in entries:
        row = counts.setdefault(shown_format(entry), {"tensors": 0, "weights": 0, "bytes": 0})
        row["tensors"] += 1
        row["weights"] += entry.weights
        row["bytes"] += entry.nbytes
    return dict(sorted(counts.items(), key=lambda item: -item[1]["bytes"]))


def _problems(checkpoint: Checkpoint, entries: list[Entry]) -> tuple[str | None, list[str]]:
    problems = list(checkpoint.warnings)
    methods: list[str] = []
    for model in checkpoint.models:
        label = f"{model.component}: " if model.component else ""
        prefix = f"{model.component}/" if model.component else ""
        own = [entry for entry in entries if entry.name.startswith(prefix)]
        packed = {e.format: backends for e in own if (backends := sources_of(e.format))}
        try:
            method = model_config.source_method(model.config)
        except UnsupportedError as error:
            methods.append(_named_method(model.config))
            problems.append(label + error.message)
            continue
        if method is not None:
            methods.append(method)
        untold = [backends[0] for backends in packed.values() if method not in backends]
        if untold and model.config is not None:
            problems.append(f"{label}weights are packed by {min(untold)}, and config.json does not say so")
        is_held = method is not None and any(holds(method, found) for found in packed)
        if method is not None and not is_held and not unrecognised(e.name for e in own).get(method):
            problems.append(f"{label}config.json says {method}, and no weight is packed")

    problems += _orphans(entries, methods)
    unknown = [e.name for e in entries if e.format is None and (not e.is_plain or e.dtype.startswith("type "))]
    if unknown:
        problems.append(f"{_count(unknown, 'tensor')} of a type that is not decoded: {unknown[0]}")
    empty = [e.name for e in entries if e.weights == 0]
    if empty:
        problems.append(f"{_count(empty, 'tensor')} without a weight: {empty[0]}")
    if checkpoint.container == "gguf":
        long = [e.name for e in entries if len(e.name.encode()) > GGUF_LONGEST_NAME]
        if long:
            problems.append(f"{_count(long, 'name')} longer than {GGUF_LONGEST_NAME} bytes: {long[0]}")
    return ", ".join(dict.fromkeys(methods)) or None, problems


def _orphans(entries: Iterable[Entry], methods: Iterable[str]) -> list[str]:
    """Sentences about arrays of packed weights that are not decoded, each told once: as those of the backend
    that the config names, where several have arrays of that name."""
    found = unrecognised(entry.name for entry in entries)
    problems = []
    told: set[str] = set()
    for backend in (*(method for method in methods if method in found), *found):
        orphans = [name for name in found[backend] if name not in told]
        told.update(orphans)
        if orphans:
            problems.append(f"{_count(orphans, 'array')} of {backend} without a packed weight: {orphans[0]}")
    return problems


def _named_method(config: Any) -> str:
    for holder in [config, *(value for value in config.values() if isinstance(value, dict))]:
        found = holder.get("quantization_config") or holder.get("compression_config")
        if isinstance(found, dict):
            return str(found.get("quant_method"))
    return "unknown"


def _count(items: list[str], word: str) -> str:
    return f"{len(items)} {word}" if len(items) == 1 else f"{len(items)} {word}s"
