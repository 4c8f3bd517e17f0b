"""Memory that the C library keeps after it was freed.

Weights on their way to a backend's packer come and go in pieces of some megabytes. glibc keeps freed
pieces of up to 32 MB for later, scattered between what stays, and a model loaded so would take several
times its size.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def give_back() -> None:
    """Returns freed memory to the system, where the C library has a way to."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
