"""Building a model without memory for its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .._lazy import require

_PURPOSE = "load models"


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter that a module registers is moved to the meta device at once; buffers stay
    real, so that what a constructor computes is there. A parameter that modules share stays shared.
    """
    torch = require("torch", _PURPOSE)
    register = torch.nn.Module.register_parameter

    def register_on_meta(module: Any, name: str, param: Any) -> None:
        register(module, name, param)
        own = module._parameters.get(name)
        if own is not None and own.device.type != "meta":
            made = type(own)(own.detach().to("meta"), requires_grad=own.requires_grad)
            made.__dict__.update(own.__dict__)
            module._parameters[name] = made

    torch.nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


@contextlib.contextmanager
def default_dtype(dtype: Any) -> Iterator[None]:
    """Inside, tensors of no stated type are made in `dtype`, a floating `torch.dtype`."""
    torch = require("torch", _PURPOSE)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(make: Callable[[], Any]) -> Any:
    """The model that `make` gives, its parameters on the meta device, all in `eval` mode."""
    with parameters_on_meta():
        model = make()
    return model.eval()


def state_of(model: Any) -> dict[str, Any]:
    """Parameters and persistent buffers by name, each shared one under all its names."""
    state: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, value in module._parameters.items():
            if value is not None:
                state[prefix + name] = value
        for name, value in module._buffers.items():
            if value is not None and name not in module._non_persistent_buffers_set:
                state[prefix + name] = value
    return state


def shared_names(state: dict[str, Any]) -> dict[str, list[str]]:
    """For each name of a tensor that has several, the others."""
    by_identity: dict[int, list[str]] = {}
    for name, value in state.items():
        by_identity.setdefault(id(value), []).append(name)
    return {
        name: [other for other in names if other != name]
        for names in by_identity.values()
        if len(names) > 1
        for name in names
    }
