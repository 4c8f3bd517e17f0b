"""What of `config.json` is refused, left out or worth a warning. What is written: `test_golden`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from weightpack.errors import CheckpointError, UnsupportedError
from weightpack.language.families import detect_family
from weightpack.language.hyperparameters import Hyperparameters, read_hyperparameters
from weightpack.language.rotation import Rotation, read_rotation

from .models import CONFIGS


def read(name: str, without: tuple[str, ...] = (), **changes: Any) -> Hyperparameters:
    config = {key: value for key, value in {**CONFIGS[name], **changes}.items() if key not in without}
    family = detect_family(config)
    assert family is not None
    return read_hyperparameters(config, family)


def test_defaults_of_the_class_stand_in() -> None:
    found = read("llama2", without=("num_key_value_heads", "rms_norm_eps", "rope_scaling"))
    assert (found.key_heads, found.head_size, found.epsilon) == (8, 32, 1e-6)
    assert found.rotation == Rotation(10000.0, None, "default", found.rotation.parameters)
    assert read("qwen3", without=("head_dim",)).head_size == 128


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, 2**31, [8]])
def test_counts_are_whole_and_positive(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{key} is .*, expected a whole number from 1"):
        read("llama2", **{key: value})
    with pytest.raises(CheckpointError, match=f"has no {key}"):
        read("llama2", without=(key,))


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("llama2", {"num_key_value_heads": 3}, "do not share 3 key heads evenly"),
        ("llama2", {"hidden_size": 250}, "is not a multiple of 8 heads"),
        ("llama2", {"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ("llama2", {"rope_theta": "big"}, "rope_theta is 'big'"),
        ("llama2", {"rope_scaling": [1]}, "rope_parameters is not an object"),
        ("llama2", {"rope_scaling": {"type": "linear"}}, "factor None"),
        ("llama3", {"rope_scaling": {"type": "llama3", "low_freq_factor": 4.0}}, "is not above low_freq_factor"),
    ],
)
def test_contradictions_are_refused(name: str, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        use(name, changes)


def use(name: str, changes: dict[str, Any]) -> None:
    found = read(name, **changes)
    found.rotation.metadata()
    found.rotation.factors(64)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("llama2", {"hidden_act": "relu"}, 'runs with silu, and the model uses "relu"'),
        ("llama2", {"num_local_experts": 8}, "with experts"),
        ("llama2", {"rope_scaling": {"type": "longrope"}}, 'rope scaling "longrope"'),
        ("llama2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar is 144"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types says otherwise"),
        ("gemma3", {"sliding_window_pattern": 4}, "layer_types says otherwise"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "has no place in the metadata of gemma3"),
    ],
)
def test_what_the_reader_would_run_differently_is_refused(name: str, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        read(name, **changes)


def test_what_only_differs_in_long_texts_is_a_warning() -> None:
    assert read("mistral").warnings == ()
    assert read("mistral", sliding_window=512).warnings == ()
    assert "a window of 256 tokens" in read("mistral", sliding_window=256).warnings[0]
    assert read("qwen2", sliding_window=256).warnings == ()
    assert "a window of 256" in read("qwen2", sliding_window=256, use_sliding_window=True).warnings[0]
    assert "dynamically" in read("llama2", rope_scaling={"type": "dynamic", "factor": 2.0}).warnings[0]


def test_the_size_of_a_head_is_told_where_the_reader_cannot_know_it() -> None:
    assert not read("qwen2").writes_head_size
    assert read("qwen2", head_dim=64).writes_head_size


def test_three_spellings_of_one_rotation() -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    old, _ = read_rotation({"rope_theta": 5e5, "rope_scaling": scaling})
    new, _ = read_rotation({"rope_parameters": {**scaling, "rope_theta": 5e5}})
    assert old.metadata() == new.metadata()
    assert old.base == new.base == 5e5
    both = {"full_attention": {"rope_theta": 5e5, **scaling}, "sliding_attention": {"rope_theta": 1e4}}
    each, _ = read_rotation({"rope_parameters": both})
    assert (each.metadata(), each.base, each.sliding_base) == (old.metadata(), 5e5, 1e4)
    length, _ = read_rotation({"max_position_embeddings": 99, "rope_scaling": {"type": "yarn", "factor": 2.0}})
    assert ("rope.scaling.original_context_length", "u32", 99) in length.metadata()


@pytest.mark.parametrize(
    ("base", "size", "parameters"),
    [
        (5e5, 128, {"factor": 8.0, "original_max_position_embeddings": 8192}),
        (5e5, 64, {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        (1e4, 128, {}),
        (12345.0, 80, {"factor": 3.0, "high_freq_factor": 4.7, "original_max_position_embeddings": 3000}),
    ],
)
def test_factors_of_llama3_are_those_of_torch(peer: Any, base: float, size: int, parameters: dict[str, Any]) -> None:
    torch = peer("torch")
    # The arithmetic of llama.cpp's script, on tensors of one f32.
    factor, length = parameters.get("factor", 8.0), parameters.get("original_max_position_embeddings", 8192)
    low, high = parameters.get("low_freq_factor", 1.0), parameters.get("high_freq_factor", 4.0)
    expected = []
    for frequency in 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)):
        wavelength = 2 * math.pi / frequency
        if wavelength < length / high:
            expected.append(1)
        elif wavelength > length / low:
            expected.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            expected.append(1 / ((1 - smooth) / factor + smooth))
    found = Rotation(base, None, "llama3", parameters).factors(size)
    assert np.array_equal(np.asarray(found, np.float32), torch.tensor(expected, dtype=torch.float32).numpy())
    assert Rotation(base).factors(size) is None
