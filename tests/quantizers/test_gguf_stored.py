"""Types by module, in short."""

from __future__ import annotations

import pytest

import weightpack as wp
from weightpack.errors import ConfigError
from weightpack.quantizers.gguf_stored import compact, type_of

TYPES = {
    "embed": "Q8_0",
    "blocks.0.up": "Q4_K",
    "blocks.1.up": "Q4_K",
    "blocks.2.up": "Q6_K",
    "blocks.3.up": None,
    "blocks.0.norm": None,
    "blocks.1.norm": None,
    "blocks.0.0.conv1": "Q5_0",
    "blocks.1.12.conv1": "Q5_0",
    "layer2": "Q8_0",
    "7": "F32_never",
}


def test_there_and_back():
    found = compact(TYPES)
    assert found["blocks.*.up"] == "Q4_K"
    assert found["blocks.3.up"] is None
    assert found["blocks.*.*.conv1"] == "Q5_0"
    assert not any("norm" in path for path in found)
    assert {path: type_of(found, path) for path in TYPES} == TYPES
    assert type_of(found, "blocks.up") is None


def test_a_rare_type_is_written_out():
    types = {f"a.{number}": "Q4_K" if number == 3 else None for number in range(9)}
    assert compact(types) == {"a.3": "Q4_K"}


def test_the_config():
    config = wp.GGUFQuantizationConfig(stored_types={"a.*": "Q4_K", "a.1": None}, stored_shapes={"a.2": [2, 256]})
    assert config.stored_shapes == {"a.2": (2, 256)}
    again = wp.GGUFQuantizationConfig.from_dict(config.to_dict())
    assert again == config
    assert config.to_dict()["stored_shapes"] == {"a.2": [2, 256]}
    assert "stored_types" not in wp.GGUFQuantizationConfig().to_dict()
    chosen = config.with_loading_choices(wp.GGUFQuantizationConfig(compute_dtype="bf16"))
    assert (chosen.stored_types, chosen.compute_dtype) == (config.stored_types, "bfloat16")
    for fields in ({"stored_types": ["Q4_K"]}, {"stored_types": {"a": "F32"}}, {"stored_shapes": {"a": [1.5]}}):
        with pytest.raises(ConfigError):
            wp.GGUFQuantizationConfig(**fields)
