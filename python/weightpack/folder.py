"""What a model folder holds: its weights, its config, and everything else.

A folder is one model (weights, `config.json`, tokenizer and so on) or a diffusers pipeline
(`model_index.json` and one folder per component). Which file holds the weights follows the hosts'
own order of search; several candidates that no index ties together are an error, not a guess.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError

MOST_JSON_BYTES = 64 << 20
PIPELINE = "model_index.json"
CONFIG = "config.json"
BESIDE = "hf_quant_config.json"
"""Where ModelOpt's exports say how the weights are packed, older ones nowhere else."""
STEMS = ("model", "diffusion_pytorch_model")
"""Names that hosts give to the weights of a model, in their order of search."""

_INDEX = re.compile(r"^(?P<stem>.+)\.safetensors\.index(\.(?P<variant>[^.]+))?\.json$")
_SHARD = re.compile(r"^(?P<stem>.+)-\d{5,}-of-(?P<count>\d{5,})\.(safetensors|gguf)$")
_WRITTEN_ANEW = frozenset({CONFIG, BESIDE, "quanto_qmap.json"})
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".ot", ".mlmodel", ".npz", ".gguf", ".pdparams")
_LEFT_OUT_FILES = re.compile(r"^(training_args\.bin|optimizer.*|scheduler\.pt|rng_state.*|.*\.index(\..+)?\.json)$")
_LEFT_OUT_FOLDERS = re.compile(r"^(\.git|\.cache|__pycache__|\.ipynb_checkpoints|checkpoint-\d+|onnx|openvino|coreml)$")


@dataclass(frozen=True)
class Model:
    """One model: the file that its weights are opened by, and the folder it lives in.

    `weights` is a `.safetensors`, an `*.index.json`, or a `.gguf`. `stem` is the name the result's
    files are built from. `folder` is `None` where the weights stand alone; `component` is the name
    inside a pipeline, or empty.
    """

    weights: Path
    stem: str
    folder: Path | None = None
    component: str = ""
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Carried:
    """A file that a conversion copies: its path in the result, and where it is read."""

    path: str
    source: Path


def find_models(path: str | os.PathLike[str]) -> list[Model]:
    """The models at `path`: one for a file or model folder, one per component for a pipeline.

    Raises `CheckpointError` when there is none, or when it is unclear which file is meant, and
    `OSError` when `path` cannot be read.
    """
    path = Path(path)
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return [_model_file(path)]
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f'"{path}" is neither a regular file nor a folder')
    if (path / PIPELINE).is_file():
        return _components(path)
    return [find_model(path)]


def is_pipeline(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a diffusers pipeline folder."""
    return (Path(path) / PIPELINE).is_file()


def find_model(folder: Path, component: str = "") -> Model:
    """The model whose weights lie in `folder`."""
    config = read_config(folder)
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    weights, stem = _choose(folder, names, is_diffusers=config is not None and "_class_name" in config)
    return Model(folder / weights, stem, folder, component, config)


def read_config(folder: Path) -> dict[str, Any] | None:
    """The parsed `config.json` of a folder, or `None` where there is none."""
    path = folder / CONFIG
    return read_json(path) if path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    size = path.stat().st_size
    if size > MOST_JSON_BYTES:
        raise CheckpointError(f'"{path}" has {size} bytes, more than a JSON file of a model ever does')
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'"{path}" is not valid JSON: {error}') from error
    if not isinstance(value, dict):
        raise CheckpointError(f'"{path}" does not hold a JSON object')
    return value


def carried_files(
    folder: Path, prefix: str = "", *, whole: bool = False, only_files: bool = False
) -> tuple[list[Carried], list[str]]:
    """Files of a model folder that go into the result unchanged, and those left out.

    The weights of the model in every form (also as pickles, for other frameworks, or of training)
    are left out, and so are `config.json` and what else tells how weights are packed, which is
    written anew. With `whole`, the folder is a component that is not converted: its weights are
    carried over too. With `only_files`, folders inside are not looked at. `prefix` goes in front of
    each path in the result. A link is followed to its file; a link to anything else is refused.
    """
    carried: list[Carried] = []
    left_out: list[str] = []
    names = {entry.name for entry in os.scandir(folder)}
    has_safetensors = any(name.endswith(".safetensors") for name in names)
    for relative, path in _walk(folder, left_out, prefix, only_files=only_files):
        # A link in a download cache leads to a file with a hash for a name.
        name = relative.rpartition("/")[2]
        at_top = "/" not in relative
        if at_top and not whole and (name in _WRITTEN_ANEW or _is_weights(name)):
            if name not in _WRITTEN_ANEW:
                left_out.append(prefix + relative)
            continue
        if whole and at_top and has_safetensors and name.endswith(_PICKLES):
            left_out.append(prefix + relative)
            continue
        if name.endswith(_OTHER_WEIGHTS) or (not at_top and name.endswith((".pth", ".ckpt"))):
            left_out.append(prefix + relative)
            continue
        carried.append(Carried(prefix + relative, path))
    return carried, left_out


def _walk(
    folder: Path, left_out: list[str], prefix: str, below: str = "", only_files: bool = False
) -> Iterator[tuple[str, Path]]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        relative = f"{below}{entry.name}"
        if entry.is_symlink():
            target = Path(os.path.realpath(entry.path))
            if not target.is_file():
                raise CheckpointError(f'"{entry.path}" is a link to something that is not a regular file')
            yield relative, target
        elif entry.is_dir():
            if only_files:
                continue
            if _LEFT_OUT_FOLDERS.match(entry.name):
                left_out.append(f"{prefix}{relative}/")
            else:
                yield from _walk(Path(entry.path), left_out, prefix, f"{relative}/")
        elif entry.is_file():
            yield relative, Path(entry.path)
        else:
            raise CheckpointError(f'"{entry.path}" is not a regular file')


def _is_weights(name: str) -> bool:
    lower = name.lower()
    return lower.endswith((".safetensors", *_PICKLES, *_OTHER_WEIGHTS)) or bool(_LEFT_OUT_FILES.match(lower))


def _model_file(path: Path) -> Model:
    name = path.name
    folder = path.resolve().parent if path.is_symlink() and not (path.parent / CONFIG).is_file() else path.parent
    if match := _INDEX.match(name):
        return Model(path, match["stem"], config=read_config(folder))
    if name.endswith(".safetensors"):
        shard = _SHARD.match(name)
        if shard and int(shard["count"]) > 1:
            raise CheckpointError(
                f'"{path}" is one shard of {int(shard["count"])}', hint="name the folder or the *.index.json"
            )
        # The config beside a file is only its own if the file has the name that hosts look for.
        own = name.removesuffix(".safetensors").split(".")[0] in STEMS
        return Model(path, name.removesuffix(".safetensors"), config=read_config(folder) if own else None)
    if name.endswith(".gguf"):
        return Model(path, _gguf_stem(name))
    if name.endswith(_PICKLES):
        raise CheckpointError(
            f'"{path}" is a pickle, which can run code when it is read',
            hint="load it in its own library and save it as safetensors",
        )
    raise CheckpointError(f'"{path}" is not a checkpoint', hint="expected .safetensors, *.index.json or .gguf")


def _components(folder: Path) -> list[Model]:
    index = read_json(folder / PIPELINE)
    models = []
    for name, value in index.items():
        if name.startswith("_") or not (isinstance(value, list) and len(value) == 2 and value[0]):
            continue
        if name in (".", "..") or os.path.basename(name) != name or "\\" in name:
            raise CheckpointError(f'component "{name}" leaves the folder (file "{folder / PIPELINE}")')
        inside = folder / name
        if inside.is_dir() and any(_is_loadable(entry.name) for entry in os.scandir(inside)):
            models.append(find_model(inside, name))
    if not models:
        raise CheckpointError(f'pipeline "{folder}" has no component with safetensors weights')
    return models


def _is_loadable(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf"))


def _choose(folder: Path, names: list[str], *, is_diffusers: bool) -> tuple[str, str]:
    """The file to open the weights by, and the stem of its name."""
    indexes = [match for match in map(_INDEX.match, names) if match]
    files = [name for name in names if name.endswith(".safetensors") and not _SHARD.match(name)]
    for stem in STEMS:
        plain = f"{stem}.safetensors"
        index = next((m[0] for m in indexes if m["stem"] == stem and m["variant"] is None), None)
        # diffusers takes the index first, transformers the single file.
        order = (index, plain) if is_diffusers else (plain, index)
        for name in order:
            if name is not None and name in names:
                return name, stem
    for stem in STEMS:
        variants = [m[0] for m in indexes if m["stem"] == stem and m["variant"]]
        variants += [name for name in files if re.fullmatch(rf"{stem}\.[^.]+\.safetensors", name)]
        if len(variants) == 1:
            return variants[0], stem
        if len(variants) > 1:
            raise _ambiguous(folder, variants)
    candidates = [m[0] for m in indexes] or files
    if len(candidates) > 1:
        raise _ambiguous(folder, candidates)
    if candidates:
        match = _INDEX.match(candidates[0])
        return candidates[0], match["stem"] if match else "model"
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        raise CheckpointError(
            f'folder "{folder}" holds {len(shards)} shards and no index', hint="the *.safetensors.index.json is missing"
        )
    return _choose_gguf(folder, names)


def _choose_gguf(folder: Path, names: list[str]) -> tuple[str, str]:
    stems: dict[str, str] = {}
    for name in names:
        if name.endswith(".gguf"):
            stems.setdefault(_gguf_stem(name), name)
    if len(stems) == 1:
        ((stem, name),) = stems.items()
        return name, stem
    if stems:
        raise _ambiguous(folder, list(stems.values()))
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            f'folder "{folder}" has its weights only as pickles, which can run code when they are read '
            f"({', '.join(pickles[:3])})",
            hint="load the model in its own library and save it as safetensors",
        )
    raise CheckpointError(f'folder "{folder}" holds no weights', hint="expected *.safetensors, or *.gguf")


def _gguf_stem(name: str) -> str:
    match = _SHARD.match(name)
    return match["stem"] if match else name.removesuffix(".gguf")


def _ambiguous(folder: Path, names: list[str]) -> CheckpointError:
    shown = ", ".join(sorted(names)[:5])
    return CheckpointError(
        f'folder "{folder}" holds several checkpoints: {shown}',
        hint="name the file that is meant instead of the folder",
    )
