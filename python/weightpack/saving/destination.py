"""The folder that a model is saved to: what of an earlier model gives way, and what stays.

A folder is replaced as a whole, in one step. Files that are not the model's (a tokenizer, weights of
another variant, a person's notes) get a second name in the new folder before that, so that they are
there at any moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from .._rust import __version__
from ..errors import ConfigError
from ..quantizers.auto import FILES_BESIDE

STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")
"""File names of weights, without variant, number and extension."""
BESIDE = (*FILES_BESIDE, "modelopt_state.pth")
"""Files that say how the weights beside them are packed."""


def place_of(path: str | os.PathLike[str]) -> Path:
    """The folder that is replaced when a model is saved to `path`: for a link to one, what it leads to.

    Raises `ConfigError` for what is there and is no folder.
    """
    place = Path(os.path.abspath(path))
    if place.is_symlink():
        target = Path(os.path.realpath(place))
        if not target.is_dir():
            raise ConfigError(f"{place} is a link to {target}, which is no folder")
        return target
    if not place.name:
        raise ConfigError(f"{place} is no folder that could be replaced")
    if os.path.lexists(place) and not place.is_dir():
        raise ConfigError(f"{place} is a file, and a model is saved to a folder")
    return place


@contextlib.contextmanager
def folder_beside(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` for files on their way there, gone afterwards. If the process is killed,
    the next save to that place removes it: it has the name, the lock and the mark of one that the engine
    builds in."""
    with folders_above(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f"{destination.name}.made-", dir=destination.parent))
        try:
            with open(made / "lock", "w") as lock:
                with contextlib.suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                begin = {"plan": "", "sources": "", "version": __version__, "transient": True}
                (made / "journal").write_text(json.dumps({"begin": begin}) + "\n")
                made = made.rename(destination.with_name(f"{destination.name}.partial-{secrets.token_hex(6)}"))
                content = made / "content"
                content.mkdir()
                yield content
        finally:
            shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def folders_above(destination: Path) -> Iterator[None]:
    """Folders above `destination` that were made in this context, and are empty after it, are removed."""
    missing = [above for above in destination.parents if not above.exists()]
    try:
        yield
    finally:
        for above in missing:
            with contextlib.suppress(OSError):
                above.rmdir()


@contextlib.contextmanager
def current_folder(destination: Path) -> Iterator[None]:
    """Where the process works in `destination` or below it, it does so afterwards in the new folder."""
    current = None
    with contextlib.suppress(OSError):
        current = Path(os.getcwd())
    yield
    if current is not None and current.is_relative_to(destination):
        with contextlib.suppress(OSError):
            os.chdir(current)


def carried_files(
    folder: Path, written: Collection[str], is_old: Callable[[str], bool], *, overwrite: bool
) -> list[Path]:
    """What stays of what is in `folder`, relative to it: files, links and empty folders.

    `written` are the files (relative, with `/`) that are written anew, `is_old` says which ones give way
    besides. Raises `ConfigError` where something would give way and `overwrite` is not given, `OSError`
    for a folder that cannot be listed.
    """
    above = {parent.as_posix() for name in written for parent in Path(name).parents}
    carried: list[Path] = []
    taken: list[Path] = []
    for file in _files_below(folder) if folder.is_dir() else ():
        name = file.as_posix()
        blocked = [parent for parent in file.parents if parent.as_posix() in written]
        if blocked:
            raise ConfigError(f"{folder / blocked[0]} is a folder, and a file of that name is to be written")
        if name in above and not (folder / file).is_symlink() and (folder / file).is_dir():
            continue
        (taken if name in written or name in above or is_old(name) else carried).append(file)
    if taken and not overwrite:
        raise ConfigError(
            f"{folder} holds {taken[0]}{_and_more(len(taken) - 1)}",
            hint="save to another place, or replace the model there with overwrite=True",
        )
    return carried


def is_replaced(name: str, variant: str | None, stem: str = STEMS[0]) -> bool:
    """Whether a file of this name belongs to the weights of an earlier model of `variant`: weights and
    indexes of either kind and any number, and what says how they are packed.

    The variant may also stand where older releases of the hosts put it, and still look for it.
    """
    stems = f"(?:{'|'.join(re.escape(one) for one in (*STEMS, stem))})"
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
    """All files, links and empty folders below `folder`, relative to it. Links are not followed."""

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in sorted([*names, *links]):
            yield Path(place, name).relative_to(folder)
        if not folders and not names and Path(place) != folder:
            yield Path(place).relative_to(folder)


def _and_more(count: int) -> str:
    return f" and {count} more files of a model" if count > 1 else " and another file of a model" if count else ""
