"""Importance vectors: how much each column of a matrix counts, as llama.cpp measures it.

Its `llama-imatrix` writes a GGUF file (`general.type` "imatrix") with two arrays for each tensor of
the model that it was measured on: `<tensor>.in_sum2`, sums of squared activations of each column, and
`<tensor>.counts`, how many activations those are the sums of. Tensors go by their GGUF names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import Checkpoint
from .entry import Entry
from .errors import CheckpointError
from .folder import Model
from .recipes import OTHER, TOKEN_EMBEDDING, Kinds

SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Importance:
    """One importance file. `columns` gives the length of each tensor's vector."""

    checkpoint: Checkpoint
    columns: Mapping[str, int]

    def match(self, entries: Sequence[Entry], kinds: Kinds) -> tuple[dict[str, str], list[str]]:
        """The vector of each of `entries` that has one, by names, and warnings about vectors that
        no tensor has. Tensors under a host's names are known by what they are for."""
        found: dict[str, str] = {}
        for entry in entries:
            if len(entry.shape) < 2:
                continue
            for name in (entry.name, _gguf_name(entry.name, kinds)):
                if name in self.columns and name not in found.values():
                    if kinds.of(name) != TOKEN_EMBEDDING or self.columns[name] == entry.shape[-1]:
                        found[entry.name] = name
                    break
        unmatched = [name for name in self.columns if name not in found.values()]
        if not unmatched:
            return found, []
        words = "vector of the importance file has" if len(unmatched) == 1 else "vectors of the importance file have"
        return found, [f'{len(unmatched)} {words} no tensor in the model (first "{unmatched[0]}")']


def open_importance(path: str | os.PathLike[str]) -> Importance:
    """Opens an importance file. Raises `CheckpointError` for a file that is none."""
    path = Path(path)
    hint = "llama-imatrix writes it with --output-format gguf"
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(f'importance file "{path}" is not a .gguf', hint=hint)
    checkpoint = Checkpoint(path, [Model(path, path.stem)])
    kind = checkpoint.metadata.get("general.type")
    if kind != "imatrix":
        raise CheckpointError(f'"{path}" is no importance file: its general.type is {kind!r}', hint=hint)
    columns = {}
    for name, entry in checkpoint.items():
        base = name.removesuffix(SUMS)
        if base != name and f"{base}{COUNTS}" in checkpoint and entry.shape:
            columns[base] = entry.shape[-1]
    if not columns:
        raise CheckpointError(f'importance file "{path}" holds no vectors', hint=hint)
    return Importance(checkpoint, columns)


def _gguf_name(name: str, kinds: Kinds) -> str:
    kind, layer = kinds.of(name), kinds.layer_of(name)
    if kind == OTHER:
        return name
    return f"{kind}.weight" if layer is None else f"blk.{layer}.{kind}.weight"
