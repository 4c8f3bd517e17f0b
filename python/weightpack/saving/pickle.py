"""Weights in torch's own files (`.bin`), as older programs read them: tensors alone, by name.

They are made shard by shard in a folder beside the destination, `DESTINATION.partial-*`, and get second
names in the new folder when it is put in place. What stands in them loads with
`torch.load(weights_only=True)`; tensors of torchao stay whole there, as its hosts expect it, and load
once torchao has been imported.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._lazy import require
from ..errors import FormatError
from ..loading.source import PICKLES
from ..stored import Stored
from .destination import folder_beside, index_name, weights_stem

if TYPE_CHECKING:
    from .parts import Part

Progress = Callable[[int, int, int, str], None]


@contextlib.contextmanager
def pickled(
    destination: Path, parts: Sequence[Part], max_shard_bytes: int, on_progress: Progress | None = None
) -> Iterator[tuple[dict[str, Path], dict[str, str]]]:
    """Writes the objects of `parts`, and the weights of those that want them here. Gives their files and the
    texts of their indexes, by path relative to the destination. The files are gone when the context ends.

    One shard at a time is in memory, of tensors that are there already nothing. Raises `OSError` where
    there is no room, and `FormatError` for a tensor that has no content: before anything is written.
    """
    if not parts:
        yield {}, {}
        return
    own = [part for part in parts if part.is_pickle]
    for part in own:
        for stored in part.tensors:
            if stored.tensor.device.type == "meta":
                raise FormatError(f'"{stored.name}" is not in memory: bring the model back from the disk first')
    total = sum(stored.bytes for part in own for stored in part.tensors)
    parent = destination.parent
    os.makedirs(parent, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if total > free:
        raise OSError(errno.ENOSPC, f'the weights take {total} bytes, and {free} are free in "{parent}"')
    with folder_beside(destination) as made:
        files: dict[str, Path] = {}
        texts: dict[str, str] = {}
        done = 0
        for number, part in enumerate(parts):
            for name, value in part.objects.items():
                files[part.path(name)] = made / f"{number}-{name}"
                require("torch", "write torch's own files").save(value, made / f"{number}-{name}")
            if not part.is_pickle:
                continue
            names, index = shards(part, max_shard_bytes)
            for name, tensors in names.items():
                file = files[part.path(name)] = made / f"{number}-{name}"
                _save(tensors, file)
                done += sum(stored.bytes for stored in tensors)
                if on_progress is not None:
                    on_progress(done, total, done, tensors[-1].name if tensors else name)
            texts.update({part.path(name): text for name, text in index.items()})
        yield files, texts


def shards(part: Part, max_shard_bytes: int) -> tuple[dict[str, list[Stored]], dict[str, str]]:
    """The tensors of each file of a part, by file name, and its index: by name, nothing for one file."""
    groups = split(part.tensors, max_shard_bytes)
    stem = PICKLES.get(part.stem, part.stem)
    named = weights_stem(stem, part.variant)
    if len(groups) == 1:
        return {f"{named}.bin": groups[0]}, {}
    files = {f"{named}-{number:05d}-of-{len(groups):05d}.bin": group for number, group in enumerate(groups, 1)}
    index = {
        "metadata": {"total_size": sum(stored.bytes for stored in part.tensors)},
        "weight_map": {stored.name: file for file, group in files.items() for stored in group},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    return files, {index_name(stem, part.variant, "bin"): text}


def split(tensors: Sequence[Stored], most: int) -> list[list[Stored]]:
    """Tensors of each file, by the rule of the other weights files: they fill one in their order until the
    next does not fit, and one larger than `most` bytes gets its own, at once."""
    units: list[list[Stored]] = []
    for stored in tensors:
        if stored.with_previous and units:
            units[-1].append(stored)
        else:
            units.append([stored])
    files: list[list[Stored]] = []
    begun: list[Stored] = []
    begun_bytes = 0
    for unit in units:
        size = sum(stored.bytes for stored in unit)
        if size > most:
            files.append(unit)
            continue
        if begun_bytes + size > most:
            files.append(begun)
            begun, begun_bytes = [], 0
        begun.extend(unit)
        begun_bytes += size
    if begun or not files:
        files.append(begun)
    return files


def _save(tensors: Sequence[Stored], file: Path) -> None:
    torch = require("torch", "write torch's own files")
    torch.save(_plain({stored.name: stored.tensor for stored in tensors}), file)
    with open(file, "rb") as written:
        os.fsync(written.fileno())


def _plain(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors that are nothing but tensors, and of which no more is stored than what they show.

    Those that belong to accelerators are marked as the CPU's, so that they load on any machine.
    """
    torch = require("torch", "write torch's own files")
    plain = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        if not hasattr(tensor, "__tensor_flatten__"):
            tensor = tensor.as_subclass(torch.Tensor).resolve_neg()
            whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            tensor = tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)
        plain[name] = tensor
    return plain
