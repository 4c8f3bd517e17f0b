"""Models on several devices, or partly on disk: accelerate's hooks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from .._lazy import require
from ..errors import ConfigError
from .devices import spread

_PURPOSE = "spread a model over devices"


class Disk:
    """Weights that stay on disk, in `folder`: accelerate reads them there when their module runs."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = str(folder) if folder is not None else None
        self.index: dict[str, Any] = {}

    def add(self, name: str, tensor: Any) -> None:
        """Writes one tensor. Raises `ConfigError` where there is no folder to write to."""
        if self.folder is None:
            raise ConfigError("some modules stay on disk", hint="offload_folder= names a folder for them")
        offload_weight = require("accelerate.utils", _PURPOSE).offload_weight
        os.makedirs(self.folder, exist_ok=True)
        self.index = offload_weight(tensor, name, self.folder, index=self.index)

    def read(self, name: str) -> Any:
        """A tensor that was added."""
        load = require("accelerate.utils", _PURPOSE).load_offloaded_weight
        return load(os.path.join(str(self.folder), f"{name}.dat"), self.index[name])


def dispatch(model: Any, device_map: Mapping[str, Any], disk: Disk | None) -> None:
    """Hooks that move inputs, and weights that stay elsewhere; none where there is one device.

    `hf_device_map` of the model is set to the device of each module.
    """
    if len(set(device_map.values())) == 1 and disk is None:
        model.hf_device_map = dict(device_map)
        return
    accelerate = require("accelerate", _PURPOSE)
    options: dict[str, Any] = {"skip_keys": getattr(model, "_skip_keys_device_placement", None)}
    if disk is not None:
        require("accelerate.utils", _PURPOSE).save_offload_index(disk.index, disk.folder)
        options |= {"offload_dir": disk.folder, "offload_index": disk.index, "force_hooks": True}
    with warnings.catch_warnings():
        # Tensors of the model itself have entries of their own, which accelerate makes and then warns of.
        warnings.filterwarnings("ignore", "The following device_map keys do not match", UserWarning)
        accelerate.dispatch_model(model, device_map=spread(model, device_map), **options)
