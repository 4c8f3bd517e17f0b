"""AWQ: decoded, and not written."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["FORMATS", "METHODS", "describes", "leftovers"]

METHODS = ("awq",)
FORMATS = ("awq:",)
_ARRAYS = (".qweight", ".qzeros")


def leftovers(names: Iterable[str]) -> list[str]:
    """Codes and zeros."""
    return [name for name in names if name.endswith(_ARRAYS)]


def describes(key: str, value: str) -> bool:
    """Nothing is told by metadata."""
    return False
