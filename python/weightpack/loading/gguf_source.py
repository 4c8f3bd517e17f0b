"""A GGUF file as a source of weights: its tensors under the names that a model has for them.

Where the names come from, the first that knows them:

1. All names in the file are the model's own.
2. weightpack's maps, those that conversions go by (`weightpack.host_target`): rows cut out of joined
   tensors, or put back in the model's order. Rows of blocks are independent, so that packed tensors
   stay packed; only what is changed in value (norms to which a writer added one) is decoded.
3. The host, where its adapter has `gguf_names`.
4. The model's own names, where most are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from .. import host_target
from .._lazy import require
from ..assembly import joined
from ..checkpoint import Checkpoint
from ..decision import no_copy
from ..entry import FLOATS, Entry, Part
from ..errors import UnsupportedError
from ..gguf.reading import open as open_gguf
from ..keymaps import PREFIXES
from ..mapping import MappedTensor, Rows
from ..quantizers.dtypes import of_stored
from ..streaming import Job, fill
from ..targets import COPY
from .host import Target
from .source import Weights


class HostNamed(Weights):
    """The tensors of a GGUF file under other names.

    `tensors` says what each is made of, `prefix` what stands before the model's own names in the file
    (`None` where these are others). A packed tensor whose values are not changed is packed here,
    too: its array is one of rows of blocks, and `shape` that of the weights. With `mmap`, what is
    stored in one piece and unchanged stays in the mapped file.
    """

    def __init__(
        self, checkpoint: Checkpoint, tensors: Sequence[MappedTensor], *, prefix: str | None = None, mmap: bool = False
    ) -> None:
        self.prefix = prefix
        self._checkpoint = checkpoint
        self.is_lent = mmap
        self._file = open_gguf(checkpoint.models[0].weights) if mmap else None
        self._maps: dict[str, Any] = {}
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self.entries = {name: _entry(tensor, checkpoint) for name, tensor in self._tensors.items()}
        self.metadata = {}

    def fill(self, jobs: Sequence[Job], out: Sequence[Sequence[Any]], threads: int | None) -> list[list[Any]]:
        """As in the base."""
        return fill(self._checkpoint, [self._job(job) for job in jobs], out, threads=threads)

    def array(self, name: str) -> Any | None:
        """As in the base."""
        tensor, entry = self._tensors[name], self.entries[name]
        source = tensor.sources[0].name
        is_whole = len(tensor.sources) == 1 and tensor.sources[0].is_whole and tensor.add is None
        if self._file is None or not is_whole or (entry.is_plain and entry.dtype not in FLOATS):
            return None
        # Refuses what cannot be taken as it lies.
        rows = self._file.raw(source).shape
        stored = self._file.tensors[source]
        if stored.path not in self._maps:
            torch, size = require("torch", "load models"), Path(stored.path).stat().st_size
            self._maps[stored.path] = torch.from_file(stored.path, shared=False, size=size, dtype=torch.uint8)
        data = self._maps[stored.path][stored.offset : stored.offset + stored.nbytes]
        return data.view(of_stored(entry.dtype)).reshape(entry.shape) if entry.is_plain else data.reshape(rows)

    def close(self) -> None:
        """As in the base; arrays that were given stay mapped."""
        self._checkpoint.close()
        if self._file is not None:
            self._file.close()
        self._maps.clear()

    def _job(self, job: Job) -> Job:
        """The same job in terms of the file."""
        tensor = self._tensors[job.name]
        entry = self.entries[job.name]
        if job.rows:
            tensor = self._rows(job.name, job.rows)
        whole = len(tensor.sources) == 1 and tensor.sources[0].is_whole
        add = None if tensor.add is None and job.add is None else (tensor.add or 0.0) + (job.add or 0.0)
        format = job.format
        if format == COPY and add is not None:
            format = FLOATS[entry.dtype]
        # The bytes of blocks are the same in any shape.
        shape = None if format == COPY and not entry.is_plain else job.shape or tensor.shape
        return replace(
            job,
            name=tensor.sources[0].name,
            format=format,
            rows=() if whole else tensor.sources,
            shape=shape,
            add=add,
        )

    def made_of(self, target: Target) -> MappedTensor | None:
        """The rows of the file's own tensors that a target of the loader is, by the target's name; `None` where
        the host computes it of them."""
        if target.merge is not None:
            return None
        found = self._rows(target.sources[0], target.rows) if target.rows else self._tensors[target.sources[0]]
        add = None if target.add is None and found.add is None else (target.add or 0.0) + (found.add or 0.0)
        return MappedTensor(target.name, found.sources, target.shape or found.shape, add)

    def _rows(self, name: str, wanted: Sequence[Rows]) -> MappedTensor:
        """The rows that a host takes of tensors which are there as they are."""
        sources = []
        for rows in wanted:
            tensor = self._tensors[rows.name]
            if not (len(tensor.sources) == 1 and tensor.sources[0].is_whole and tensor.add is None):
                raise UnsupportedError(f'"{name}" is made of rows of "{rows.name}", which is put together itself')
            sources.append(replace(rows, name=tensor.sources[0].name))
        return MappedTensor(name, tuple(sources))


def host_named(
    checkpoint: Checkpoint, host: Any, model: Any, names: Collection[str], *, mmap: bool = False
) -> HostNamed:
    """The tensors of `checkpoint`, a GGUF file, as `model` of `host` calls them; `names` are those of its
    parameters and buffers.

    Raises `UnsupportedError` where nothing knows the names of the file.
    """
    tensors, prefix = _named(checkpoint, host, model, names)
    return HostNamed(checkpoint, tensors, prefix=prefix, mmap=mmap)


def _named(
    checkpoint: Checkpoint, host: Any, model: Any, names: Collection[str]
) -> tuple[list[MappedTensor], str | None]:
    """The tensors, and the prefix of the model's own names where these are in the file."""
    prefix, share = _own_prefix(checkpoint, names)
    if share == 1:
        return _as_stored(checkpoint, prefix), prefix
    try:
        return list(host_target.prepare(checkpoint, list(checkpoint.values()), "host").mapped.values()), None
    except UnsupportedError:
        tensors = _by_host(checkpoint, host, model)
        if tensors is not None:
            return tensors, None
        if share > 0.5:
            # What has no place, and what is missing, is told by the loader.
            return _as_stored(checkpoint, prefix), prefix
        raise


def _by_host(checkpoint: Checkpoint, host: Any, model: Any) -> list[MappedTensor] | None:
    """What the host makes of the names, where its adapter has `gguf_names`."""
    ask = getattr(host, "gguf_names", None)
    if ask is None:
        return None
    flattened = {tensor.sources[0].name: tensor.shape for tensor in _as_stored(checkpoint, "") if tensor.shape}
    found = ask(model, {name: flattened.get(name, entry.shape) for name, entry in checkpoint.items()})
    for number, tensor in enumerate(found or ()):
        shape = flattened.get(tensor.sources[0].name)
        if shape is None:
            continue
        if not (len(tensor.sources) == 1 and tensor.sources[0].is_whole):
            raise UnsupportedError(
                f'"{tensor.name}" is made of some rows of "{tensor.sources[0].name}", which the file keeps flattened'
            )
        found[number] = replace(tensor, shape=tensor.shape or shape)
    return found  # type: ignore[no-any-return]


def _own_prefix(checkpoint: Checkpoint, names: Collection[str]) -> tuple[str, float]:
    """What stands before the model's own names in the file, and how many of the file's names are such."""
    known = set(names)
    counts = {
        prefix: sum(name.startswith(prefix) and name.removeprefix(prefix) in known for name in checkpoint)
        for prefix in reversed(PREFIXES)
    }
    best = max(counts, key=lambda prefix: counts[prefix])
    return best, counts[best] / max(1, len(checkpoint))


def _as_stored(checkpoint: Checkpoint, prefix: str) -> list[MappedTensor]:
    shapes = host_target.prepare(checkpoint, list(checkpoint.values()), "source").mapped
    return [
        MappedTensor(name.removeprefix(prefix), (Rows(name),), shapes[name].shape if name in shapes else None)
        for name in checkpoint
    ]


def _entry(tensor: MappedTensor, by_name: Mapping[str, Entry]) -> Entry:
    """What the loader is told of one tensor."""
    found = joined(tensor, by_name)
    if found.is_mixed:
        raise no_copy(found)
    if found.is_plain:
        return replace(found, parts=(Part(tensor.name, found.dtype, found.shape, found.nbytes),))
    if tensor.add is not None:
        nbytes = 4 * found.weights
        part = Part(tensor.name, "F32", found.shape, nbytes)
        return replace(found, dtype="F32", format="f32", nbytes=nbytes, parts=(part,))
    first = by_name[tensor.sources[0].name]
    whole = len(tensor.sources) == 1 and tensor.sources[0].is_whole
    # Blocks lie in rows as the file has them, whatever the shape of the weights is.
    stored = first.shape if whole else (found.weights // first.shape[-1], first.shape[-1])
    nbytes = first.nbytes * prod(stored) // first.weights if first.weights else 0
    return replace(found, nbytes=nbytes, parts=(Part(tensor.name, first.dtype, stored, nbytes),))
