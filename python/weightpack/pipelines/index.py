"""`model_index.json`: which class a pipeline is, what it consists of, and where that comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..folder import PIPELINE, read_json


@dataclass(frozen=True)
class Index:
    """What a `model_index.json` says.

    `class_name` is the pipeline's, `components` gives library and class of each part that is there,
    `absent` names optional ones that are not, `options` are further arguments of the pipeline.
    """

    class_name: Any
    components: Mapping[str, tuple[str, str]]
    absent: frozenset[str]
    options: Mapping[str, Any]


def read_index(folder: Path) -> Index:
    """The index of the pipeline in `folder`. Raises `CheckpointError` where there is none, or where it is
    damaged."""
    if not (folder / PIPELINE).is_file():
        raise CheckpointError(
            f'"{folder}" is no pipeline: it has no {PIPELINE}', hint="weightpack.from_pretrained loads a single model"
        )
    fields = read_json(folder / PIPELINE)
    components: dict[str, tuple[str, str]] = {}
    absent = set()
    options = {}
    for name, value in fields.items():
        if name.startswith("_"):
            continue
        if not (isinstance(value, list) and len(value) == 2 and (value[0] is None or isinstance(value[0], str))):
            options[name] = value
        elif value[0] is None:
            absent.add(name)
        elif not isinstance(value[1], str) or "/" in name or name in (".", ".."):
            raise CheckpointError(f'"{folder / PIPELINE}" has no library and class for "{name}": {value!r}')
        else:
            components[name] = (value[0], value[1])
    return Index(fields.get("_class_name"), components, frozenset(absent), options)
