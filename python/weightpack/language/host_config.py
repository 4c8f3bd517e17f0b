"""The way back: a `config.json` for transformers out of a GGUF file's metadata.

What is found is checked by going there again: the config must yield the pairs that the file has. A
file that says more than a config of these families can say is refused, and its config must be given.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .families import Family
from .host_names import family_of
from .hyperparameters import WHOLE_BY_SIZE, read_hyperparameters

_COUNTS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
}
_NUMBERS = {
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_SCALING = {
    "factor": "factor",
    "original_max_position_embeddings": "original_context_length",
    "extrapolation_factor": "yarn_ext_factor",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
_LOW, _HIGH = 1.0, 4.0
"""Bounds of Llama 3's scaling, the same in all its models."""

_UNSAID = frozenset({"vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length"})
"""Keys that some writers leave out, or put in: what they say must fit all the same."""
_IDLE = frozenset({"rope.scaling.finetuned", "tensor_data_layout"})


def host_config(
    metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], factors: Sequence[float] | None = None
) -> dict[str, Any]:
    """The `config.json` of a language model whose file has this metadata and tensors of these shapes.
    `factors` are the values of `rope_freqs.weight`, where the file has it.

    Raises `UnsupportedError` for an architecture that is not known or that says more than a config does.
    """
    architecture = str(metadata.get("general.architecture", ""))
    family = family_of(architecture)
    if family is None:
        raise _unsaid(f'no config is known for architecture "{architecture}"')
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    config: dict[str, Any] = {
        "architectures": [family.classes[0]],
        "model_type": family.model_types[0],
        **{name: _count(own, key) for name, key in _COUNTS.items()},
        **{name: _shortest(own[key]) for name, key in _NUMBERS.items() if key in own},
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = _count(own, "attention.head_count_kv", heads)
    head_size = _count(own, "attention.key_length", family.head_size or config["hidden_size"] // heads)
    if "attention.key_length" in own:
        config["head_dim"] = head_size
    embedding = shapes.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError('the model has no tensor "token_embd.weight"')
    config["vocab_size"] = embedding[0]
    config |= {
        name: metadata[f"tokenizer.ggml.{key}"] for name, key in _TOKENS.items() if f"tokenizer.ggml.{key}" in metadata
    }
    if "attention.sliding_window" in own:
        config["sliding_window"] = _count(own, "attention.sliding_window")
    config |= _of_family(family, config, shapes, head_size)
    scaling = _scaling(own, config, factors, head_size)
    if scaling is not None:
        config["rope_scaling"] = scaling
    _check(config, family, own, head_size)
    return config


def _of_family(
    family: Family, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], head_size: int
) -> dict[str, Any]:
    """What one family's config says, and no pair of metadata."""
    more: dict[str, Any] = {}
    if family.name in ("gemma2", "gemma3"):
        by_size = (family.name, config["num_hidden_layers"]) in WHOLE_BY_SIZE
        width = config["hidden_size"] // config["num_attention_heads"]
        more["query_pre_attn_scalar"] = width if by_size else head_size
    elif family.name == "llama":
        more["attention_bias"] = "blk.0.attn_q.bias" in shapes
        more["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    return more


def _scaling(
    own: Mapping[str, Any], config: Mapping[str, Any], factors: Sequence[float] | None, head_size: int
) -> dict[str, Any] | None:
    if factors is not None:
        return _of_factors([float(value) for value in factors], float(config.get("rope_theta", 10000.0)), head_size)
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    found = {name: own.get(f"rope.scaling.{key}") for name, key in _SCALING.items()}
    return {"rope_type": str(kind), **{name: _shortest(value) for name, value in found.items() if value is not None}}


def _of_factors(factors: list[float], base: float, head_size: int) -> dict[str, Any]:
    """Llama 3's scaling that has these factors."""
    from .rotation import Rotation

    factor = max(factors)
    lengths = [8192.0]
    for index, value in enumerate(factors):
        if 1 < value < factor:
            # Between the bounds, a divisor says where the original context ends.
            wavelength = 2 * math.pi * base ** (2 * index / head_size)
            smooth = (1 / value - 1 / factor) / (1 - 1 / factor)
            lengths.append(float(round(wavelength * (smooth * (_HIGH - _LOW) + _LOW))))
    for length in lengths:
        found = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": int(length),
        }
        again = Rotation(base, None, "llama3", found).factors(head_size)
        if again is not None and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(again, factors, strict=True)):
            return found
    raise _unsaid("the factors of the rotation (rope_freqs.weight) are not those of Llama 3's scaling")


def _check(config: Mapping[str, Any], family: Family, own: Mapping[str, Any], head_size: int) -> None:
    """Goes there again: the config must yield what the file says."""
    prefix = f"{family.architecture}."
    pairs = read_hyperparameters(config, family).metadata(family)
    again = {key.removeprefix(prefix): value for key, _, value in pairs}
    expected = {"vocab_size": config["vocab_size"]}
    expected |= dict.fromkeys(("rope.dimension_count", "attention.key_length", "attention.value_length"), head_size)
    for key, value in own.items():
        if key in _IDLE:
            continue
        wanted = again.get(key, expected.get(key) if key in _UNSAID else None)
        same = _shortest(wanted) == _shortest(value) if isinstance(value, float) and wanted else wanted == value
        if not same and not (key == "rope.scaling.type" and value == "none"):
            raise _unsaid(f"{prefix}{key} is {value!r}, which a config for this class does not say")


def _count(own: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = own.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _unsaid(f"metadata {key} is {value!r}, expected one whole number")
    return value


def _shortest(value: Any) -> Any:
    """The shortest decimal number that is this f32: 1e-05 for 9.99999974e-06."""
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    try:
        single = struct.pack("<f", value)
    except OverflowError:
        return value
    for digits in range(1, 10):
        found = float(f"{value:.{digits}g}")
        if struct.pack("<f", found) == single:
            return found
    return value


def _unsaid(message: str) -> UnsupportedError:
    return UnsupportedError(message, hint="config= takes the model's folder or its config.json")
