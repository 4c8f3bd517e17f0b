"""Saving a person's own modules, packed or not, through the engine: beside the destination, then in its place."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import _arrays, _rust
from .errors import ConfigError, FormatError
from .folder import CONFIG
from .quantizers.base import quantizer_of
from .quantizers.dtypes import stored_name
from .sizes import parse_size

STEM = "model"
MEMORY_BYTES = 64 << 20


def save_module(
    model: Any,
    path: str | os.PathLike[str],
    *,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
) -> None:
    """Writes a folder with `model.safetensors` (or shards and their index) and `config.json`.

    The folder takes its place when all of it is written; one that is there is replaced only if
    `overwrite`, and is whole until then. A tensor of several names is stored under the first.
    `config.json` holds the model's `config`, and for a packed model how it is packed.

    Raises `ConfigError` for a model whose backend cannot save it, before anything is written, and for a
    config that is no JSON; `OSError` where the folder cannot be written or is there already.
    """
    tensors, metadata = _state(model)
    config = _config(model)
    names, arrays = _distinct(tensors)
    checkpoint = _rust.Checkpoint.from_arrays(type(model).__name__, names, arrays, time.time_ns())
    rows = [{"checkpoint": 0, "name": name, "as": name, "format": "copy"} for name, _, _ in names]
    request = {
        "destination": os.fspath(Path(path).absolute()),
        "kind": "folder",
        "outputs": [
            {
                "container": "safetensors",
                "stem": STEM,
                "max_shard_bytes": parse_size(max_shard_size, "max_shard_size"),
                "metadata": {**metadata, "format": "pt"},
                "tensors": rows,
            }
        ],
        "files": [{"path": CONFIG, "text": config}],
        "options": {"max_memory_bytes": MEMORY_BYTES, "verify": False, "keep_nonfinite": True},
    }
    plan = _rust.Plan.build(json.dumps(request), [checkpoint])
    plan.run(overwrite=overwrite, resume=False, on_progress=None)


def _state(model: Any) -> tuple[Mapping[str, Any], dict[str, str]]:
    """The tensors as files hold them, and what the files say besides."""
    quantizer = quantizer_of(model)
    if quantizer is None:
        return model.state_dict(), {}
    if not quantizer.is_serializable:
        raise ConfigError(f"{quantizer.name} models cannot be saved yet", hint="dequantize() gives one that can")
    return quantizer.stored_state(model)


def _config(model: Any) -> str:
    own = getattr(model, "config", None) or {}
    if not isinstance(own, Mapping):
        raise ConfigError(f"the config of {type(model).__name__} is a {type(own).__name__}, expected a dictionary")
    fields = {key: value for key, value in own.items() if key != "quantization_config"}
    quantizer = quantizer_of(model)
    if quantizer is not None:
        fields["quantization_config"] = quantizer.config.to_dict()
    try:
        return json.dumps(fields, indent=2) + "\n"
    except TypeError as error:
        raise ConfigError(f"the config of {type(model).__name__} is no JSON: {error}") from error


def _distinct(tensors: Mapping[str, Any]) -> tuple[list[tuple[str, str, list[int]]], list[Any]]:
    """Name, type and shape of each tensor, and its bytes; each memory once."""
    seen: set[tuple[Any, ...]] = set()
    names, arrays = [], []
    for name, value in tensors.items():
        tensor = value.detach()
        if tensor.device.type == "meta":
            raise FormatError(f'"{name}" is not in memory: bring the model back from the disk first')
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        names.append((name, stored_name(tensor.dtype), [int(size) for size in tensor.shape]))
        arrays.append(_arrays.view(tensor.cpu()).data)
    return names, arrays
