"""A model as one GGUF file.

A model that came from a GGUF file becomes that file again: packed tensors byte for byte, names, order
and pairs kept (`gguf_back`). One that was packed here gets the layout of a conversion (`gguf_anew`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..folder import CONFIG
from ..loading.gguf_origin import Origin
from ..loading.host import host_of
from ..quantizers.base import quantizer_of
from .gguf_anew import draft_anew
from .gguf_back import draft_back
from .offloaded import brought_back, tied_again

ENDING = ".gguf"


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a model is saved there as a GGUF file."""
    return os.fspath(path).lower().endswith(ENDING)


def save_gguf(
    model: Any,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    threads: int | None = None,
    on_progress: Callable[[int, int, int, str], None] | None = None,
) -> None:
    """Writes `model`, packed in GGUF blocks or not at all, to the file `path`, in one step.

    Raises `ConfigError` for a model of another backend, for one whose pairs cannot be made, and for a
    file that is there unless `overwrite`; `UnsupportedError` for a tensor that has no place in the
    architecture. Nothing has been touched then.
    """
    destination = Path(os.path.abspath(path))
    if destination.is_dir():
        raise ConfigError(f"{destination} is a folder, and a GGUF model is one file")
    if os.path.lexists(destination) and not overwrite:
        raise ConfigError(f"{destination} is there", hint="save to another place, or replace it with overwrite=True")
    host, quantizer = host_of(type(model)), quantizer_of(model)
    if quantizer is None and getattr(model, "hf_quantizer", None) is not None:
        raise ConfigError(
            f"{host.name} packed this model by itself",
            hint="load it with weightpack.from_pretrained, or call register() before and give weightpack's config",
        )
    if quantizer is not None and quantizer.name != "gguf":
        raise ConfigError(
            f"{quantizer.name} weights are no GGUF blocks",
            hint="dequantize() gives a model that can be saved as GGUF, and convert() one that is packed",
        )
    with brought_back(model):
        state = tied_again(model, model.state_dict())
    tensors = host.stored_tensors(model, quantizer, state)
    origin = getattr(quantizer, "origin", None)
    if isinstance(origin, Origin):
        own = {(one.device, one.data_ptr()) for one in model.parameters()}
        parameters = [one for one in tensors if (one.tensor.device, one.tensor.data_ptr()) in own]
        draft = draft_back(state, parameters, origin)
    else:
        config = json.loads(host.files(model, quantizer)[CONFIG])
        config.pop("quantization_config", None)
        draft = draft_anew(type(model).__name__, tensors, config or None, _folder_of(model, quantizer))
    draft.write(type(model).__name__, destination, overwrite=overwrite, threads=threads, on_progress=on_progress)


def _folder_of(model: Any, quantizer: Any) -> Path | None:
    """The folder that the model came from, if it is still there: what the loader noted, or the host."""
    noted = getattr(quantizer, "source_folder", None) or getattr(model, "name_or_path", None)
    return Path(noted) if noted and Path(noted, CONFIG).is_file() else None
