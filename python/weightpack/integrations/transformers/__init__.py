"""The adapter to transformers, in both directions.

`ADAPTER` is what `weightpack.from_pretrained` asks about transformers' model classes. Nothing here
imports transformers before it is used.
"""

from __future__ import annotations

from .host import TransformersHost

ADAPTER = TransformersHost()
"""What the loader asks; see `weightpack.loading.host`."""
