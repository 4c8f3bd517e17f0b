"""transformers, both ways: what the loader asks about its model classes, and weightpack's quantizers
behind its own `from_pretrained`.

Importing this loads nothing of transformers or torch, and changes nothing in them.
"""

from __future__ import annotations

from .host import TransformersHost

ADAPTER = TransformersHost()

__all__ = ["ADAPTER", "TransformersHost"]
