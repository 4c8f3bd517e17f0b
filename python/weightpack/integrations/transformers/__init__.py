"""transformers, both ways: what the loader asks about its model classes, and weightpack's quantizers
behind its own `from_pretrained`.

Importing this loads nothing of transformers or torch, and changes nothing in them: `register()` does.
"""

from __future__ import annotations

from .host import TransformersHost
from .registration import is_registered, register, unregister

ADAPTER = TransformersHost()
"""What the loader asks; see `weightpack.loading.host`."""

__all__ = ["ADAPTER", "TransformersHost", "is_registered", "register", "unregister"]
