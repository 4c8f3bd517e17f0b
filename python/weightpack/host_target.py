"""A GGUF file on its way back to a host: its tensors under the names that transformers has for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .assembly import joined
from .checkpoint import Checkpoint
from .entry import Entry
from .errors import ConfigError
from .language.host_names import host_names
from .mapping import MappedTensor

NAMES = ("source", "host")


@dataclass(frozen=True)
class HostModel:
    """The tensors of a result as they are there (`entries`), and what each is made of by its name."""

    entries: Sequence[Entry]
    mapped: Mapping[str, MappedTensor] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def prepare(checkpoint: Checkpoint, entries: Sequence[Entry], names: str) -> HostModel:
    """The tensors under the names of the source, or, for `names` "host", of the host.

    Raises `ConfigError` where the source is no GGUF file, `UnsupportedError` where the names are not
    known.
    """
    if names == "source":
        return HostModel(entries)
    if checkpoint.container != "gguf":
        raise ConfigError("names of a host are given to tensors of a GGUF file, and the source is none")
    found = host_names(entries, checkpoint.metadata)
    by_name = {entry.name: entry for entry in entries}
    warnings = [f"not in the result: {name} ({why})" for name, why in found.left_out.items()]
    warnings.append(
        "config.json and the tokenizer's files are not made: copy those of the original model beside the result"
    )
    return HostModel(
        [joined(tensor, by_name) for tensor in found.tensors],
        {tensor.name: tensor for tensor in found.tensors},
        tuple(warnings),
    )
