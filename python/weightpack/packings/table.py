"""The table of packings. Everything that is particular to one backend's checkpoints, besides its bytes, is
in the module that stands here: which formats go together, how hosts read its skip list, and what is
written beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Protocol, cast

from ..decision import Decision, Target
from ..entry import FLOATS
from ..errors import ConfigError, UnsupportedError

BACKENDS = ("bitsandbytes", "torchao", "quanto", "modelopt", "fp8")
"""Backends whose formats pack linear layers. Each has a module of its name here."""


@dataclass(frozen=True)
class HostConfig:
    """What goes with the packed weights of one model: the section `quantization_config` of its
    `config.json`, further text files by name, and metadata of the safetensors files."""

    section: Mapping[str, Any]
    texts: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


class Packing(Protocol):
    """A module of this package."""

    METHODS: tuple[str, ...]
    """Names that `quant_method` has in the configs of checkpoints packed this way."""

    def one_kind(self, decisions: list[Decision], target: Target) -> list[Decision]:
        """Settles what one config cannot describe together. Raises `ConfigError` for formats asked for
        that do not go together, `UnsupportedError` for a source that holds such."""

    def settle(
        self,
        host: str | None,
        packed: Iterable[str],
        kept: Iterable[str],
        *,
        fixed: Sequence[str] = (),
        prefix: str = "",
    ) -> tuple[list[str], dict[str, str]]:
        """The skip list, and the packed layers that must be left unpacked because of how `host` reads it; see
        `weightpack.skip_list.settle`."""

    def host_config(
        self, decisions: Sequence[Decision], skip_list: Sequence[str], compute: str, host: str | None
    ) -> HostConfig:
        """What `host` is told of a model; at least one tensor of `decisions`, which are all of them, is packed.
        `compute` is the type that layers compute in ("bfloat16"), `skip_list` the modules left unpacked,
        `host` is as in `settle`."""

    def leftovers(self, names: Iterable[str]) -> list[str]:
        """Those of the tensors of a checkpoint that can only be arrays of a packed weight which was not
        recognised as one."""

    def describes(self, key: str, value: str) -> bool:
        """Whether a pair of a safetensors file's metadata speaks of weights packed this way."""


def backend_of(format_name: str) -> str | None:
    """The backend of a format that packs linear layers, `None` for all others."""
    backend = format_name.partition(":")[0]
    return backend if ":" in format_name and backend in BACKENDS else None


def packing(backend: str) -> Packing:
    """The module of a backend of `BACKENDS`."""
    return cast(Packing, import_module(f"{__package__}.{backend}"))


def packed_of(decisions: Iterable[Decision]) -> list[Decision]:
    """Those that are packed linear layers in the result."""
    return [decision for decision in decisions if backend_of(decision.result) is not None]


def one_format(decisions: list[Decision], target: Target, backend: str) -> list[Decision]:
    """`Packing.one_kind` for a backend of which one config describes one format. What was packed before in
    another one than is asked for is decoded."""
    asked = sorted({d.result for d in decisions if backend_of(d.format) == backend})
    held = asked or sorted({d.result for d in decisions if backend_of(d.result) == backend})
    if len(asked) > 1:
        raise ConfigError(f"a {backend} checkpoint holds weights of one format, and {' and '.join(asked)} are assigned")
    if len(held) > 1:
        raise UnsupportedError(f"the checkpoint holds {' and '.join(held)} weights at once, which no host loads")
    return decoded(decisions, target, lambda d: backend_of(d.result) == backend and d.result not in held)


def decoded(decisions: list[Decision], target: Target, chosen: Callable[[Decision], bool]) -> list[Decision]:
    """`decisions`, of which those that are `chosen` become plain numbers."""
    return [
        replace(d, format=FLOATS.get(d.entry.dtype, target.plain), params={}, why=f"{d.why}; decoded")
        if chosen(d)
        else d
        for d in decisions
    ]


def unrecognised(names: Iterable[str]) -> dict[str, list[str]]:
    """By backend, the tensors of a checkpoint that are parts of packed weights which are not decoded."""
    names = list(names)
    found = {backend: packing(backend).leftovers(names) for backend in BACKENDS}
    return {backend: left for backend, left in found.items() if left}


def backend_of_method(method: str) -> str | None:
    """The backend whose checkpoints have this `quant_method`, `None` where there is none."""
    return next((backend for backend in BACKENDS if method in packing(backend).METHODS), None)
