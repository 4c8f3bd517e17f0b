"""`weightpack.save_pipeline`: a whole pipeline, packed or not, in one step."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from .._lazy import require
from ..errors import ConfigError
from ..folder import PIPELINE
from ..loading.host import HOSTS, host_of
from ..saving.destination import folder_beside, place_of
from ..saving.parts import part_of, write
from ..sizes import parse_size
from .host import pipeline_host
from .load import about


def save_pipeline(
    pipeline: Any,
    path: str | os.PathLike[str],
    *,
    max_shard_size: str | int = "5GB",
    safe_serialization: bool = True,
    variant: str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    on_progress: Callable[[int, int, int, str], None] | None = None,
) -> None:
    """Writes a pipeline folder that diffusers' own `from_pretrained` loads.

    `pipeline` is any pipeline of diffusers; its models are packed by weightpack, each for a backend of
    its own, or are plain. The folder is built beside `path` and takes its place in one step, all
    components at once; at any moment there is the earlier pipeline or the new one. `model_index.json` is
    diffusers' own; how a model is packed stands in its `config.json`.

    Options are those of `weightpack.save_pretrained`, for each component. In a folder that is there,
    weights of the same components give way, and files that are nobody's stay; without `overwrite` a
    file in the way is an error.

    Raises `ConfigError` for a component that cannot be saved, which it names, and for a destination in
    the way, `OSError` where the place cannot be written or has no room. Nothing has been touched then.
    """
    size = parse_size(max_shard_size, "max_shard_size")
    host = pipeline_host()
    torch = require("torch", "save models")
    parts = []
    others = {}
    for component, value in host.parts(pipeline).items():
        with about(component):
            if isinstance(value, torch.nn.Module) and host_of(type(value)).name in HOSTS:
                parts.append(part_of(value, folder=component, variant=variant, safe_serialization=safe_serialization))
            elif callable(getattr(value, "save_pretrained", None)):
                others[component] = value
            else:
                raise ConfigError(f"{type(value).__name__} cannot be saved: it has no save_pretrained")
    destination = place_of(path)
    with folder_beside(destination) as aside:
        files = {}
        for component, value in others.items():
            value.save_pretrained(os.fspath(aside / component))
            for file in sorted((aside / component).rglob("*")):
                if file.is_file():
                    files[file.relative_to(aside).as_posix()] = file
        write(
            type(pipeline).__name__,
            destination,
            parts,
            max_shard_bytes=size,
            texts={PIPELINE: host.index_text(pipeline)},
            files=files,
            overwrite=overwrite,
            threads=threads,
            on_progress=on_progress,
        )
