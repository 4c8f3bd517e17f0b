"""GPTQ: decoded, and not written."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["FORMATS", "METHODS", "describes", "leftovers"]

METHODS = ("gptq",)
FORMATS = ("gptq:",)
_ARRAYS = (".qweight", ".qzeros", ".g_idx")


def leftovers(names: Iterable[str]) -> list[str]:
    """Codes, zeros and orders of columns."""
    return [name for name in names if name.endswith(_ARRAYS)]


def describes(key: str, value: str) -> bool:
    """Nothing is told by metadata."""
    return False
