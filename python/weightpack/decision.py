"""One decision per tensor, and what any rule may decide: pack, cast, keep.

`weightpack.rules` says which; here is what follows from it for the tensor at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .entry import FLOATS, Entry
from .errors import UnsupportedError
from .mapping import Facts, MappedTensor
from .recipes import LLAMA, Recipe
from .targets import COPY, FormatInfo, find_format

GGML_DIMENSIONS = 4
"""Most dimensions of a tensor for readers that are built on ggml."""

_FOUR_BIT = ("bitsandbytes:nf4", "bitsandbytes:fp4")
_INTX = tuple(f"torchao:intx{bits}" for bits in range(2, 9))
_GROUPED = ("torchao:int8", *_INTX, "torchao:int4", "torchao:float8")
OPTIONS = {"double_quant": _FOUR_BIT, "block_size": _FOUR_BIT, "group_size": _GROUPED}
"""The options of formats, and which formats have them."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one tensor: a full format name or "copy", its parameters, and the reason."""

    entry: Entry
    format: str
    why: str
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def result(self) -> str:
        """The format of the tensor in the output: for a copy, the format it has."""
        if self.format != COPY:
            return self.format
        return self.entry.format or FLOATS.get(self.entry.dtype, self.entry.dtype.lower())

    @property
    def is_packed(self) -> bool:
        """Whether the tensor is packed in the output."""
        return ":" in self.result


@dataclass(frozen=True)
class Decisions:
    """One decision per tensor, in the order of the checkpoint.

    `skip_list` are the module paths that a host must leave unpacked, `warnings` sentences for the
    person.
    """

    tensors: tuple[Decision, ...]
    skip_list: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class GgufChoices:
    """What is asked for where the target is GGUF.

    `family` is the family of recipes that fits the model, `recipe` the one asked for (`None` for a
    plain type), `facts` what it goes by. `fallback` says what becomes of rows that a block does not
    divide. `mapped` are the tensors of an architecture by their names in the result. `importance`
    are the names there that have an importance vector, `None` without one for the model;
    `weighted` says that all weights count the same where there is none. `encodes` says of each
    format when it is written. `from_gguf`: the source is GGUF, and `requantize`: its packed tensors
    may be packed anew. `most_dimensions` is what readers of the result take.
    """

    family: str = LLAMA
    recipe: Recipe | None = None
    facts: Facts = field(default_factory=Facts)
    fallback: str = "auto"
    mapped: Mapping[str, MappedTensor] = field(default_factory=dict)
    importance: frozenset[str] | None = None
    weighted: bool = False
    encodes: Mapping[str, str] = field(default_factory=dict)
    from_gguf: bool = False
    requantize: bool = False
    most_dimensions: int = GGML_DIMENSIONS

    def has_importance(self, name: str) -> bool:
        """Whether the tensor called `name` in the result has an importance vector."""
        return self.weighted or (self.importance is not None and name in self.importance)


@dataclass(frozen=True)
class Target:
    """What is asked for.

    `format` is the row for `--to`, `container` "safetensors" or "gguf". `params` are the options of
    the format (`OPTIONS`). `plain` is the cast used where a packed tensor must
    be stored as plain numbers. `for_host` says that the result is a model folder which a host will
    load; `fits` gives the reason why a format cannot take a shape, or `None`. `gguf` is what only
    concerns GGUF.
    """

    format: FormatInfo
    container: str
    fits: Callable[[str, tuple[int, ...], Mapping[str, Any]], str | None]
    params: Mapping[str, Any] = field(default_factory=dict)
    plain: str = "bf16"
    for_host: bool = True
    gguf: GgufChoices = field(default_factory=GgufChoices)


def pack(entry: Entry, target: Target, name: str, why: str) -> Decision:
    """The tensor packed as `name`, or kept where that cannot be."""
    if not entry.is_float:
        return keep(entry, target, f"stored as {entry.dtype}, which is not decoded")
    if entry.weights == 0:
        return keep(entry, target, "empty")
    params = params_for(entry, name, target)
    is_chosen = any(params.get(option) for option in ("block_size", "double_quant"))
    if entry.format == name and not entry.is_mixed and not is_chosen:
        return Decision(entry, COPY, f"{why}, packed already")
    reason = target.fits(name, entry.shape, params)
    if reason is not None:
        return keep(entry, target, reason)
    return Decision(entry, name, why if entry.is_plain else f"{why}, decoded from {entry.format}", params)


def params_for(entry: Entry, name: str, target: Target) -> Mapping[str, Any]:
    """The options that format `name` takes for a tensor. One without a type of its own (GGUF blocks) is
    packed as if it had that of plain tensors."""
    chosen = {"block_size" if key == "group_size" else key: target.params[key] for key in _options(name, target)}
    if name.startswith("gguf:") or entry.dtype in FLOATS:
        return chosen
    return {**chosen, "dtype": target.plain.upper()}


def _options(name: str, target: Target) -> list[str]:
    """The options that are given and that format `name` has."""
    return [option for option in target.params if name in OPTIONS[option]]


def as_float(entry: Entry, name: str, why: str) -> Decision:
    """The tensor as plain numbers of type `name`."""
    if entry.is_plain and not entry.is_mixed and FLOATS[entry.dtype] == name:
        return Decision(entry, COPY, why if why != "cast" else f"{name} already")
    return Decision(entry, name, why)


def keep(entry: Entry, target: Target, why: str) -> Decision:
    """The tensor in source precision: its bytes, unless the container cannot hold them."""
    if entry.is_plain and not entry.is_mixed:
        return Decision(entry, COPY, why)
    if entry.format is None:
        raise no_decoder(entry)
    backend = entry.format.partition(":")[0]
    if entry.is_mixed:
        if backend == "gguf":
            raise no_copy(entry)
        return Decision(entry, FLOATS[entry.dtype], f"{why}; joined from several types")
    if backend == "gguf" and target.container == "gguf":
        return Decision(entry, COPY, why)
    is_written = backend not in ("", "gguf") and find_format(entry.format).encodes != "never"
    if is_written and target.container == "safetensors" and target.format.backend in ("", backend):
        return Decision(entry, COPY, why)
    plain = target.plain if backend == "gguf" else FLOATS.get(entry.dtype, target.plain)
    return Decision(entry, plain, f"{why}; decoded from {entry.format}")


def no_copy(entry: Entry) -> UnsupportedError:
    """The refusal to leave rows of blocks as they are beside rows of another type."""
    return UnsupportedError(
        f'"{entry.name}" joins rows of several types, of which {entry.format} is one, and only rows of one type are '
        "copied",
        hint="convert the model to one type first",
    )


def no_decoder(entry: Entry) -> UnsupportedError:
    """The refusal of a stored type that nothing decodes."""
    return UnsupportedError(f'{entry.dtype} is not decoded by this version (tensor "{entry.name}")')
