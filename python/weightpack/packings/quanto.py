"""optimum-quanto: one format for all packed weights.

diffusers 0.42.1 puts quanto's layers in the place of all linear ones and only then looks at the file, so
its list must hold every linear layer that is not packed. It compares entries with the last segment of a
path and nothing else: `proj_out` also means every other layer of that name, a full path none at all.
transformers 5.23 does not load what quanto packed; quanto itself does, by `quanto_qmap.json`, which names
the packed layers (`QuantizedModelForCausalLM.from_pretrained`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from ..decision import Decision, Target
from .table import HostConfig, one_format, packed_of

__all__ = ["FORMATS", "METHODS", "describes", "host_config", "leftovers", "one_kind", "settle"]

METHODS = ("quanto",)
FORMATS = ("quanto:",)
MAP_FILE = "quanto_qmap.json"

_TYPES = {"quanto:int8": "qint8", "quanto:float8": "qfloat8", "quanto:int4": "qint4", "quanto:int2": "qint2"}
"""quanto's own names of the types."""
_WITHOUT_SHAPES = ("quanto:int4", "quanto:int2")
SHAPES = "weightpack.shapes"
"""Metadata key."""
_ARRAYS = ("._data", "._scale", "._shift")


def one_kind(decisions: list[Decision], target: Target) -> list[Decision]:
    """One config describes one format."""
    return one_format(decisions, target, "quanto")


def settle(
    host: str | None,
    packed: Iterable[str],
    kept: Iterable[str],
    *,
    fixed: Sequence[str] = (),
    prefix: str = "",
) -> tuple[list[str], dict[str, str]]:
    """Last segments of the layers left unpacked, and the packed layers that have the same. Full paths for
    transformers, which reads none."""
    if host == "transformers":
        return sorted(kept), {}
    names = {_leaf(path) for path in kept}
    caught = {path: _leaf(path) for path in sorted(packed) if _leaf(path) in names.union(fixed)}
    return sorted(names | set(caught.values())), caught


def host_config(decisions: Sequence[Decision], skip_list: Sequence[str], compute: str, host: str | None) -> HostConfig:
    """The section with the keys of the host, and quanto's map of layers where that is not diffusers."""
    packed = packed_of(decisions)
    name = packed[0].result
    section: dict[str, Any] = {
        "modules_to_not_convert": list(skip_list) or None,
        "quant_method": "quanto",
        "weights_dtype": name.partition(":")[2],
    }
    metadata = _shapes(packed)
    if host == "diffusers":
        return HostConfig(section, metadata=metadata)
    section |= {"activations": None, "weights": section["weights_dtype"]}
    if host == "transformers":
        del section["weights_dtype"]
    layers = {d.entry.name.rpartition(".")[0]: {"weights": _TYPES[name], "activations": "none"} for d in packed}
    return HostConfig(dict(sorted(section.items())), texts={MAP_FILE: json.dumps(layers, indent=4)}, metadata=metadata)


def leftovers(names: Iterable[str]) -> list[str]:
    """Codes, scales and shifts."""
    return [name for name in names if name.endswith(_ARRAYS)]


def describes(key: str, value: str) -> bool:
    """Nothing is told by metadata."""
    return False


def _shapes(packed: Sequence[Decision]) -> dict[str, str]:
    """The shapes of 4-bit and 2-bit weights, which those of their arrays do not tell; models know them, and
    `weightpack` reads them here."""
    shapes = {d.entry.name: d.entry.shape for d in packed if d.result in _WITHOUT_SHAPES}
    return {SHAPES: json.dumps(shapes)} if shapes else {}


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
