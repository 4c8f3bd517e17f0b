"""FormatInfo names: what a person may write, and what the format table makes of it.

The table itself is native; this module only looks names up in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache

from .errors import ConfigError

CASTS = ("bf16", "f16", "f32")
"""Formats that store one floating point number per weight."""

COPY = "copy"
"""Pseudo format: the stored bytes are carried over as they are."""


@dataclass(frozen=True, slots=True)
class FormatInfo:
    """One row of the table of formats."""

    name: str
    """Full name, `backend:name`."""
    short: str | None
    """Short form, where it is unambiguous."""
    container: str
    """What its reader opens: `safetensors`, `gguf` or `any`."""
    exactness: str
    """`exact`: byte-equal to the peer; `exact given X`: once X is given."""
    peer: str
    """The library and version that the bytes are equal to."""
    reader: str
    """Who reads the result."""
    bits_per_weight: float
    """Data and scales, at default parameters."""
    encodes: str
    """When it can be written: `always`, `with importance` (a vector is needed) or `never`."""

    @property
    def backend(self) -> str:
        """What stands before the colon; empty for plain numbers."""
        return self.name.partition(":")[0] if ":" in self.name else ""


@cache
def format_table() -> tuple[FormatInfo, ...]:
    """Every format of this version, in the order that tables show them."""
    from . import _rust

    fields = FormatInfo.__dataclass_fields__
    return tuple(FormatInfo(**{key: row[key] for key in fields}) for row in json.loads(_rust.formats()))


def find_format(name: str) -> FormatInfo:
    """The format called `name`, by its full or short name, in any case.

    Raises `ConfigError` for a name that is not in the table, or that several backends share.
    """
    return choose(name, format_table())


def match(name: str, table: Iterable[FormatInfo]) -> FormatInfo | None:
    """The row of `table` that `name` is the full or short name of, in any case."""
    wanted = name.strip().lower()
    return next((row for row in table if wanted in (row.name, row.short)), None)


def choose(name: str, table: Iterable[FormatInfo]) -> FormatInfo:
    """As `find_format`, from the rows of `table`."""
    rows = list(table)
    row = match(name, rows)
    if row is not None:
        return row
    wanted = name.strip().lower()
    endings = [row.name for row in rows if row.name.partition(":")[2] == wanted]
    if endings:
        raise ConfigError(f'format "{name}" needs its backend', hint=f"write {' or '.join(endings)}")
    names = [form for row in rows for form in (row.name, row.short) if form is not None]
    close = get_close_matches(wanted, names, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known formats: {', '.join(r.name for r in rows)}"
    raise ConfigError(f'unknown format "{name}"', hint=hint)
