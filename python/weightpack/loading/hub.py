"""Models by name: `owner/model` on the Hugging Face hub, downloaded once into its cache."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .._lazy import is_installed, missing, require
from ..errors import CheckpointError
from ..folder import CONFIG, read_json
from .source import weight_names

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (".safetensors", ".gguf", ".json", ".bin", ".pt", ".pth", ".ckpt")
_PURPOSE = "download models"


def is_name(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is nothing on this machine, and could be the name of a model on the hub."""
    if not isinstance(path, str) or _NAME.fullmatch(path) is None or path.endswith(_FILES):
        return False
    return not Path(path).exists()


def download(
    name: str,
    *,
    stem: str | None,
    subfolder: str | None,
    variant: str | None,
    use_safetensors: bool | None,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    """The folder in the cache that holds the model's configs and the one set of weights asked for.

    Raises as `fetch_files`.
    """
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""

    def fetch(names: list[str]) -> Path:
        return fetch_files(
            name,
            [prefix + one for one in names],
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )

    folder = fetch(
        [CONFIG, "generation_config.json", "*.index.json", "*.index.*.json", "quanto_qmap.json", "hf_quant_config.json"]
    )
    for wanted in weight_names(stem, variant, use_safetensors):
        place = folder / (subfolder or "")
        if wanted.endswith(".json"):
            if not (place / wanted).is_file():
                continue
            files = sorted(set(read_json(place / wanted).get("weight_map", {}).values()))
            fetch([str(file) for file in files])
        else:
            fetch([wanted])
        if (place / wanted).is_file():
            break
    return folder


def fetch_files(
    name: str,
    patterns: list[str],
    *,
    left_out: list[str] | None = None,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    """The folder in the cache that holds those files of `name` which match one of `patterns` and none of
    `left_out`.

    Raises `BackendError` without huggingface_hub, `CheckpointError` for a model that is neither in the
    cache nor on the hub.
    """
    if not is_installed("huggingface_hub"):
        raise missing("huggingface_hub", _PURPOSE)
    hub = require("huggingface_hub", _PURPOSE)
    errors = require("huggingface_hub.errors", _PURPOSE)
    options: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    try:
        return Path(hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=left_out, **options))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f'"{name}" is no folder here, and was not found on the hub: {reason}',
            hint="check the name, the network, and whether the model wants a token",
        ) from error
