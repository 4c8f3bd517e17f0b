"""First values for parameters that a checkpoint lacks, in models that no host initialises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._lazy import require
from ..quantizers.modules import owner


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
