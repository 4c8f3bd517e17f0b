"""The folder that a model is saved to: what of an earlier model gives way, and what stays.

A folder is replaced as a whole, in one step. Files that are not the model's (a tokenizer, weights of
another variant, a person's notes) get a second name in the new folder before that, so that they are
there at any moment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from ..errors import ConfigError
from ..quantizers.auto import FILES_BESIDE

STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")
"""File names of weights, without variant, number and extension."""
BESIDE = (*FILES_BESIDE, "modelopt_state.pth")
"""Files that say how the weights beside them are packed."""


def carried_files(destination: Path, replaced: Collection[str], *, overwrite: bool) -> list[Path]:
    """The files below `destination` that stay, relative to it; `replaced` are the files (relative, with `/`)
    for which `is_replaced` holds or that are written anew.

    Raises `ConfigError` where the destination is no folder, or where a file would be replaced and
    `overwrite` is not given.
    """
    if not os.path.lexists(destination):
        return []
    if not destination.is_dir():
        raise ConfigError(f"{destination} is a file, and a model is saved to a folder")
    carried: list[Path] = []
    taken: list[Path] = []
    for file in _files_below(destination):
        name = file.as_posix()
        (taken if name in replaced else carried).append(file)
    if taken and not overwrite:
        raise ConfigError(
            f"{destination} holds {taken[0]}{_and_more(len(taken) - 1)}",
            hint="save to another place, or replace the model there with overwrite=True",
        )
    return carried


def replaced_files(destination: Path, folder: str, variant: str | None) -> list[str]:
    """Files of an earlier model in `folder` below `destination` that a new one of this variant replaces: its
    weights and indexes, of either kind and any number, and what says how they are packed."""
    place = destination / folder
    if not place.is_dir():
        return []
    names = [name for name in sorted(os.listdir(place)) if is_replaced(name, variant)]
    return [f"{folder}/{name}" if folder else name for name in names]


def is_replaced(name: str, variant: str | None) -> bool:
    """Whether a file of this name belongs to the weights of a model of `variant`.

    The variant may also stand where older releases of the hosts put it, and still look for it.
    """
    stems = f"(?:{'|'.join(STEMS)})"
    kind = r"\.(?:safetensors|bin)"
    shard = r"(?:-\d{5}-of-\d{5})?"
    infix = re.escape(f".{variant}") if variant else ""
    weights = (f"{stems}{infix}{shard}{kind}", f"{stems}{shard}{infix}{kind}")
    index = (rf"{kind}\.index{infix}", rf"{kind}{infix}\.index", rf"{infix}{kind}\.index")
    indexes = rf"{stems}(?:{'|'.join(index)})\.json"
    return name in BESIDE or re.fullmatch("|".join((*weights, indexes)), name) is not None


def weights_stem(stem: str, variant: str | None) -> str:
    """File name of weights, without number and extension."""
    return f"{stem}.{variant}" if variant else stem


def index_name(stem: str, variant: str | None, extension: str = "safetensors") -> str:
    """File name of the index of several weights files, as both hosts have it."""
    return f"{stem}.{extension}.index.{variant}.json" if variant else f"{stem}.{extension}.index.json"


def _files_below(folder: Path) -> Iterator[Path]:
    """All files and links below `folder`, relative to it. Links are not followed."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in sorted([*names, *links]):
            yield Path(place, name).relative_to(folder)


def _and_more(count: int) -> str:
    return f" and {count} more files of a model" if count > 1 else " and another file of a model" if count else ""
