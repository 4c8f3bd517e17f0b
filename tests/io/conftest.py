"""Copying tensors from container to container, unchanged, through the native plan."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from weightpack import _rust

CORPUS = Path(__file__).parents[1] / "corpus"
VECTORS = Path(__file__).parents[1] / "vectors" / "containers"


def copy_tensors(
    source: Path,
    destination: Path,
    *,
    metadata: dict[str, str] | list[Any] | None = None,
    max_shard_bytes: int | None = None,
    carry_metadata: bool = False,
    reverse: bool = False,
) -> dict[str, Any]:
    """Writes every tensor of `source` as it is stored; gives the plan's report. A destination without extension is a
    folder of shards."""
    checkpoint = _rust.Checkpoint.open(str(source))
    described = json.loads(checkpoint.describe())
    names = [part["name"] for tensor in described["tensors"] for part in tensor["parts"]]
    is_file = destination.suffix in (".safetensors", ".gguf")
    container = destination.suffix[1:] if is_file else "safetensors"
    output: dict[str, Any] = {
        "container": container,
        "folder": "",
        "stem": destination.stem if is_file else "model",
        "max_shard_bytes": max_shard_bytes,
        "metadata": metadata if metadata is not None else ([] if container == "gguf" else {}),
        "metadata_from": 0 if carry_metadata else None,
        "tensors": [
            {"checkpoint": 0, "name": name, "as": name, "format": "copy", "params": {}, "why": "test"}
            for name in (reversed(names) if reverse else names)
        ],
    }
    request: dict[str, Any] = {
        "destination": str(destination),
        "kind": "file" if is_file else "folder",
        "outputs": [output],
        "files": [],
        "options": {},
    }
    plan = _rust.Plan.build(json.dumps(request), [checkpoint])
    report: dict[str, Any] = json.loads(plan.run(overwrite=False, resume=False, on_progress=None))
    return report


@pytest.fixture
def peer_version(peer: Callable[[str], ModuleType]) -> Callable[[str, str], ModuleType]:
    """`peer_version("gguf", "0.19.0")` imports a peer, or skips when another version is installed."""

    def find(name: str, version: str) -> ModuleType:
        module = peer(name)
        installed = importlib.metadata.version(name)
        if installed != version:
            pytest.skip(f"golden files are of {name} {version}, installed is {installed}")
        return module

    return find
