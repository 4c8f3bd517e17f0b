"""compressed-tensors: decoded, and not written."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["FORMATS", "METHODS", "describes", "leftovers"]

METHODS = ("compressed-tensors",)
FORMATS = ("compressed-tensors:", "fp8:", "modelopt:mxfp8")
_ARRAYS = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_global_scale", ".compressed", ".bitmask")


def leftovers(names: Iterable[str]) -> list[str]:
    """Codes, and scales and zeros without a weight that is decoded."""
    return [name for name in names if name.endswith(_ARRAYS)]


def describes(key: str, value: str) -> bool:
    """Nothing is told by metadata."""
    return False
