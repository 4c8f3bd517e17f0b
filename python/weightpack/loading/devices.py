"""Where each module goes: device maps, sized by what packed weights really take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .._lazy import require
from ..errors import ConfigError
from ..placement import DISK, Placement

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
_PURPOSE = "spread a model over devices"


def normalise(device_map: Any) -> Any:
    """`None`, one of `AUTOMATIC`, or a dictionary from module path to device (`"cuda:0"`, `"cpu"`,
    `"disk"`); a single device becomes `{"": device}`. Raises `ConfigError` for anything else."""
    if device_map is None or device_map in AUTOMATIC:
        return device_map
    if isinstance(device_map, Mapping):
        return {str(path): _device(device) for path, device in device_map.items()}
    return {"": _device(device_map)}


def _device(device: Any) -> Any:
    torch = require("torch", _PURPOSE)
    if device == DISK:
        return DISK
    if isinstance(device, bool) or (isinstance(device, int) and device < 0):
        raise ConfigError(f"device {device!r} is no device")
    if isinstance(device, int):
        # A number is an accelerator, whichever there is.
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return f"{kind.type if kind else 'cuda'}:{device}"
    try:
        return str(torch.device(device))
    except (RuntimeError, TypeError) as error:
        expected = ", ".join((*AUTOMATIC, "a device, or a dictionary of them"))
        raise ConfigError(f"device_map {device!r} is none of {expected}") from error


def infer(
    model: Any,
    device_map: str,
    max_memory: Mapping[Any, Any] | None,
    *,
    no_split: Sequence[str],
    nbytes: Callable[[str, Any], int],
    adjust: Callable[[dict[Any, Any]], dict[Any, Any]],
) -> dict[str, Any]:
    """The device of each module for one of `AUTOMATIC`, by accelerate's own rules.

    They are applied to a shadow of the model: the same tree of modules, each tensor as many bytes as
    `nbytes(name, tensor)` says it takes.
    """
    accelerate = require("accelerate.utils", _PURPOSE)
    shadow = _shadow(model, nbytes)
    budget = dict(max_memory) if max_memory is not None else None
    if device_map != "sequential":
        budget = accelerate.get_balanced_memory(
            shadow,
            max_memory=budget,
            no_split_module_classes=list(no_split),
            low_zero=device_map == "balanced_low_0",
        )
    else:
        budget = accelerate.get_max_memory(budget)
    found = accelerate.infer_auto_device_map(
        shadow, max_memory=adjust(dict(budget)), no_split_module_classes=list(no_split)
    )
    return {path: DISK if device == DISK else _device(device) for path, device in found.items()}


def _shadow(model: Any, nbytes: Callable[[str, Any], int]) -> Any:
    """A tree of empty modules of the same class names; shared tensors stay shared."""
    torch = require("torch", _PURPOSE)
    modules: dict[int, Any] = {}
    tensors: dict[int, Any] = {}

    def copy(module: Any, prefix: str) -> Any:
        if id(module) in modules:
            return modules[id(module)]
        made = type(type(module).__name__, (torch.nn.Module,), {})()
        modules[id(module)] = made
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            if id(tensor) not in tensors:
                size = nbytes(prefix + name, tensor)
                empty = torch.empty(size, dtype=torch.uint8, device="meta")
                tensors[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False)
            made._parameters[name] = tensors[id(tensor)]
        for name, child in module._modules.items():
            made._modules[name] = None if child is None else copy(child, f"{prefix}{name}.")
        return made

    return copy(model, "")


def spread(model: Any, device_map: Mapping[str, Any]) -> dict[str, Any]:
    """The same map without entries inside other entries, as accelerate wants it: `{"": "cpu", "head":
    "disk"}` becomes one entry for the head and one for each of its neighbours."""
    placement = Placement(device_map)
    if not any(other.startswith(path and f"{path}.") for path in device_map for other in device_map if other != path):
        return dict(device_map)
    found: dict[str, Any] = {}

    def walk(module: Any, path: str) -> None:
        prefix = path and f"{path}."
        if path and not any(other.startswith(prefix) for other in device_map):
            found[path] = placement.of(path)
            return
        for name in [*module._parameters, *module._buffers]:
            if getattr(module, name) is not None:
                found[prefix + name] = placement.of(prefix + name)
        for name, child in module._modules.items():
            if child is not None:
                walk(child, prefix + name)

    walk(model, "")
    return found
