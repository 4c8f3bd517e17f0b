"""Small text files of a model folder."""

from __future__ import annotations

import json
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
