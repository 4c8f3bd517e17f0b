"""HQQ: decoded, and not written."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["FORMATS", "METHODS", "describes", "leftovers"]

METHODS = ("hqq",)
FORMATS = ("hqq:",)
_CODES = ".W_q"
_RECORD = ".unpack_view_dtype"


def leftovers(names: Iterable[str]) -> list[str]:
    """Codes and what is said of their type. Codes alone may be somebody else's parameter."""
    names = set(names)
    described = {name.removesuffix(_RECORD) for name in names if name.endswith(_RECORD)}
    codes = [f"{module}{_CODES}" for module in described if f"{module}{_CODES}" in names]
    return sorted(codes) + sorted(name for name in names if name.endswith(_RECORD))


def describes(key: str, value: str) -> bool:
    """Nothing is told by metadata."""
    return False
