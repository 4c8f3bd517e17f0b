"""GGUF blocks in safetensors files: which type each array of bytes is, said in `config.json`.

A packed weight is stored under its own name as uint8 [rows, bytes of a row]. `quantization_config` has
`stored_types`, from the path of a module to a type; a path with `*` in place of numbers speaks for all
modules of a list of blocks, and a path that is written out goes first (`None`: not packed):

    {"blocks.*.down": "Q4_K", "blocks.0.down": "Q6_K"}

`stored_shapes` has the shapes of those weights whose rows are no rows of blocks, such as kernels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
LEAF = ".weight"


def compact(types: Mapping[str, str | None]) -> dict[str, str | None]:
    """Types by path in short: `types` has all layers, those that are not packed as well.

    >>> compact({"a.0.up": "Q4_K", "a.1.up": "Q4_K", "a.2.up": "Q6_K", "norm": None})
    {'a.*.up': 'Q4_K', 'a.2.up': 'Q6_K'}
    """
    groups: dict[str, dict[str, str | None]] = {}
    for path, kind in types.items():
        groups.setdefault(_pattern(path), {})[path] = kind
    found: dict[str, str | None] = {}
    for pattern, group in groups.items():
        common = Counter(group.values()).most_common(1)[0][0]
        if len(group) == 1 or common is None:
            found |= {path: kind for path, kind in group.items() if kind is not None}
        else:
            found[pattern] = common
            found |= {path: kind for path, kind in group.items() if kind != common}
    return found


def type_of(types: Mapping[str, str | None], path: str) -> str | None:
    """The type of the module at `path`, `None` where it is not packed.

    >>> type_of({"a.*.up": "Q4_K", "a.2.up": "Q6_K"}, "a.2.up")
    'Q6_K'
    """
    return types[path] if path in types else types.get(_pattern(path))


def checked(types: Any, known: Mapping[str, Any]) -> dict[str, str | None] | None:
    """`stored_types` of a config. Raises `ConfigError` for what is none."""
    if types is None:
        return None
    if not isinstance(types, Mapping):
        raise ConfigError(f"stored_types is a {type(types).__name__}, expected types by module")
    for path, kind in types.items():
        if kind is not None and (kind not in known or known[kind]["block_weights"] < 2):
            raise ConfigError(f'stored_types: {kind!r} is no type of blocks (module "{path}")')
    return dict(types)


def checked_shapes(shapes: Any) -> dict[str, tuple[int, ...]] | None:
    """`stored_shapes` of a config. Raises `ConfigError` for what is none."""
    if shapes is None:
        return None
    if not isinstance(shapes, Mapping):
        raise ConfigError(f"stored_shapes is a {type(shapes).__name__}, expected shapes by module")
    for path, shape in shapes.items():
        if not isinstance(shape, list | tuple) or not all(type(size) is int and size > 0 for size in shape):
            raise ConfigError(f'stored_shapes: {shape!r} is no shape (module "{path}")')
    return {path: tuple(shape) for path, shape in shapes.items()}


def _pattern(path: str) -> str:
    return _NUMBER.sub("*", path)
