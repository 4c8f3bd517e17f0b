"""The device of each module, by the longest path in a device map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ConfigError

DISK = "disk"


class Placement:
    """The device of each tensor and module: that of the longest path in the map that leads to it.

    Without a map everything is on the CPU.

    >>> Placement({"": "cpu", "blocks.1": "disk"}).of("blocks.1.up.weight")
    'disk'
    """

    def __init__(self, device_map: Mapping[str, Any] | None) -> None:
        self._map = dict(device_map) if device_map is not None else {"": "cpu"}

    def of(self, name: str) -> str:
        """The device of tensor or module `name`. Raises `ConfigError` for one that the map leaves out."""
        path = name
        while True:
            if path in self._map:
                return str(self._map[path])
            if not path:
                raise ConfigError(f'the device map has no device for "{name}"', hint='"" names the whole model')
            path = path.rpartition(".")[0]

    @property
    def has_accelerator(self) -> bool:
        """Whether anything is neither on the CPU nor on disk."""
        return any(str(device) not in ("cpu", DISK) for device in self._map.values())

    @property
    def has_disk(self) -> bool:
        """Whether anything stays on disk."""
        return any(device == DISK for device in self._map.values())
