"""The table of packings. Everything that is particular to one backend's checkpoints, besides its bytes, is
in the module that stands here: which configs and arrays are its own, and, where it can be a target, which
formats go together, how hosts read its skip list, and what is written beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Protocol, cast

from ..decision import Decision, Target
from ..entry import FLOATS
from ..errors import ConfigError, UnsupportedError


@dataclass(frozen=True)
class Row:
    """One packing: its name, which is also that of its module here (with `_` for `-`), and whether it is
    written. One that is no target is decoded only; its module is a `Source`.

    `is_for_engines`: inference engines read it, and not the host's model. Its skip list names every module
    with a matrix that is not packed (embeddings, convolutions, routers), as the file calls it, where others
    name linear layers alone, as the host's model calls them; its module is an `EnginePacking`.
    """

    name: str
    is_target: bool = True
    is_for_engines: bool = False


TABLE = (
    Row("bitsandbytes"),
    Row("torchao"),
    Row("quanto"),
    Row("modelopt", is_for_engines=True),
    Row("fp8"),
    Row("gptq", is_target=False),
    Row("awq", is_target=False),
    Row("compressed-tensors", is_target=False),
    Row("mxfp4", is_target=False),
    Row("hqq", is_target=False),
)
TARGETS = frozenset(row.name for row in TABLE if row.is_target)
"""Backends whose formats pack linear layers of a result."""


@dataclass(frozen=True)
class HostConfig:
    """What goes with the packed weights of one model: the section `quantization_config` of its
    `config.json`, further text files by name, and metadata of the safetensors files."""

    section: Mapping[str, Any]
    texts: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


class Source(Protocol):
    """A module of this package, as far as it is about sources."""

    METHODS: tuple[str, ...]
    """Names that `quant_method` has in the configs of checkpoints packed this way."""
    FORMATS: tuple[str, ...]
    """How the names of the formats begin that weights of such checkpoints have."""

    def leftovers(self, names: Iterable[str]) -> list[str]:
        """Those of the tensors of a checkpoint that can only be arrays of a packed weight which was not
        recognised as one."""

    def describes(self, key: str, value: str) -> bool:
        """Whether a pair of a safetensors file's metadata speaks of weights packed this way."""


class Packing(Source, Protocol):
    """The module of a target."""

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


class EnginePacking(Packing, Protocol):
    """The module of a target that inference engines read."""

    def leaves(self, path: str) -> bool:
        """Whether the layer at `path` stays as it is unless it is asked for by name."""

    def shared_scales(self, names: Iterable[str], format_name: str, host: str | None) -> dict[str, str]:
        """Which of the weights called `names`, all that are encoded as `format_name`, get one scale together:
        by name, a word that is the same for those that do. `host` is as in `settle`."""


def backend_of(format_name: str) -> str | None:
    """The target that a format packs linear layers for, `None` for all others."""
    backend = format_name.partition(":")[0]
    return backend if ":" in format_name and backend in TARGETS else None


def packing(backend: str) -> Packing:
    """The module of a backend of `TARGETS`."""
    return cast(Packing, _module(backend))


def holds(backend: str, format_name: str | None) -> bool:
    """Whether a weight of this format may stand in a checkpoint that is packed by a backend of `TABLE`."""
    return format_name is not None and format_name.startswith(_module(backend).FORMATS)


def sources_of(format_name: str | None) -> list[str]:
    """The backends whose checkpoints have weights of this format."""
    return [row.name for row in TABLE if holds(row.name, format_name)]


def is_described(backend: str, metadata: Mapping[str, Any]) -> bool:
    """Whether a file's metadata speaks of weights packed by a backend of `TABLE`."""
    return any(_module(backend).describes(key, str(value)) for key, value in metadata.items())


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


def engine_packing(backend: str | None) -> EnginePacking | None:
    """The module of a backend that inference engines read, `None` for all others."""
    is_one = any(row.is_for_engines for row in TABLE if row.name == backend)
    return cast(EnginePacking, _module(str(backend))) if is_one else None


def shared_scales(decisions: Iterable[Decision], host: str | None) -> dict[str, str]:
    """Weights that get one scale together, by name a word that is the same for those that do."""
    encoded: dict[str, list[str]] = {}
    for decision in decisions:
        encoded.setdefault(decision.format, []).append(decision.entry.name)
    shared: dict[str, str] = {}
    for name, weights in encoded.items():
        how = engine_packing(backend_of(name))
        if how is not None:
            shared |= how.shared_scales(weights, name, host)
    return shared


def unrecognised(names: Iterable[str]) -> dict[str, list[str]]:
    """By backend, the tensors of a checkpoint that are parts of packed weights which are not decoded."""
    names = list(names)
    found = {row.name: _module(row.name).leftovers(names) for row in TABLE}
    return {backend: left for backend, left in found.items() if left}


def backend_of_method(method: str) -> str | None:
    """The backend whose checkpoints have this `quant_method`, `None` where there is none."""
    return next((row.name for row in TABLE if method in _module(row.name).METHODS), None)


def _module(backend: str) -> Source:
    return cast(Source, import_module(f"{__package__}.{backend.replace('-', '_')}"))
