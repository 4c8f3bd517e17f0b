"""GGUF blocks that are stored as rows of bytes, as weightpack saves them in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from .._lazy import require
from ..entry import Entry, Part
from ..errors import CheckpointError
from ..gguf.blocks import dequantize
from ..quantizers.gguf import block_sizes
from ..quantizers.gguf_stored import LEAF, type_of
from ..streaming import Job
from ..targets import COPY
from .source import Weights


class StoredRows(Weights):
    """The tensors of `weights`, of which those that `types` knows are blocks: described as a GGUF file would,
    with the shape of the weights. `shapes` has the shapes that their rows do not tell.

    Raises `CheckpointError` for such a tensor that holds no whole blocks.
    """

    def __init__(
        self, weights: Weights, types: Mapping[str, str | None], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._weights = weights
        self._types: dict[str, str] = {}
        self.is_lent = weights.is_lent
        self.metadata = weights.metadata
        entries = {}
        for name, entry in weights.entries.items():
            path = name.removesuffix(LEAF)
            kind = type_of(types, path) if name.endswith(LEAF) else None
            if kind is not None:
                self._types[name] = kind
                entry = _of_blocks(entry, kind, shapes.get(path))
            entries[name] = entry
        self.entries = entries

    def fill(self, jobs: Sequence[Job], out: Sequence[Sequence[Any]], threads: int | None) -> list[list[Any]]:
        """As in the base. What is wanted decoded is read as it is stored first."""
        torch = require("torch", "load models")
        wanted = [job.name in self._types and job.format != COPY for job in jobs]
        inner_jobs, inner_out = [], []
        for job, arrays, decodes in zip(jobs, out, wanted, strict=True):
            if decodes:
                if job.rows or job.add is not None:
                    raise CheckpointError(f'"{job.name}" is packed, and only decoded as a whole')
                arrays = [torch.empty(self._weights.entries[job.name].shape, dtype=torch.uint8)]
                job = Job(job.name, COPY)
            inner_jobs.append(job)
            inner_out.append(arrays)
        filled = self._read(inner_jobs, inner_out, threads)
        for number, decodes in enumerate(wanted):
            if decodes:
                (target,) = out[number]
                kind, name = self._types[jobs[number].name], jobs[number].name
                rows = filled[number][0].reshape(-1, self._weights.entries[name].shape[-1])
                decoded = dequantize(rows, kind, dtype=target.dtype, threads=threads)
                target.copy_(decoded.reshape(target.shape))
                filled[number] = [target]
        return filled

    def array(self, name: str) -> Any | None:
        """As in the base."""
        return self._weights.array(name)

    def close(self) -> None:
        """As in the base."""
        self._weights.close()

    def _read(self, jobs: Sequence[Job], out: Sequence[Sequence[Any]], threads: int | None) -> list[list[Any]]:
        """The jobs by the weights themselves; tensors in memory are taken from there."""
        found: list[list[Any]] = [list(arrays) for arrays in out]
        from_file = []
        for number, job in enumerate(jobs):
            held = self._weights.array(job.name) if job.name in self._types else None
            if held is None:
                from_file.append(number)
            else:
                found[number] = [held]
        if from_file:
            filled = self._weights.fill([jobs[n] for n in from_file], [out[n] for n in from_file], threads)
            for number, arrays in zip(from_file, filled, strict=True):
                found[number] = arrays
        return found


def _of_blocks(entry: Entry, kind: str, shape: tuple[int, ...] | None) -> Entry:
    weights, nbytes = block_sizes(kind)
    if entry.dtype != "U8" or not entry.shape or entry.shape[-1] % nbytes:
        raise CheckpointError(
            f'"{entry.name}" is {entry.dtype} {list(entry.shape)}, and config.json says that it holds blocks of '
            f"{kind}, of {nbytes} bytes"
        )
    rows = (*entry.shape[:-1], entry.shape[-1] // nbytes * weights)
    shape = rows if shape is None else shape
    if prod(shape) != prod(rows):
        raise CheckpointError(f'"{entry.name}" holds {prod(rows)} weights, and config.json says {list(shape)}')
    part = Part(entry.name, kind, rows, entry.nbytes)
    return replace(entry, shape=shape, dtype=kind, format=f"gguf:{kind.lower()}", weights=prod(shape), parts=(part,))
