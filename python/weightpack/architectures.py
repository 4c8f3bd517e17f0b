"""Which architecture a model is, among those whose tensors get the names that GGUF readers know.

Every family of architectures is one row of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from . import keymaps
from .errors import ConfigError
from .language import architecture as language
from .mapping import Architecture

NONE = "none"
"""What a person writes to keep the names of the source."""


@dataclass(frozen=True)
class Family:
    """Architectures that are handled alike.

    `names` are those that a person may ask for. `find` gives the architecture of that name, or with
    `None` the one that the config and the tensor names belong to, or `None` where that is not one
    of the family.
    """

    names: tuple[str, ...]
    find: Callable[[str | None, Mapping[str, Any] | None, Collection[str]], Architecture | None]


FAMILIES: tuple[Family, ...] = (
    Family(keymaps.NAMES, keymaps.find),
    Family(language.NAMES, language.find),
)


def find_architecture(
    name: str | None, config: Mapping[str, Any] | None, tensors: Collection[str]
) -> Architecture | None:
    """The architecture called `name`, or the one that a model with this `config.json` and these
    tensor names is of; `None` where it is of none that is known, or `name` is "none".

    Raises `ConfigError` for a name that no family has.
    """
    wanted = None if name is None else name.strip().lower().replace("-", "_")
    if wanted == NONE:
        return None
    for family in FAMILIES:
        if wanted is None or wanted in family.names:
            found = family.find(wanted, config, tensors)
            if found is not None:
                return found
    if wanted is None:
        return None
    known = [known for family in FAMILIES for known in family.names]
    close = get_close_matches(wanted, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join([*known, NONE])}"
    raise ConfigError(f'unknown architecture "{name}"', hint=hint)
