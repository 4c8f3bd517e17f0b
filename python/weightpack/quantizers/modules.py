"""The walker that swaps layers: the only one, for every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def replace_layers(model: Any, choose: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Puts `choose(path, module)` in the place of every module for which it gives one.

    Paths are dotted, the model itself is not offered. A module that is registered in several places is
    offered once and replaced in all of them; what lies below a replaced module is not offered. Gives
    the new modules by path. The new one takes over `training`.
    """
    chosen: dict[int, Any] = {}
    kept: list[Any] = []
    replaced: dict[str, Any] = {}

    def walk(parent: Any, prefix: str, seen: set[int]) -> None:
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            path = f"{prefix}{name}"
            if id(child) not in chosen:
                # A module that is let go of must not lend its identity to a new one.
                kept.append(child)
                chosen[id(child)] = choose(path, child)
                if chosen[id(child)] is not None:
                    replaced[path] = chosen[id(child)]
            new = chosen[id(child)]
            if new is None:
                if id(child) not in seen:
                    seen.add(id(child))
                    walk(child, f"{path}.", seen)
            elif new is not child:
                new.train(child.training)
                parent._modules[name] = new

    walk(model, "", set())
    return replaced


def owner(model: Any, name: str) -> tuple[Any, str]:
    """The module that holds parameter or buffer `name`, and its name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def set_parameter(model: Any, name: str, parameter: Any) -> None:
    """Puts a parameter in its place, and a plain tensor in the place of a buffer."""
    module, leaf = owner(model, name)
    if leaf in module._buffers:
        module._buffers[leaf] = parameter
    else:
        module._parameters[leaf] = parameter


def find_tensor(model: Any, name: str) -> Any:
    """The parameter or buffer at `name`, or `None`."""
    module, leaf = owner(model, name)
    return getattr(module, leaf, None)
