"""GGUF files of diffusion models on their way back: names of diffusers, shapes as they were."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import weightpack
from weightpack.errors import CheckpointError

from .conftest import normal, write_safetensors

VECTORS = Path(__file__).parent.parent / "vectors" / "keymaps"


def source(folder: Path, name: str) -> Path:
    """A model with the names and shapes of a tiny one of this architecture."""
    golden = json.loads((VECTORS / f"{name}.json").read_text("utf-8"))
    shapes = golden["source"]
    if name == "flux":
        # The golden list has rows as wide as diffusers' function cuts them; these are the model's.
        for key in shapes:
            if key.startswith("single_") and ("attn.to_" in key or "proj_mlp" in key):
                shapes[key][0] = 64 * (4 if "proj_mlp" in key else 1)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": golden["class"]}))
    tensors = {key: normal(shape, seed, np.float32) for seed, (key, shape) in enumerate(shapes.items())}
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "ltxv", "qwen_image"])
def test_there_and_back(tmp_path, name):
    model = source(tmp_path / "model", name)
    weightpack.convert(model, tmp_path / "model.gguf", "f32")
    assert weightpack.inspect(tmp_path / "model.gguf").metadata["general.architecture"] == name
    back = weightpack.convert(tmp_path / "model.gguf", tmp_path / "back.safetensors", "f32", names="host")
    assert "config.json is not made: copy those of the original model beside the result" in back.warnings
    report = weightpack.diff(model, tmp_path / "back.safetensors")
    assert report.is_complete
    assert not report.unequal
    assert report.error.snr_db == math.inf


def test_packed_rows_are_taken_apart(tmp_path):
    model = source(tmp_path / "model", "sd3")
    weightpack.convert(model, tmp_path / "model.gguf", "q8_0")
    weightpack.convert(tmp_path / "model.gguf", tmp_path / "back.safetensors", "bf16", names="host")
    report = weightpack.diff(model, tmp_path / "back.safetensors")
    assert report.is_complete
    assert report.error.snr_db > 40


def flattened(path: Path, shape: list[int]) -> np.ndarray:
    gguf = pytest.importorskip("gguf")
    weights = normal((8, 32, 3, 3), dtype=np.float32)
    writer = gguf.GGUFWriter(str(path), "sd1")
    blocks = gguf.quants.quantize(weights.reshape(-1, 256), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("input_blocks.1.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_array("comfy.gguf.orig_shape.input_blocks.1.weight", shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0).reshape(weights.shape)


def test_flattened_kernels_get_their_shape_back(tmp_path):
    expected = flattened(tmp_path / "model.gguf", [8, 32, 3, 3])
    weightpack.convert(tmp_path / "model.gguf", tmp_path / "back.safetensors", "f32")
    with weightpack.open_checkpoint(tmp_path / "back.safetensors") as back:
        assert np.array_equal(back.read("input_blocks.1.weight"), expected)
    # Another GGUF file stays flat, and keeps the pair that says so.
    weightpack.convert(tmp_path / "model.gguf", tmp_path / "again.gguf", "q8_0")
    again = weightpack.inspect(tmp_path / "again.gguf")
    assert again.tensors[0].shape == (9, 256)
    assert again.metadata["comfy.gguf.orig_shape.input_blocks.1.weight"] == [8, 32, 3, 3]


def test_a_shape_that_does_not_fit_is_refused(tmp_path):
    flattened(tmp_path / "model.gguf", [8, 32, 3, 4])
    with pytest.raises(CheckpointError, match="has no such shape"):
        weightpack.convert(tmp_path / "model.gguf", tmp_path / "back.safetensors", "f32")
