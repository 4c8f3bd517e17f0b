"""What accelerate's hooks keep elsewhere: weights of a model whose parameters are on the meta device.

A module that was offloaded has its weights in its hook's `weights_map`, under the names of the state dict:
in memory, as one file each (`NAME.dat`), or in the safetensors files that they were loaded from. Statistics
of packed weights stand there too, while the packed parameter has lost them or holds them on the meta device
(huggingface/accelerate#2372). Files are mapped, so that nothing is read before it is written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from .._lazy import require

_PURPOSE = "save offloaded models"
Content = dict[str, tuple[Any, str]]
"""Name in the model to a map of weights and the key there."""


@contextlib.contextmanager
def brought_back(model: Any) -> Iterator[None]:
    """Within, `model.state_dict()` has the content of offloaded tensors. The model itself stays as it is."""
    modules = dict(model.named_modules())
    owned: dict[str, Content] = {}
    for name, place in _content(modules).items():
        path, _, leaf = name.rpartition(".")
        while path not in modules:
            path, _, middle = path.rpartition(".")
            leaf = f"{middle}.{leaf}"
        owned.setdefault(path, {})[leaf] = place
    changed = []
    try:
        for path, content in owned.items():
            module = modules[path]
            module.__dict__["_save_to_state_dict"] = _saver(module, module._save_to_state_dict, content)
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.__dict__["_save_to_state_dict"]


def tied_again(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` with one tensor for the weights that the model's host ties, where they have been parted: one may
    have gone to the disk, or both. Only equal ones become one."""
    found = dict(state)
    for name, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        one, other = found.get(source), found.get(name)
        if one is None or other is None or one is other or "meta" in (one.device.type, other.device.type):
            continue
        alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        if alike and one.data_ptr() != other.data_ptr() and one.equal(other):
            found[name] = one
    return found


def _content(modules: Mapping[str, Any]) -> Content:
    """All that hooks hold, by name in the model."""
    found: Content = {}
    seen: set[tuple[int, str]] = set()
    for path, module in modules.items():
        here = f"{path}." if path else ""
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            weights = getattr(one, "weights_map", None)
            if weights is None:
                continue
            shared = getattr(weights, "dataset", None)
            if shared is None:
                found.update({f"{here}{key}": (weights, key) for key in weights})
                continue
            # One map for all modules, of which this hook sees the names behind a prefix.
            root = str(weights.prefix).removesuffix(here)
            if (id(shared), root) not in seen:
                seen.add((id(shared), root))
                found.update({key.removeprefix(root): (shared, key) for key in shared if key.startswith(root)})
    return found


def _saver(module: Any, save: Any, content: Content) -> Any:
    """What stands in for the method by which `module` puts its own tensors into a state dict."""

    def with_content(destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        direct = {**module._parameters, **module._buffers}
        if all(leaf in direct for leaf in content):
            save(destination, prefix, keep_vars)
        else:
            # A packed weight: what its statistics are, only the map knows.
            live = {leaf: value for leaf, value in direct.items() if value is not None}
            hidden = module._non_persistent_buffers_set
            names = dict.fromkeys([*content, *(leaf for leaf in live if leaf not in hidden)])
            destination.update({f"{prefix}{leaf}": live.get(leaf) for leaf in names})
        for leaf, (weights, key) in content.items():
            value = destination.get(f"{prefix}{leaf}", module)
            if value is None or (value is not module and value.device.type == "meta"):
                destination[f"{prefix}{leaf}"] = _tensor(weights, key)

    return with_content


def _tensor(weights: Any, key: str) -> Any:
    """The tensor under `key`, mapped where it is a file."""
    described = getattr(weights, "index", {}).get(key)
    if described is None or key in weights.state_dict or described.get("safetensors_file") is not None:
        return weights[key]
    torch = require("torch", _PURPOSE)
    shape = described["shape"]
    file = os.path.join(weights.save_folder, f"{key}.dat")
    dtype = getattr(torch, described["dtype"])
    count = 1
    for size in shape:
        count *= size
    return torch.from_file(file, shared=False, size=count, dtype=dtype).reshape(shape)
