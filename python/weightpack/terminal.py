"""Text that goes to a terminal. Names come out of files that nobody vouches for."""

from __future__ import annotations

import sys


def printable(text: str) -> str:
    """`text` with every character that could drive a terminal shown as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def message(kind: str, text: str) -> None:
    """One line on standard error, as in `warning: ...`."""
    sys.stderr.write(f"{kind}: {printable(text)}\n")
    sys.stderr.flush()
