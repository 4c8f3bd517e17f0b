"""What a reader needs of `config.json`: sizes, heads, norms, rotation, windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .families import Family
from .rotation import DEFAULT_BASE, Rotation, read_rotation

Pair = tuple[str, str, Any]
"""Key, type and value of one piece of metadata."""

LARGEST = 2**31 - 1
"""Largest count that every reader takes."""

_WINDOW_PATTERN = {"gemma2": 2, "gemma3": 6}
"""Every how many blocks the reader expects one that attends to the whole context."""

WHOLE_BY_SIZE = {("gemma2", 46), ("gemma3", 62)}
"""Models whose attention is scaled by the size of a head as it would be without `head_dim`: the reader
tells them by their number of blocks."""


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of one model. `writes_head_size` says whether the reader is told the size of a head
    or works it out; `sliding_window` is `None` where it is not told of one."""

    context: int
    embedding: int
    layers: int
    feed_forward: int
    heads: int
    key_heads: int
    head_size: int
    writes_head_size: bool
    epsilon: float
    vocabulary: int
    rotation: Rotation
    sliding_window: int | None
    softcaps: Mapping[str, float]
    is_bidirectional: bool
    warnings: tuple[str, ...]

    def metadata(self, family: Family) -> list[Pair]:
        """All pairs of `family` that describe the model, its vocabulary aside."""
        pairs: list[Pair] = [
            ("block_count", "u32", self.layers),
            ("context_length", "u32", self.context),
            ("embedding_length", "u32", self.embedding),
            ("feed_forward_length", "u32", self.feed_forward),
            ("attention.head_count", "u32", self.heads),
            ("attention.head_count_kv", "u32", self.key_heads),
        ]
        # What a reader takes for granted is left out for models whose files never say it.
        says_base = family.name not in ("gemma", "gemma2") or self.rotation.base != DEFAULT_BASE
        if says_base:
            pairs += self.rotation.metadata()
            pairs.append(("rope.freq_base", "f32", self.rotation.base))
        if self.rotation.sliding_base is not None and self.sliding_window is not None:
            pairs.append(("rope.freq_base_swa", "f32", self.rotation.sliding_base))
        pairs.append(("attention.layer_norm_rms_epsilon", "f32", self.epsilon))
        if self.writes_head_size:
            pairs.append(("attention.key_length", "u32", self.head_size))
            pairs.append(("attention.value_length", "u32", self.head_size))
        pairs += [(name, "f32", value) for name, value in self.softcaps.items()]
        if self.sliding_window is not None:
            pairs.append(("attention.sliding_window", "u32", self.sliding_window))
        if self.is_bidirectional:
            pairs.append(("attention.causal", "bool", False))
        if family.architecture == "llama":
            pairs.append(("vocab_size", "u32", self.vocabulary))
            pairs.append(("rope.dimension_count", "u32", self.head_size))
        return [(f"{family.architecture}.{key}", kind, value) for key, kind, value in pairs]


def read_hyperparameters(config: Mapping[str, Any], family: Family) -> Hyperparameters:
    """The numbers in `config`, with the defaults of the model class where it has such.

    Raises `CheckpointError` for one that is missing or no number, `UnsupportedError` for a model
    that the reader would run differently.
    """
    embedding, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    layers = _count(config, "num_hidden_layers")
    key_heads = _count(config, "num_key_value_heads", heads)
    if heads % key_heads:
        raise CheckpointError(f"config.json: {heads} attention heads do not share {key_heads} key heads evenly")
    told = config.get("head_dim") is not None
    head_size = _count(config, "head_dim", family.head_size or max(1, embedding // heads))
    if not told and not family.head_size and embedding % heads:
        raise CheckpointError(f"config.json: hidden_size {embedding} is not a multiple of {heads} heads")
    _check_activation(config, family)
    _check_experts(config, family)
    rotation, warnings = read_rotation(config)
    window, more = _window(config, family, layers)
    softcaps = _softcaps(config, family)
    _check_scale(config, family, layers, head_size, embedding // heads)
    return Hyperparameters(
        context=_count(config, "max_position_embeddings"),
        embedding=embedding,
        layers=layers,
        feed_forward=_count(config, "intermediate_size"),
        heads=heads,
        key_heads=key_heads,
        head_size=head_size,
        writes_head_size=told or family.writes_head_size,
        epsilon=_number(config, "rms_norm_eps", 1e-6),
        vocabulary=_count(config, "vocab_size"),
        rotation=rotation,
        sliding_window=window,
        softcaps=softcaps,
        is_bidirectional=config.get("is_causal") is False,
        warnings=(*warnings, *more),
    )


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json has no {key}")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST:
        raise CheckpointError(f"config.json: {key} is {value!r}, expected a whole number from 1")
    return value


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: {key} is {value!r}, expected a positive number")
    return float(value)


def _check_activation(config: Mapping[str, Any], family: Family) -> None:
    name = config.get("hidden_activation") or config.get("hidden_act")
    if name is not None and str(name) not in family.activations:
        raise UnsupportedError(
            f'{family.architecture} runs with {min(family.activations)}, and the model uses "{name}"'
        )


def _check_experts(config: Mapping[str, Any], family: Family) -> None:
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if config.get(key):
            raise UnsupportedError(f"{family.name} models with experts are not written ({key} is {config[key]})")


def _window(config: Mapping[str, Any], family: Family, layers: int) -> tuple[int | None, list[str]]:
    """The sliding window that the reader is told of."""
    window = config.get("sliding_window")
    pattern = _WINDOW_PATTERN.get(family.name)
    if pattern is None:
        used = config.get("use_sliding_window", family.name == "mistral")
        if window is not None and used and _count(config, "sliding_window") < _count(config, "max_position_embeddings"):
            return None, [f"llama.cpp attends to the whole context, and the model to a window of {window} tokens"]
        return None, []
    if config.get("sliding_window_pattern") == 1:
        return None, []
    window = _count(config, "sliding_window")
    kinds = config.get("layer_types")
    expected = ["full_attention" if (n + 1) % pattern == 0 else "sliding_attention" for n in range(layers)]
    step = config.get("sliding_window_pattern", config.get("_sliding_window_pattern", pattern))
    if (kinds is not None and kinds != expected) or step != pattern:
        raise UnsupportedError(
            f"llama.cpp expects every block number {pattern} of {family.name} to attend to the whole context, and "
            "layer_types says otherwise"
        )
    return window, []


def _softcaps(config: Mapping[str, Any], family: Family) -> dict[str, float]:
    caps = {}
    if family.name == "gemma2":
        caps["attn_logit_softcapping"] = _number(config, "attn_logit_softcapping", 50.0)
        caps["final_logit_softcapping"] = _number(config, "final_logit_softcapping", 30.0)
    elif family.name == "gemma3":
        if config.get("attn_logit_softcapping") is not None:
            raise UnsupportedError("attn_logit_softcapping has no place in the metadata of gemma3")
        if config.get("final_logit_softcapping"):
            caps["final_logit_softcapping"] = _number(config, "final_logit_softcapping", 30.0)
    return caps


def _check_scale(config: Mapping[str, Any], family: Family, layers: int, head_size: int, even_size: int) -> None:
    scalar = config.get("query_pre_attn_scalar")
    expected = even_size if (family.name, layers) in WHOLE_BY_SIZE else head_size
    if family.name in _WINDOW_PATTERN and scalar is not None and scalar != expected:
        raise UnsupportedError(
            f"llama.cpp divides attention by the root of {expected}, and query_pre_attn_scalar is {scalar}"
        )
