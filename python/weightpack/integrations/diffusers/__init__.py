"""diffusers, both ways: what the loader asks about its model classes, and weightpack's quantizers behind
its own `from_pretrained`.

Importing this loads nothing of diffusers or torch, and changes nothing in them: `register()` does.
"""

from __future__ import annotations

from .host import DiffusersHost
from .registration import is_registered, register, unregister

ADAPTER = DiffusersHost()
"""What the loader asks; see `weightpack.loading.host`."""

__all__ = ["ADAPTER", "DiffusersHost", "is_registered", "register", "unregister"]
