"""What a checkpoint lacks: first values for it, and what a person is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from .._lazy import require
from ..errors import CheckpointError
from ..placement import DISK, Placement
from ..quantizers.modules import find_tensor, owner, set_parameter
from .host import Host
from .keys import LoadingInfo
from .skeleton import state_of


def initialise(model: Any, names: Sequence[str]) -> None:
    """Gives the parameters and buffers `names`, which are real and of unknown content, their first values.

    A layer all of whose own parameters are among them is reset by its own `reset_parameters`.
    Elsewhere one-dimensional weights become ones and everything else zeros.
    """
    torch = require("torch", "load models")
    by_module: dict[str, list[str]] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        by_module.setdefault(path, []).append(leaf)
    for path, leaves in by_module.items():
        module, _ = owner(model, f"{path}.{leaves[0]}" if path else leaves[0])
        own = {name for name, value in module._parameters.items() if value is not None}
        if own and own <= set(leaves) and callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
            leaves = [leaf for leaf in leaves if leaf not in own]
        with torch.no_grad():
            for leaf in leaves:
                value = getattr(module, leaf)
                value.fill_(1) if leaf == "weight" and value.ndim == 1 else value.zero_()


def fill(
    host: Host,
    model: Any,
    info: LoadingInfo,
    state: Mapping[str, Any],
    quantizer: Any,
    placement: Placement,
    *,
    dtype_of: Callable[[str], Any],
    torch_dtype: Any,
    set_tensor: Callable[[str, Any, str], None],
    on_disk: Collection[str] = (),
) -> None:
    """Gives everything that the checkpoint lacks first values; what is tied by now stays one tensor.

    Afterwards `info.missing` names what a person should know of. `state` are the skeleton's tensors,
    `on_disk` those that are on disk.
    """
    torch = require("torch", "load models")
    lacking = [name for name in info.missing if state[name].device.type == "meta" and name not in on_disk]
    told = list(info.missing) if quantizer is None else quantizer.update_missing_keys(model, list(info.missing))
    info.missing = host.may_miss(model, told)
    plain = []
    # The tensors themselves are held, so that none of their identities is used again.
    firsts: dict[int, tuple[str, Any]] = {}
    others: list[tuple[str, str]] = []
    for name in lacking:
        current = find_tensor(model, name)
        if current is not None and current.device.type != "meta":
            continue
        first, _ = firsts.setdefault(id(current), (name, current))
        if current is not None and first != name:
            others.append((name, first))
            continue
        old = state[name]
        wanted = (dtype_of(name) if old.is_floating_point() else None) or old.dtype
        fresh = torch.empty(old.shape, dtype=wanted)
        if quantizer is not None and quantizer.check_if_quantized_param(model, name):
            torch.nn.init.kaiming_uniform_(fresh, a=5**0.5)
            quantizer.create_quantized_param(model, name, fresh, device=placement.of(name), dtype=torch_dtype)
        else:
            device = placement.of(name)
            set_tensor(name, fresh, "cpu" if device == DISK else device)
            plain.append(name)
    if plain:
        host.initialise(model, plain)
    for name, first in others:
        set_parameter(model, name, find_tensor(model, first))


def refuse_meta(model: Any, placement: Placement) -> None:
    """The last check: nothing may be left without memory, unless it stays on disk."""
    for name, tensor in state_of(model).items():
        if tensor.device.type == "meta" and placement.of(name) != DISK:
            raise CheckpointError(f'"{name}" was not loaded: the checkpoint has no tensor for it')


def tell(info: LoadingInfo, model: Any) -> None:
    """One warning for each kind of thing that did not fit."""
    name = type(model).__name__
    changed = [name for name, *_ in info.mismatched]
    missing = [name for name in info.missing if name not in changed]
    for what, names, then in (
        ("the checkpoint lacks", missing, "they were given first values, and want training"),
        ("the checkpoint has, in another shape,", changed, "they were given first values, and want training"),
        (f"{name} has no place for", info.unexpected, "they were not loaded"),
    ):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            warnings.warn(f"{what} {shown}; {then}", stacklevel=3)
