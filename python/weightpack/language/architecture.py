"""A language model laid out for llama.cpp: what `weightpack.architectures` asks of this package."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..entry import Entry
from ..errors import CheckpointError, UnsupportedError
from ..mapping import ArchitecturePlan, Facts, MappedTensor
from .families import FAMILIES, Family, detect_family, find_family
from .hyperparameters import Hyperparameters, Pair, read_hyperparameters
from .names import map_names
from .sampling import sampling_metadata
from .tokenizer import read_tokenizer

NAMES = tuple(family.name for family in FAMILIES)

_LAYERS_OF_70B = 80
"""A model with this many blocks is the size that llama.cpp's recipes treat apart."""


@dataclass(frozen=True)
class LanguageArchitecture:
    """One family of language models in llama.cpp's layout."""

    family: Family

    @property
    def name(self) -> str:
        """As in `general.architecture`."""
        return self.family.architecture

    def plan(self, entries: Sequence[Entry], config: Mapping[str, Any] | None, folder: Path | None) -> ArchitecturePlan:
        """The layout of the model made of `entries`.

        Raises `UnsupportedError` for a model that llama.cpp would run differently or not at all,
        `CheckpointError` for one that contradicts itself.
        """
        if config is None:
            raise CheckpointError(
                f"a {self.family.name} model is described by its config.json, and there is none",
                hint="name the model's folder as the source",
            )
        numbers = read_hyperparameters(config, self.family)
        names = map_names(entries, self.family, numbers.layers, numbers.heads, numbers.key_heads)
        _check_vocabulary(entries, numbers)
        metadata: list[Pair] = [
            ("general.architecture", "str", self.family.architecture),
            ("general.type", "str", "model"),
            *numbers.metadata(self.family),
        ]
        warnings = list(numbers.warnings)
        tokenizer = None
        if folder is not None:
            metadata += sampling_metadata(folder)
            tokenizer = read_tokenizer(folder, config, self.family, numbers.vocabulary)
        if tokenizer is None:
            metadata.append(("tokenizer.ggml.model", "str", "none"))
            if self.family.architecture != "llama":
                metadata.append((f"{self.family.architecture}.vocab_size", "u32", numbers.vocabulary))
            warnings.append(
                "the folder holds no tokenizer: llama.cpp loads the result and cannot turn text into tokens"
            )
        else:
            metadata += tokenizer.metadata
            warnings += tokenizer.warnings
        return ArchitecturePlan(
            (*_generated(numbers), *names.tensors),
            tuple(metadata),
            Facts(
                self.family.architecture,
                layers=numbers.layers,
                gqa=numbers.heads // numbers.key_heads,
                size=_size(self.family, numbers),
            ),
            "llama.cpp",
            names.left_out,
            tuple(warnings),
        )


def find(name: str | None, config: Mapping[str, Any] | None, tensors: Collection[str]) -> LanguageArchitecture | None:
    """The architecture called `name`, or the one that `config` says, or `None`."""
    family = find_family(name) if name is not None else detect_family(config or {})
    return LanguageArchitecture(family) if family is not None else None


def _size(family: Family, numbers: Hyperparameters) -> str:
    if numbers.layers != _LAYERS_OF_70B or family.architecture not in ("llama", "qwen2"):
        return ""
    # A llama of this depth whose heads share nothing is the older 65B.
    return "" if family.architecture == "llama" and numbers.heads == numbers.key_heads else "70B"


def _generated(numbers: Hyperparameters) -> list[MappedTensor]:
    """Tensors that the reader expects and no source holds."""
    factors = numbers.rotation.factors(numbers.head_size)
    if factors is None:
        return []
    return [
        MappedTensor(
            "rope_freqs.weight",
            (),
            values=tuple(factors),
            keep="computed from the rope scaling in config.json",
            plain="f32",
        )
    ]


def _check_vocabulary(entries: Sequence[Entry], numbers: Hyperparameters) -> None:
    for entry in entries:
        if not entry.name.endswith("embed_tokens.weight"):
            continue
        if len(entry.shape) != 2 or entry.shape != (numbers.vocabulary, numbers.embedding):
            raise UnsupportedError(
                f"config.json says {numbers.vocabulary} tokens of {numbers.embedding} values "
                f'(tensor "{entry.name}", shape {list(entry.shape)})'
            )
