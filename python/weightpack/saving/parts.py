"""What a model is on disk, and how one or several of them are written as one."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import _rust
from ..errors import ConfigError
from ..folder import CONFIG, PIPELINE
from ..loading.host import host_of
from ..loading.skeleton import build
from ..quantizers.base import quantizer_of
from ..stored import Stored
from .destination import (
    carried_files,
    current_folder,
    folders_above,
    index_name,
    is_replaced,
    place_of,
    weights_stem,
)
from .offloaded import brought_back, tied_again
from .pickle import pickled

MEMORY_BYTES = 32 << 20


@dataclass(frozen=True)
class Part:
    """One model of what is written: its tensors, and the files beside them.

    `folder` is relative to the destination ("" is the destination itself), `stem` the file name of its
    weights without variant. `metadata` stands in the header of each weights file, `texts` are further
    files by name, `files` such that are taken from another place. With `is_pickle` weights go to torch's
    own files, under the names that these have (`pytorch_model`). `objects` are written by `torch.save`.
    """

    tensors: Sequence[Stored]
    stem: str
    folder: str = ""
    variant: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    objects: Mapping[str, Any] = field(default_factory=dict)
    is_pickle: bool = False

    def path(self, name: str) -> str:
        """The file `name` of this part, relative to the destination."""
        return f"{self.folder}/{name}" if self.folder else name


def part_of(
    model: Any,
    *,
    folder: str = "",
    variant: str | None = None,
    safe_serialization: bool = True,
    form: str | None = None,
) -> Part:
    """What is written for `model`; unless `safe_serialization` it goes to torch's own files. `form` names one of
    the forms that its backend has for other programs.

    Raises `ConfigError` for a model that cannot be saved (in this form), or whose config is no JSON.
    """
    if getattr(model, "config_name", None) == PIPELINE:
        raise ConfigError(f"{type(model).__name__} is a pipeline of models", hint="weightpack.save_pipeline saves it")
    host = host_of(type(model))
    quantizer = quantizer_of(model)
    if quantizer is None and getattr(model, "hf_quantizer", None) is not None:
        known = getattr(host, "quantizer_for", None)
        quantizer = None if known is None else known(model)
        if quantizer is None:
            raise ConfigError(
                f"{host.name} packed this model by itself, and only {host.name} knows how its weights are stored",
                hint="load it with weightpack.from_pretrained, or call register() of its integration before",
            )
    if quantizer is not None and not quantizer.is_serializable:
        raise ConfigError(
            f"{quantizer.name} models cannot be saved: {quantizer.unserializable_reason}",
            hint="dequantize() gives a model that can",
        )
    if form is not None and (quantizer is None or not safe_serialization):
        told = "the model is not packed" if quantizer is None else "it is one of safetensors files"
        raise ConfigError(f"form={form!r}: {told}")
    section: dict[str, Any] | None = None
    objects: Mapping[str, Any] = {}
    beside: Mapping[str, str] = {} if quantizer is None else quantizer.beside(model)
    with brought_back(model):
        if quantizer is not None and form is not None:
            texts = host.files(model, quantizer)
            made = quantizer.exported(model, form, lambda: _skeleton(host, model, quantizer, texts[CONFIG]))
            state, section, metadata, objects = made.tensors, made.section, dict[str, str](), made.objects
            beside = {**beside, **made.texts}
        elif quantizer is None:
            state, metadata = model.state_dict(), dict[str, str]()
        elif safe_serialization:
            state, metadata = quantizer.stored_state(model)
        else:
            state, metadata = quantizer.pickled_state(model), {}
    tensors = host.stored_tensors(model, quantizer, tied_again(model, state))
    texts = {**host.files(model, quantizer), **beside}
    if section is not None:
        config = {**json.loads(texts[CONFIG]), "quantization_config": section}
        texts[CONFIG] = json.dumps(config, indent=2) + "\n"
    elif quantizer is not None:
        named, more = quantizer.written_form({stored.name: stored.tensor for stored in tensors})
        tensors = [replace(stored, tensor=named[stored.name]) for stored in tensors]
        texts = dict(_with_more(texts, more))
    unread = getattr(host, "unread", None)
    fate = None if form is not None or unread is None else unread(quantizer)
    if fate is not None:
        warnings.warn(fate, stacklevel=3)
    stem = host.stem or "model"
    return Part(
        tensors,
        stem,
        folder,
        variant,
        {**metadata, "format": "pt"},
        texts,
        objects=objects,
        is_pickle=not safe_serialization,
    )


def _skeleton(host: Any, model: Any, quantizer: Any, config: str) -> Any:
    """A model such as this one was before it was packed, on the meta device."""
    plain = {key: value for key, value in json.loads(config).items() if key != "quantization_config"}
    model_class, found = host.load_config(type(model), plain, None)
    return build(lambda: host.build(model_class, found, quantizer.torch_dtype))


def _with_more(texts: Mapping[str, str], more: Mapping[str, Any]) -> Mapping[str, str]:
    """The files with `more` in the `quantization_config` of `config.json`."""
    if not more:
        return texts
    config = json.loads(texts[CONFIG])
    known = config.get("quantization_config", {})
    # In an order that does not depend on whether the model was read from such a folder.
    config["quantization_config"] = {**{key: known[key] for key in known if key not in more}, **more}
    return {**texts, CONFIG: json.dumps(config, indent=2) + "\n"}


def write(
    name: str,
    destination: Path,
    parts: Sequence[Part],
    *,
    max_shard_bytes: int,
    texts: Mapping[str, str] | None = None,
    files: Mapping[str, Path] | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    on_progress: Callable[[int, int, int, str], None] | None = None,
) -> None:
    """Writes `parts`, `texts` and `files` (paths relative to the destination) beside `destination`, then puts
    all in its place in one step. Files there that are nobody's stay; those of earlier models go.

    A destination that is a link to a folder stays one: what it leads to is replaced. What a killed save left
    beside the destination is removed. Of several at once to one place the last one counts, as a whole.

    Raises `ConfigError` where a file is in the way and `overwrite` is not given, `OSError` where the
    disk has no room or the place cannot be written: then nothing has been touched.
    """
    destination = place_of(destination)
    new_texts = dict(texts or {})
    new_files = dict(files or {})
    for part in parts:
        new_texts.update({part.path(one): text for one, text in part.texts.items()})
        new_files.update({part.path(one): file for one, file in part.files.items()})
    written = {*new_texts, *new_files, *(part.path(one) for part in parts for one in part.objects)}

    def is_old(name: str) -> bool:
        folder, _, file = name.rpartition("/")
        return any(folder == part.folder and is_replaced(file, part.variant, part.stem) for part in parts)

    def keep(folder: str | os.PathLike[str]) -> list[Path]:
        return carried_files(Path(folder), written, is_old, overwrite=overwrite)

    keep(destination)
    own = [part for part in parts if part.is_pickle or part.objects]
    with (
        folders_above(destination),
        current_folder(destination),
        pickled(destination, own, max_shard_bytes, on_progress) as (weights, indexes),
    ):
        request, checkpoint = _request(
            name,
            destination,
            [part for part in parts if not part.is_pickle],
            max_shard_bytes,
            {**new_files, **weights},
            {**indexes, **new_texts},
            threads,
        )
        plan = _rust.Plan.build(json.dumps(request), [checkpoint])
        # What is in the way is settled by `keep`, file by file, once more when the folder is replaced.
        is_pickle = any(part.is_pickle for part in parts)
        plan.run(overwrite=True, resume=False, on_progress=None if is_pickle else on_progress, keep=keep)


def _request(
    name: str,
    destination: Path,
    parts: Sequence[Part],
    max_shard_bytes: int,
    files: Mapping[str, Path],
    texts: Mapping[str, str],
    threads: int | None,
) -> tuple[dict[str, Any], _rust.Checkpoint]:
    """How the engine is asked, and the source that it reads."""
    arrays: list[Any] = []
    rows: dict[str, tuple[str, str, list[int]]] = {}
    outputs = [_output(number, part, max_shard_bytes, rows, arrays) for number, part in enumerate(parts)]
    request = {
        "destination": os.fspath(destination),
        "kind": "folder",
        "outputs": [output for output in outputs if output["tensors"]],
        "files": [
            *({"path": path, "link": os.fspath(file)} for path, file in files.items()),
            *({"path": path, "text": text} for path, text in texts.items()),
        ],
        "options": {
            "max_memory_bytes": MEMORY_BYTES,
            "verify": False,
            "keep_nonfinite": True,
            "threads": threads,
        },
    }
    return request, _rust.Checkpoint.from_arrays(name, list(rows.values()), arrays, time.time_ns())


def _output(
    number: int, part: Part, max_shard_bytes: int, rows: dict[str, tuple[str, str, list[int]]], arrays: list[Any]
) -> dict[str, Any]:
    """How the engine is asked for the weights of one part; adds its tensors to the source."""
    tensors = []
    for stored in part.tensors:
        source = part.path(stored.name)
        if source in rows:
            source = f"{number}/{source}"
        rows[source] = (source, stored.dtype, stored.shape)
        arrays.append(stored.source())
        row: dict[str, Any] = {"checkpoint": 0, "name": source, "as": stored.name, "format": "copy"}
        if stored.with_previous:
            row["with_previous"] = True
        tensors.append(row)
    return {
        "container": "safetensors",
        "folder": part.folder,
        "stem": weights_stem(part.stem, part.variant),
        "index": index_name(part.stem, part.variant),
        "max_shard_bytes": max_shard_bytes,
        "metadata": dict(part.metadata),
        "tensors": tensors,
    }
