"""What a config of torchao asks of the machine, of the element type and of a weight's shape.

torchao says so while it packs, deep inside, by failed assertions. Here each config is tried on a small
weight before anything is read, and only what really fails is refused, with the reason by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from .._lazy import is_installed, require
from ..errors import BackendError, ConfigError, FormatError
from .torchao_engine import is_packed_without_kernels
from .torchao_weights import packed_size, trial

_PURPOSE = "pack weights for torchao"
_ROWS = 256
_COLUMNS = 1024


def accelerator() -> Any:
    """The device other than the CPU that torchao has kernels for, or `None`."""
    torch = require("torch", _PURPOSE)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return torch.device("xpu")
    return None


def place(config: Any, device: Any) -> Any:
    """The device to pack on for a weight that is to live on `device`. Raises `BackendError`.

    An accelerator is not touched for a weight on the CPU that the CPU packs.
    """
    torch = require("torch", _PURPOSE)
    failed = trial(config, _shape(config), torch.bfloat16, device)
    if not isinstance(failed, Exception):
        return device
    other = torch.device("cpu") if device.type != "cpu" else accelerator()
    if other is not None and not isinstance(trial(config, _shape(config), torch.bfloat16, other), Exception):
        return other
    if is_packed_without_kernels(config):
        return torch.device("cpu")
    raise _lacking(config, failed)


def check_machine(config: Any, device_map: Any) -> None:
    """Raises `BackendError` if nothing in this machine packs by `config` for the devices of `device_map`. Warns
    where weights can be packed, and torchao lacks what it multiplies with them by."""
    devices = device_map.values() if isinstance(device_map, Mapping) else (device_map,)
    elsewhere = any(device is not None and str(device) not in ("cpu", "disk") for device in devices)
    cpu = require("torch", _PURPOSE).device("cpu")
    found = place(config, (accelerator() if elsewhere else None) or cpu)
    if is_packed_without_kernels(config):
        lacking = trial(config, _shape(config), require("torch", _PURPOSE).bfloat16, found)
        if isinstance(lacking, Exception):
            needed = _lacking(config, lacking).message
            warnings.warn(f"{needed}, to run; without it weights are packed, saved and decoded", stacklevel=3)


def check_dtype(config: Any, dtype: Any) -> None:
    """Raises `ConfigError` if `config` packs bfloat16 weights and none of `dtype`."""
    bfloat16 = require("torch", _PURPOSE).bfloat16
    made = trial(config, _shape(config), dtype, "meta")
    if isinstance(made, Exception) and not isinstance(trial(config, _shape(config), bfloat16, "meta"), Exception):
        raise ConfigError(
            f"{type(config).__name__} does not pack weights of {str(dtype).removeprefix('torch.')}",
            hint="load with torch_dtype=torch.bfloat16",
        )


def size(config: Any, shape: tuple[int, ...], dtype: Any, *, embedding: bool = False) -> int | str | None:
    """Bytes that a weight of `shape` takes once it is packed, or the reason why it cannot be packed.

    `None` where torchao can only be asked with real weights on the device that it packs on.
    """
    made = trial(config, shape, dtype, "meta", embedding=embedding)
    if not isinstance(made, Exception):
        return packed_size(made)
    if isinstance(made, FormatError):
        return made.message
    if embedding or not isinstance(trial(config, _shape(config), dtype, "meta"), Exception):
        return str(made).splitlines()[0] if str(made) else type(made).__name__
    return _int4_size(config, shape)


def _int4_size(config: Any, shape: tuple[int, ...]) -> int | None:
    """The kinds of int4 do not run on the meta device: codes of half a byte, two bf16 numbers a group."""
    if type(config).__name__ != "Int4WeightOnlyConfig" or len(shape) != 2:
        return None
    rows, columns = shape
    if _packing(config) == "tile_packed_to_4d":
        rows, columns = _up(rows, config.int4_tile_packed_ntile), _up(columns, 1024)
    groups = rows * columns // int(config.group_size)
    return rows * columns // 2 + groups * (3 if _packing(config) == "plain_int32" else 4)


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _shape(config: Any) -> tuple[int, int]:
    """A shape that suits every kind: rows in groups of any size, both sides multiples of 128."""
    granularity = getattr(config, "granularity", None) or getattr(config, "weight_granularity", None)
    group = getattr(config, "group_size", None) or getattr(granularity, "group_size", None) or 1
    return _ROWS, _COLUMNS if _COLUMNS % group == 0 else int(group) * 16


def _packing(config: Any) -> str:
    packing = getattr(config, "int4_packing_format", "")
    return str(getattr(packing, "value", packing))


def _lacking(config: Any, error: Exception) -> BackendError:
    """The error for a config that nothing here packs by."""
    kind = type(config).__name__
    hint: str | None = None
    packing = _packing(config)
    if packing in ("plain", "preshuffled") and not is_installed("mslk"):
        needed = "the package mslk 1.0.0 or later, which is not installed"
        hint = "pip install mslk"
        if kind == "Int4WeightOnlyConfig":
            hint = "int4_packing_format='tile_packed_to_4d' needs only a CUDA device of capability 8.0 or later"
    elif packing == "tile_packed_to_4d":
        needed = f"a CUDA device of capability 8.0 or later; {_present()}"
        hint = "IntxWeightOnlyConfig(weight_dtype=torch.int4) runs everywhere, at 8 bits a weight"
    elif packing == "plain_int32":
        needed = f"an XPU or NPU; {_present()}"
    elif kind == "Float8DynamicActivationFloat8WeightConfig":
        needed = f"a CUDA device of capability 8.9 or later, an MI300 or an XPU; {_present()}"
        hint = "Float8WeightOnlyConfig runs everywhere"
    elif kind == "NVFP4DynamicActivationNVFP4WeightConfig":
        needed = f"a CUDA device of capability 10.0 or later; {_present()}"
        hint = "NVFP4WeightOnlyConfig runs everywhere"
    else:
        needed = f"what is not there: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return BackendError(f"{kind} needs {needed}", hint=hint)


def _present() -> str:
    torch = require("torch", _PURPOSE)
    if not torch.cuda.is_available():
        return "this machine has no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return f"this machine has {torch.cuda.get_device_name()} of capability {major}.{minor}"
