"""From a model folder to GGUF, and back under the names of the host."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import weightpack as wp
from weightpack.errors import ConfigError

from .models import CONFIGS, make_model


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_weights_come_back_as_they_were(tmp_path: Path, name: str) -> None:
    folder, there, back = make_model(tmp_path / "model", name), tmp_path / "there.gguf", tmp_path / "back.safetensors"
    wp.convert(folder, there, to="bf16")
    report = wp.convert(there, back, to="bf16", names="host")
    assert any("config.json and the tokenizer's files are not made" in warning for warning in report.warnings)
    with wp.open_checkpoint(folder) as first, wp.open_checkpoint(back) as last:
        assert set(first) == set(last)
        for tensor, entry in first.items():
            assert (last[tensor].shape, last[tensor].dtype) == (entry.shape, "BF16")
            before, after = first.read(tensor, "float32"), last.read(tensor, "float32")
            if name.startswith("gemma") and tensor.endswith("norm.weight"):
                # 1 was added to it in f32: what is smaller than half a unit of that is gone.
                assert np.allclose(before, after, rtol=2**-8, atol=2**-24)
            else:
                assert np.array_equal(before, after), tensor


@pytest.mark.parametrize("name", ["llama2", "qwen3", "gemma2"])
@pytest.mark.parametrize("to", ["q8_0", "q4_k_m"])
def test_packed_weights_come_back_as_they_decode(tmp_path: Path, name: str, to: str) -> None:
    folder = make_model(tmp_path / "model", name)
    wp.convert(folder, tmp_path / "mapped.gguf", to=to)
    wp.convert(tmp_path / "mapped.gguf", tmp_path / "back.safetensors", to="f32", names="host")
    compared = wp.diff(folder, tmp_path / "back.safetensors")
    assert compared.is_complete
    assert not compared.unequal
    for pair in compared.tensors:
        assert pair.error.relative_rms < (0.006 if to == "q8_0" else 0.09), pair.name


def test_where_names_of_a_host_make_no_sense(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama2")
    with pytest.raises(ConfigError, match="and the source is none"):
        wp.convert(folder, tmp_path / "out", to="bf16", names="host")
    with pytest.raises(ConfigError, match="and the result is none"):
        wp.convert(folder, tmp_path / "out.gguf", to="q8_0", names="host")
    with pytest.raises(ConfigError, match='names "theirs" is none of source, host'):
        wp.convert(folder, tmp_path / "out", to="bf16", names="theirs")  # type: ignore[arg-type]
