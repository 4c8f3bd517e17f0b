"""gpt-oss: stacks of experts in 4-bit floats, decoded, and not written."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["FORMATS", "METHODS", "describes", "leftovers"]

METHODS = ("mxfp4",)
FORMATS = ("mxfp4:",)
_ARRAYS = ("_blocks", "_scales")


def leftovers(names: Iterable[str]) -> list[str]:
    """Codes and scales."""
    return [name for name in names if name.endswith(_ARRAYS)]


def describes(key: str, value: str) -> bool:
    """Nothing is told by metadata."""
    return False
