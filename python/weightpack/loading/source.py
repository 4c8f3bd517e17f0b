"""Where a model is read from: its weights, whatever file they are in, and its `config.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._lazy import require
from ..checkpoint import Checkpoint, open_checkpoint
from ..entry import Entry, Part
from ..errors import CheckpointError, ConfigError
from ..folder import CONFIG, STEMS, find_models, read_config, read_json
from ..quantizers.dtypes import STORED
from ..streaming import Job, fill

PICKLES = {"model": "pytorch_model", "diffusion_pytorch_model": "diffusion_pytorch_model"}


@dataclass(frozen=True)
class Location:
    """A model's folder (of its config; `None` where the weights stand alone) and its weights file:
    a `.safetensors`, an `*.index.json`, a `.gguf`, or a `.bin`."""

    folder: Path | None
    weights: Path

    @property
    def is_pickle(self) -> bool:
        """Whether the weights are in torch's own files."""
        name = self.weights.name
        return name.endswith((".bin", ".pt", ".pth", ".ckpt")) or ".bin.index." in name


class Weights:
    """The stored tensors of one model, by logical name; a packed weight and its statistics are one
    where the engine knows the format. `entries` describes them, `metadata` is what the files say."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def fill(self, jobs: Sequence[Job], out: Sequence[Sequence[Any]], threads: int | None) -> list[list[Any]]:
        """Carries jobs out into tensors; gives the tensors, cut to their final length."""
        raise NotImplementedError

    def array(self, name: str) -> Any | None:
        """A stored array itself, where it is in memory or mapped, else `None`."""
        return None

    is_lent: bool = False
    """Whether the model may keep what `array` gives, instead of a copy."""

    def close(self) -> None:
        """Lets go of the files."""


class FileWeights(Weights):
    """Tensors of safetensors and GGUF files, read by the engine."""

    def __init__(self, path: Path) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(path)
        self.entries = self.checkpoint
        found = self.checkpoint.metadata
        self.is_gguf = self.checkpoint.container == "gguf"
        self.metadata = {} if self.is_gguf else found

    def fill(self, jobs: Sequence[Job], out: Sequence[Sequence[Any]], threads: int | None) -> list[list[Any]]:
        """As in the base."""
        return fill(self.checkpoint, jobs, out, threads=threads)

    def close(self) -> None:
        """As in the base."""
        self.checkpoint.close()


class MappedWeights(FileWeights):
    """Files that are mapped into memory: what is loaded as it is stored stays in the file, and is read when
    it is first used. A file that is cut short meanwhile ends the process. GGUF files are mapped under the
    names of the model, by `gguf_source`."""

    is_lent = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._files: dict[str, Any] = {}
        self._places: dict[str, Any] = {}
        if self.is_gguf:
            return
        safe_open = require("safetensors", "map files").safe_open
        for described in self.checkpoint.files:
            file = self._files[described["path"]] = safe_open(described["path"], framework="pt")
            self._places |= dict.fromkeys(file.keys(), file)

    def array(self, name: str) -> Any | None:
        """As in the base."""
        return self._places[name].get_tensor(name)

    def close(self) -> None:
        """As in the base; arrays that were given stay mapped."""
        super().close()
        self._places.clear()
        self._files.clear()


class StateDict(Weights):
    """Tensors that are in memory: torch's own files, or a state dict that a caller gives."""

    def __init__(self, tensors: Mapping[str, Any], file: str = "") -> None:
        names = {name: stored for name, stored in STORED.items()}
        self._tensors, self.metadata = _taken_apart(tensors)
        entries = {}
        for name, value in self._tensors.items():
            if not hasattr(value, "dtype") or not hasattr(value, "shape"):
                raise CheckpointError(f'"{name}" is a {type(value).__name__}, expected a tensor (file "{file}")')
            stored = names.get(str(value.dtype).removeprefix("torch."))
            if stored is None:
                raise CheckpointError(f'"{name}" holds {value.dtype}, which is not loaded (file "{file}")')
            shape, size = tuple(value.shape), value.numel() * value.element_size()
            part = Part(name, stored, shape, size)
            kind = stored.lower() if stored in ("F32", "F16", "BF16") else None
            entries[name] = Entry(name, shape, stored, kind, size, value.numel(), (part,), file)
        self.entries = entries

    def array(self, name: str) -> Any | None:
        """As in the base."""
        return self._tensors[name]


def locate(
    path: str | os.PathLike[str],
    *,
    stem: str | None,
    subfolder: str | None,
    variant: str | None,
    use_safetensors: bool | None,
    single_first: bool = True,
) -> Location:
    """The weights of the model at `path`, in the hosts' order of search.

    `stem` is the host's name for weights, `None` for any. Raises `OSError` where there is no such
    folder or file, `CheckpointError` where it holds no weights of this kind.
    """
    place = Path(path, subfolder) if subfolder else Path(path)
    if place.is_file():
        folder = place.parent if (place.parent / CONFIG).is_file() else None
        return Location(folder, place)
    if not place.is_dir():
        raise FileNotFoundError(f'"{place}" is neither a model folder nor a file')
    for name in weight_names(stem, variant, use_safetensors, single_first=single_first):
        if (place / name).is_file():
            return Location(place, place / name)
    if variant is None and use_safetensors is not False:
        # Weights under another name: taken where only one file can be meant.
        return Location(place, find_models(place)[0].weights)
    of_variant = "" if variant is None else f' of variant "{variant}"'
    raise CheckpointError(
        f'no weights{of_variant} in folder "{place}", expected {stem or STEMS[0]}.safetensors or its index'
    )


def weight_names(
    stem: str | None, variant: str | None, use_safetensors: bool | None, *, single_first: bool = True
) -> list[str]:
    """File names that weights may have, in the order of search: safetensors before torch's own, the
    host's `stem` before others, one file before an index if `single_first`."""
    stems = list(dict.fromkeys([stem, *STEMS] if stem else STEMS))
    found = []
    if use_safetensors is not False:
        found += [name for one in stems for name in _names(one, ".safetensors", variant, single_first)]
    if use_safetensors is not True:
        found += [name for one in stems for name in _names(PICKLES[one], ".bin", variant, single_first)]
    return found


def _names(stem: str, ending: str, variant: str | None, single_first: bool) -> list[str]:
    if variant is None:
        single, index = [f"{stem}{ending}"], [f"{stem}{ending}.index.json"]
    else:
        single = [f"{stem}.{variant}{ending}"]
        index = [f"{stem}{ending}.index.{variant}.json", f"{stem}.{variant}{ending}.index.json"]
    return [*single, *index] if single_first else [*index, *single]


def open_weights(location: Location, *, mmap: bool = False) -> Weights:
    """Opens the weights; headers are read and checked, of torch's own files everything (mapped).

    With `mmap`, safetensors and GGUF files are mapped. Raises `CheckpointError` for files that are malformed or
    hold more than tensors.
    """
    if not location.is_pickle:
        return MappedWeights(location.weights) if mmap else FileWeights(location.weights)
    files = [location.weights]
    if location.weights.name.endswith(".json"):
        index = read_json(location.weights).get("weight_map", {})
        folder = location.weights.parent
        files = [folder / name for name in sorted(set(index.values()))]
        if any(Path(name).name != name for name in index.values()):
            raise CheckpointError(f'a name in the index leaves its folder (file "{location.weights}")')
    tensors: dict[str, Any] = {}
    for file in files:
        tensors |= _unpickle(file)
    return StateDict(tensors, str(location.weights))


def _taken_apart(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors that are made of others as these, and torchao's metadata, which says how they belong together."""
    if not any(hasattr(value, "__tensor_flatten__") for value in tensors.values()):
        return dict(tensors), {}
    module = "torchao.prototype.safetensors.safetensors_support"
    flat, metadata = require(module, "read weights that torchao packed").flatten_tensor_state_dict(dict(tensors))
    return dict(flat), {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


def _unpickle(file: Path) -> dict[str, Any]:
    import pickle

    torch = require("torch", "read torch's own files")
    if not file.is_file():
        raise FileNotFoundError(f'"{file}" is missing')
    try:
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        if any(name.startswith("torchao.") for name in needed):
            # Once they are imported, torch knows which of these classes are safe to make.
            for module in ("torchao.quantization", "torchao.prototype.mx_formats"):
                require(module, "read weights that torchao packed")
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f'cannot be read as tensors alone: {reason} (file "{file}")', hint="a .safetensors file is safe to load"
        ) from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f'holds a {type(found).__name__}, expected tensors by name (file "{file}")')
    return dict(found)


def safetensors_headers(files: Iterable[Any]) -> tuple[list[str], dict[str, str]]:
    """The keys of all safetensors files among `files`, and what their headers say besides, together."""
    safe_open = require("safetensors", "read checkpoints").safe_open
    keys: list[str] = []
    metadata: dict[str, str] = {}
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                keys += opened.keys()
                metadata |= opened.metadata() or {}
    return keys, metadata


def config_of(location: Location, given: Any) -> dict[str, Any]:
    """The parsed config: the caller's (a dictionary, a host's config object, a file or a folder), else
    `config.json` beside the weights; empty where there is none."""
    if isinstance(given, Mapping):
        return dict(given)
    if callable(getattr(given, "to_dict", None)):
        return dict(given.to_dict())
    if given is not None:
        path = Path(given)
        if path.is_dir():
            path = path / CONFIG
        if not path.is_file():
            raise ConfigError(f'config "{given}" is no file')
        return read_json(path)
    found = read_config(location.folder) if location.folder is not None else None
    return found or {}
