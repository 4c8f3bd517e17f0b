"""From the metadata of a GGUF file to a config, as far as the file says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import weightpack as wp
from weightpack.errors import UnsupportedError
from weightpack.language.families import detect_family
from weightpack.language.host_config import host_config
from weightpack.language.hyperparameters import read_hyperparameters

from .models import CONFIGS, make_model


def described(path: Path, **changes: Any) -> dict[str, Any]:
    with wp.open_checkpoint(path) as checkpoint:
        rope = "rope_freqs.weight"
        factors = checkpoint.read(rope).tolist() if rope in checkpoint else None
        shapes = {name: entry.shape for name, entry in checkpoint.items()}
        return host_config({**checkpoint.metadata, **changes}, shapes, factors)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_yields_the_file_again(tmp_path: Path, name: str) -> None:
    folder = make_model(tmp_path / "model", name)
    wp.convert(folder, tmp_path / "model.gguf", "q8_0")
    found = described(tmp_path / "model.gguf")
    family = detect_family(found)
    assert family is not None
    # For llama.cpp a Mistral is a llama, and a text is not longer than the window of this one.
    assert family.name == {"llama2": "llama", "llama3": "llama", "mistral": "llama"}.get(name, name)
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "num_key_value_heads", "rms_norm_eps"):
        assert found[key] == CONFIGS[name][key]
    original = read_hyperparameters(CONFIGS[name], family)
    again = read_hyperparameters(found, family)
    assert again.metadata(family) == original.metadata(family)
    assert again.rotation.factors(again.head_size) == original.rotation.factors(original.head_size)
    assert found["tie_word_embeddings"] == CONFIGS[name].get("tie_word_embeddings", name.startswith("gemma"))


def test_what_a_config_cannot_say_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama2")
    wp.convert(folder, tmp_path / "model.gguf", "q8_0")
    path = tmp_path / "model.gguf"
    for changes, message in (
        ({"general.architecture": "mamba"}, 'no config is known for architecture "mamba"'),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.attention.head_count_kv": [4, 2]}, r"head_count_kv is \[4, 2\]"),
        ({"llama.rope.dimension_count": 16}, "llama.rope.dimension_count is 16"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            described(path, **changes)
    # What says nothing is passed over.
    assert described(path, **{"llama.rope.scaling.type": "none", "llama.tensor_data_layout": "x"})


def test_factors_of_another_scaling() -> None:
    from weightpack.language.host_config import _of_factors

    with pytest.raises(UnsupportedError, match="are not those of Llama 3's scaling"):
        _of_factors([1.0, 1.5, 3.0, 8.0], 10000.0, 8)
