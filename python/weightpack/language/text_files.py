"""Small text files of a model folder, and the values in them: checked where they are taken out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MOST_BYTES = 256 * 1024 * 1024
"""Largest file that is read. A `tokenizer.json` takes up to some tens of megabytes."""


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; `None` where there is no such file."""
    if not path.is_file():
        return None
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'not JSON: {error} (file "{path}")') from None
    if not isinstance(value, dict):
        raise CheckpointError(f'expected a JSON object (file "{path}")')
    return value


def read_text(path: Path) -> str:
    """The text of a file."""
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise CheckpointError(f'larger than {MOST_BYTES} bytes (file "{path}")')
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f'not UTF-8: {error} (file "{path}")') from None


def object_at(value: Any, where: str) -> Mapping[str, Any]:
    """`value` where it is an object, an empty one where there is none. `where` names it to people."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where} is no object")
    return value


def objects_at(value: Any, where: str) -> list[Mapping[str, Any]]:
    """`value` where it is a list of objects, an empty one where there is none."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        raise CheckpointError(f"{where} is no list of objects")
    return value
