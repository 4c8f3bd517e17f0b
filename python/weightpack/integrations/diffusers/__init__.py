"""The adapter to diffusers, in both directions.

`ADAPTER` is what `weightpack.from_pretrained` asks about diffusers' model classes. Nothing here
imports diffusers before it is used.
"""

from __future__ import annotations

from .host import DiffusersHost

ADAPTER = DiffusersHost()
"""What the loader asks; see `weightpack.loading.host`."""
