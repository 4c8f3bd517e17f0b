"""Which file of a folder holds the weights, and what else comes along."""

from __future__ import annotations

import json
import os

import pytest

from weightpack.errors import CheckpointError
from weightpack.folder import carried_files, find_models


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}" if name.endswith(".json") else "")
    return folder


@pytest.mark.parametrize(
    ("names", "weights", "stem"),
    [
        (["model.safetensors", "config.json"], "model.safetensors", "model"),
        (["diffusion_pytorch_model.safetensors"], "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model"),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], "model.safetensors.index.json", "model"),
        (["model.safetensors", "model.safetensors.index.json"], "model.safetensors", "model"),
        (["model.fp16.safetensors", "pytorch_model.bin"], "model.fp16.safetensors", "model"),
        (["model.safetensors", "model.fp16.safetensors"], "model.safetensors", "model"),
        (["model.safetensors.index.fp16.json"], "model.safetensors.index.fp16.json", "model"),
        (["model.safetensors", "adapter.safetensors"], "model.safetensors", "model"),
        (["flux1-dev.safetensors"], "flux1-dev.safetensors", "model"),
        (["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"], "x-00001-of-00002.gguf", "x"),
        (["x.Q8_0.gguf", "config.json"], "x.Q8_0.gguf", "x.Q8_0"),
        (["model.safetensors", "x.gguf"], "model.safetensors", "model"),
    ],
)
def test_the_weights_of_a_folder(tmp_path, names, weights, stem):
    (model,) = find_models(touch(tmp_path, *names))
    assert model.weights == tmp_path / weights
    assert model.stem == stem


def test_diffusers_reads_the_index_first(tmp_path):
    touch(tmp_path, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    (model,) = find_models(tmp_path)
    assert model.weights.name == "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.safetensors", "b.safetensors"], "several checkpoints: a.safetensors, b.safetensors"),
        (["a.gguf", "b.gguf"], "several checkpoints"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "several checkpoints"),
        (["pytorch_model.bin"], "only as pickles"),
        (["model-00001-of-00002.safetensors"], "1 shards and no index"),
        (["config.json"], "holds no weights"),
        ([], "holds no weights"),
    ],
)
def test_folders_that_are_refused(tmp_path, names, message):
    with pytest.raises(CheckpointError, match=message):
        find_models(touch(tmp_path, *names))


def test_files_that_are_refused(tmp_path):
    touch(tmp_path, "model.bin", "notes.txt", "model-00001-of-00002.safetensors", "config.json")
    for name, message in [
        ("model.bin", "is a pickle"),
        ("notes.txt", "is not a checkpoint"),
        ("config.json", "is not a checkpoint"),
        ("model-00001-of-00002.safetensors", "one shard of 2"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            find_models(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        find_models(tmp_path / "absent.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="neither a regular file nor a folder"):
        find_models(tmp_path / "pipe.safetensors")


def test_a_config_that_is_no_json(tmp_path):
    touch(tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        find_models(tmp_path)


def test_the_components_of_a_pipeline(tmp_path):
    touch(
        tmp_path,
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "tokenizer/vocab.json",
        "scheduler/scheduler_config.json",
        "not_listed/model.safetensors",
    )
    index = {"_class_name": "P", "scheduler": ["diffusers", "S"], "tokenizer": ["transformers", "T"]}
    index |= {"transformer": ["diffusers", "T"], "vae": ["diffusers", "V"], "text_encoder_2": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert [model.component for model in find_models(tmp_path)] == ["transformer", "vae"]


def test_a_component_may_not_leave_the_pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text('{"../x": ["diffusers", "T"]}')
    with pytest.raises(CheckpointError, match="leaves the folder"):
        find_models(tmp_path)


def test_what_is_carried_over_and_what_is_left_out(tmp_path):
    touch(
        tmp_path,
        "config.json",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.gguf",
        "training_args.bin",
        "optimizer.pt",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "original/consolidated.00.pth",
        "onnx/model.onnx",
        ".git/HEAD",
        "__pycache__/x.pyc",
        "checkpoint-500/model.safetensors",
    )
    carried, left_out = carried_files(tmp_path)
    assert [item.path for item in carried] == [
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
    ]
    assert {".git/", "__pycache__/", "checkpoint-500/", "onnx/", "original/consolidated.00.pth"} <= set(left_out)
    assert {"pytorch_model.bin", "model-00001-of-00001.safetensors", "optimizer.pt"} <= set(left_out)


def test_a_component_that_is_not_converted_keeps_its_weights(tmp_path):
    touch(tmp_path, "config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    carried, left_out = carried_files(tmp_path, "vae/", whole=True)
    assert [item.path for item in carried] == ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert left_out == ["vae/diffusion_pytorch_model.bin"]


def test_links_are_followed_to_files_only(tmp_path):
    blobs = touch(tmp_path / "blobs", "abc", "def", "123")
    folder = touch(tmp_path / "snapshot")
    folder.mkdir()
    for name, blob in (("tokenizer.json", "abc"), ("model.safetensors", "def"), ("config.json", "123")):
        (folder / name).symlink_to(blobs / blob)
    carried, left_out = carried_files(folder)
    assert [(item.path, item.source) for item in carried] == [("tokenizer.json", (blobs / "abc").resolve())]
    assert left_out == ["model.safetensors"]
    (folder / "more").symlink_to(tmp_path / "blobs")
    with pytest.raises(CheckpointError, match="not a regular file"):
        carried_files(folder)
