"""How a model is laid out under the names of another reader: the words of a plan, and no more.

A plan lists every tensor of the result, the rows of source tensors that it is made of, and what
recipes need to know of it. Nothing is read or computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .entry import Entry


@dataclass(frozen=True, slots=True)
class Interleave:
    """A reordering within each of `groups` equal groups of rows: row `part * size + i` of a group
    becomes row `i * parts + part`."""

    groups: int
    parts: int = 2


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of one source tensor: `count` of them from `first` on, or all that follow. A row is
    a run along the last dimension, and of a vector one element."""

    name: str
    first: int = 0
    count: int | None = None
    interleave: Interleave | None = None

    @property
    def is_whole(self) -> bool:
        """Whether this is the source tensor as it is."""
        return self.first == 0 and self.count is None and self.interleave is None

    def to_dict(self) -> dict[str, Any]:
        """As the engine is asked for them."""
        row: dict[str, Any] = {"name": self.name, "first": self.first, "count": self.count}
        if self.interleave is not None:
            row["interleave"] = {"groups": self.interleave.groups, "parts": self.interleave.parts}
        return row


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """One tensor of the result.

    `name` is its name there, `sources` the rows that joined in order are the tensor; one whole
    source is the tensor as it is. `shape` is given where it is not what joining yields (the same
    weights in the same order), `add` is added to every weight. `kind` and `layer` are what recipes
    go by (see `weightpack.recipes`): "attn_v", "ffn_down", "output", "token_embd", "other" and so
    on. `values` are numbers that no source holds; such a tensor is a vector of f32 and has no
    sources. `keep` says why the tensor is never quantized, and is empty where it may be; `plain` is the
    type it is then stored in ("f32"), or empty for the source's.
    """

    name: str
    sources: tuple[Rows, ...]
    shape: tuple[int, ...] | None = None
    add: float | None = None
    values: tuple[float, ...] | None = None
    kind: str = ""
    layer: int | None = None
    keep: str = ""
    plain: str = ""

    @property
    def is_renamed(self) -> bool:
        """Whether nothing but the name changes."""
        return len(self.sources) == 1 and self.sources[0].is_whole and self.shape is None and self.add is None


@dataclass(frozen=True, slots=True)
class Facts:
    """What recipes know of a whole model.

    `layers` is the number of transformer blocks, `gqa` the query heads that share one key and value
    head (0 where there are none), `experts` the experts of a layer, `size` the class of size where
    a recipe knows it ("70B").
    """

    architecture: str = ""
    layers: int = 0
    gqa: int = 1
    experts: int = 0
    size: str = ""


@dataclass(frozen=True)
class ArchitecturePlan:
    """A whole model in the layout of an architecture.

    `metadata` are `(key, type, value)` pairs that the reader needs; they replace those that any
    result has. `recipes` is the family of recipes that fit ("llama.cpp", "image"). `left_out` names
    source tensors that the result does not hold, and why.
    """

    tensors: tuple[MappedTensor, ...]
    metadata: tuple[tuple[str, str, Any], ...] = ()
    facts: Facts = field(default_factory=Facts)
    recipes: str = "llama.cpp"
    left_out: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Architecture(Protocol):
    """A layout that readers of GGUF know by name."""

    @property
    def name(self) -> str:
        """As in `general.architecture`."""

    def plan(self, entries: Sequence[Entry], config: Mapping[str, Any] | None, folder: Path | None) -> ArchitecturePlan:
        """The layout of the model made of `entries`, whose `config.json` and folder are these.

        Raises `UnsupportedError` for a tensor that has no place in it, and for one that is missing.
        """
