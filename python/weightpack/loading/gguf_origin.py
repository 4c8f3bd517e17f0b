"""What a model that was loaded from a GGUF file needs to become that file again.

The model has the weights. The file has more: its pairs, the order and names of its tensors, tensors
that the model makes by itself, and small ones in a type that the model does not keep them in. The
file may be gone when the model is saved, so that all of it is held in memory: as a rule some
megabytes, of which most are the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .._lazy import require
from ..checkpoint import Checkpoint
from ..entry import Entry
from ..gguf.reading import open as open_gguf
from ..gguf.writing import write as write_gguf
from ..mapping import Interleave, MappedTensor, Rows
from ..quantizers.dtypes import of_stored
from ..streaming import Job, fill
from .gguf_source import HostNamed
from .host import Target

KEPT_BYTES = 1 << 20
"""Most bytes of a stored tensor that is kept beside the one in the model, which is not quite the same."""
ALL_KEPT_BYTES = 64 << 20
"""Most bytes of all that is kept together. Further tensors that the model has no place for are lost."""

_COUNT = slice(8, 16)
"""Where a GGUF file says how many tensors it has."""


@dataclass(frozen=True)
class Origin:
    """A GGUF file, as far as it is not in the model.

    `header` is a GGUF file of its pairs without tensors. `entries` are its tensors in their order,
    `made_of` says of which rows of the model's tensors each is made (`add` is added to them); those
    that the model does not have are not in it. `kept` holds stored bytes, uint8, of what the model
    lacks or holds in another type. `prefix` stands before the model's own names in the file, and is
    `None` where the file has names of its own.
    """

    header: bytes
    entries: tuple[Entry, ...]
    made_of: Mapping[str, MappedTensor]
    kept: Mapping[str, Any]
    prefix: str | None

    def __deepcopy__(self, memo: Any) -> Origin:
        """A copied model came from the same file."""
        return self


def origin_of(
    checkpoint: Checkpoint,
    weights: HostNamed,
    targets: Sequence[Target],
    found: Callable[[str], Any],
) -> Origin:
    """What is kept of the open file `checkpoint`, from which `weights` were loaded as `targets` say.
    `found(name)` is the tensor that the model has now."""
    entries = tuple(checkpoint.values())
    sources = [made for target in targets if (made := weights.made_of(target)) is not None]
    made_of = turned_round(sources, {entry.name: entry for entry in entries})
    kept_names: list[str] = []
    size = 0
    for entry in entries:
        made = made_of.get(entry.name)
        is_wanted = made is None or (entry.nbytes <= KEPT_BYTES and not _is_exact(entry, made, found))
        if is_wanted and size + entry.nbytes <= ALL_KEPT_BYTES:
            kept_names.append(entry.name)
            size += entry.nbytes
    return Origin(_pairs(checkpoint), entries, made_of, _read(checkpoint, kept_names), weights.prefix)


def turned_round(tensors: Iterable[MappedTensor], entries: Mapping[str, Entry]) -> dict[str, MappedTensor]:
    """How the stored tensors `entries` are made of `tensors`, which say how they are made of stored ones.

    A stored tensor some of whose rows are in none of `tensors` is left out. Rows are counted as the
    stored tensor has them, whatever the shape of the other is.
    """
    pieces: dict[str, list[tuple[int, Rows, float | None]]] = {}
    for tensor in tensors:
        place = 0
        is_whole = len(tensor.sources) == 1 and tensor.sources[0].is_whole
        for rows in tensor.sources:
            count = _rows(entries[rows.name].shape) - rows.first if rows.count is None else rows.count
            back = None
            if rows.interleave is not None:
                size = count // rows.interleave.groups // rows.interleave.parts
                back = Interleave(rows.interleave.groups, size)
            own = Rows(tensor.name) if is_whole else Rows(tensor.name, place, count, back)
            pieces.setdefault(rows.name, []).append((rows.first, own, tensor.add))
            place += count
    made = {}
    for name, found in pieces.items():
        used: list[Rows] = []
        added: set[float | None] = set()
        place, total = 0, _rows(entries[name].shape)
        for first, rows, add in sorted(found, key=lambda piece: piece[0]):
            if first == place and place < total:
                used.append(rows)
                added.add(add)
                place += total if rows.count is None else rows.count
        if place == total and len(added) == 1:
            add = added.pop()
            made[name] = MappedTensor(name, tuple(used), add=None if add is None else -add)
    return made


def _rows(shape: Sequence[int]) -> int:
    """Number of rows; of a vector, of elements."""
    return math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)


def _is_exact(entry: Entry, made: MappedTensor, found: Callable[[str], Any]) -> bool:
    """Whether the model's tensors give back each stored bit."""
    if made.add is not None:
        return False
    names = [rows.name for rows in made.sources]
    if not entry.is_plain:
        return all(getattr(found(name), "quant_type", None) == entry.dtype for name in names)
    stored = of_stored(entry.dtype)
    return all(holds(found(name).dtype, stored) for name in names)


def holds(wide: Any, narrow: Any) -> bool:
    """Whether every value of the type `narrow` is one of `wide`."""
    if wide == narrow:
        return True
    torch = require("torch", "load models")
    return bool(wide.is_floating_point and narrow.is_floating_point and torch.promote_types(wide, narrow) == wide)


def _pairs(checkpoint: Checkpoint) -> bytes:
    """A GGUF file of the same pairs, without tensors."""
    with open_gguf(checkpoint.models[0].weights) as file:
        if len(file.files) > 1:
            # What says how it was split stays behind.
            with TemporaryDirectory() as folder:
                write_gguf(Path(folder, "pairs.gguf"), {}, metadata_from=file)
                return Path(folder, "pairs.gguf").read_bytes()
        first = min((tensor.offset for tensor in file.tensors.values()), default=-1)
        with Path(file.files[0]).open("rb") as stored:
            header = bytearray(stored.read(first))
    # What describes the tensors is read no more once there are none.
    header[_COUNT] = bytes(8)
    return bytes(header)


def _read(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, Any]:
    """The stored bytes of some tensors."""
    torch = require("torch", "load models")
    out = [[torch.empty(checkpoint[name].nbytes, dtype=torch.uint8)] for name in names]
    filled = fill(checkpoint, [Job(name, "copy") for name in names], out)
    return {name: arrays[0] for name, arrays in zip(names, filled, strict=True)}
