"""The table of packings. Everything that is particular to one backend's checkpoints, besides its bytes, is
in the module that stands here: which formats go together, how hosts read its skip list, and what is
written beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol, cast

from ..decision import Decision, Target

BACKENDS = ("bitsandbytes",)
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

    def host_config(self, packed: Sequence[Decision], skip_list: Sequence[str], compute: str) -> HostConfig:
        """What hosts are told of `packed`, which is not empty. `compute` is the type that layers compute in
        ("bfloat16"), `skip_list` the modules left unpacked."""


def backend_of(format_name: str) -> str | None:
    """The backend of a format that packs linear layers, `None` for all others."""
    backend = format_name.partition(":")[0]
    return backend if ":" in format_name and backend in BACKENDS else None


def packing(backend: str) -> Packing:
    """The module of a backend of `BACKENDS`."""
    return cast(Packing, import_module(f"{__package__}.{backend}"))


def backend_of_method(method: str) -> str | None:
    """The backend whose checkpoints have this `quant_method`, `None` where there is none."""
    return next((backend for backend in BACKENDS if method in packing(backend).METHODS), None)
