"""Whole pipelines saved in one step: what is written, what stays, what is refused."""

from __future__ import annotations

import json
import os
import threading

import pytest

from tests.conftest import find_peer

torch = find_peer("torch")
diffusers = find_peer("diffusers")
find_peer("transformers")

import numpy as np  # noqa: E402

import weightpack as wp  # noqa: E402
from tests.pipelines import tiny  # noqa: E402
from tests.pipelines.test_load import BACKENDS, MODELS  # noqa: E402
from tests.quantizers.test_contract import storage  # noqa: E402
from weightpack.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "pipeline"
    tiny.save(folder, torch.bfloat16)
    return folder


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_plain_pipeline_is_saved_as_diffusers_does(source, tmp_path):
    pipeline = wp.load_pipeline(source, torch_dtype="bfloat16")
    wp.save_pipeline(pipeline, tmp_path / "ours")
    pipeline.save_pretrained(tmp_path / "theirs")
    ours, theirs = content(tmp_path / "ours"), content(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    for name, data in theirs.items():
        if name.endswith(".safetensors"):
            assert len(ours[name]) > 1000
        else:
            assert ours[name] == data, name
    assert ours["model_index.json"] == (source / "model_index.json").read_bytes()
    again = wp.load_pipeline(tmp_path / "ours", torch_dtype="bfloat16")
    for name in MODELS:
        assert storage(getattr(again, name)) == storage(getattr(pipeline, name))
    assert sorted(os.listdir(tmp_path)) == ["ours", "theirs"]


@pytest.mark.parametrize(("backend", "size"), [("torchao", "5GB"), *((name, "30KB") for name in BACKENDS)])
def test_there_and_back_twice_is_the_same(source, tmp_path, peer, backend, size):
    needs, kwargs, _ = BACKENDS[backend]
    if needs is not None:
        peer(needs)
    config = wp.PipelineQuantizationConfig(backend, kwargs)
    pipeline = wp.load_pipeline(source, quantization_config=config, torch_dtype="bfloat16")
    wp.save_pipeline(pipeline, tmp_path / "once", max_shard_size=size)
    again = wp.load_pipeline(tmp_path / "once", torch_dtype="bfloat16")
    for name in MODELS:
        assert storage(getattr(again, name)) == storage(getattr(pipeline, name)), name
    image = tiny.image(pipeline)
    wp.save_pipeline(again, tmp_path / "twice", max_shard_size=size)
    once, twice = content(tmp_path / "once"), content(tmp_path / "twice")
    assert once == twice
    assert np.array_equal(tiny.image(again), image)
    # After products a backend may hold its weights otherwise; what is saved stays the same.
    wp.save_pipeline(again, tmp_path / "used", max_shard_size=size)
    used = content(tmp_path / "used")
    assert {name: data for name, data in used.items() if "tokenizer" not in name} == {
        name: data for name, data in once.items() if "tokenizer" not in name
    }
    assert once["model_index.json"] == (source / "model_index.json").read_bytes()
    for name, data in once.items():
        assert str(tmp_path).encode() not in data, name
        assert str(source).encode() not in data, name
    for name in ("unet", "text_encoder"):
        assert json.loads(once[f"{name}/config.json"])["quantization_config"]["quant_method"] in backend
    assert "quantization_config" not in json.loads(once["vae/config.json"])
    assert ("unet/diffusion_pytorch_model.safetensors.index.json" in once) == (size == "30KB")


def test_a_pipeline_takes_the_place_of_another(source, tmp_path, peer):
    peer("torchao")
    place = tmp_path / "pipeline"
    wp.save_pipeline(wp.load_pipeline(source), place, max_shard_size="30KB")
    assert len(list((place / "unet").glob("*.safetensors"))) > 1
    (place / "notes.txt").write_text("mine")
    (place / "unet" / "notes.txt").write_text("mine too")
    before = content(place)
    config = wp.PipelineQuantizationConfig("torchao", {"quant_type": "int8"})
    pipeline = wp.load_pipeline(source, quantization_config=config, torch_dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"holds .*\n.*overwrite=True"):
        wp.save_pipeline(pipeline, place)
    assert content(place) == before
    assert os.listdir(tmp_path) == ["pipeline"]
    wp.save_pipeline(pipeline, place, overwrite=True)
    after = content(place)
    assert after["notes.txt"] == b"mine"
    assert after["unet/notes.txt"] == b"mine too"
    assert [name for name in after if name.endswith("index.json")] == ["model_index.json"]
    assert sorted(name for name in after if name.endswith(".safetensors")) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert os.listdir(tmp_path) == ["pipeline"]
    wanted = tiny.image(pipeline)
    assert np.array_equal(tiny.image(wp.load_pipeline(place, torch_dtype="bfloat16")), wanted)
    # A variant stands beside it.
    wp.save_pipeline(pipeline, place, variant="int8", overwrite=True)
    assert {"unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.int8.safetensors"} <= set(
        content(place)
    )
    assert np.array_equal(tiny.image(wp.load_pipeline(place, torch_dtype="bfloat16", variant="int8")), wanted)


def test_a_pipeline_saved_to_where_it_came_from(source, tmp_path):
    place = tmp_path / "pipeline"
    wp.save_pipeline(wp.load_pipeline(source, torch_dtype="bfloat16"), place)
    before = content(place)
    wp.save_pipeline(wp.load_pipeline(place, torch_dtype="bfloat16", mmap=True), place, overwrite=True)
    assert content(place) == before


def test_refusals_name_the_component_and_touch_nothing(source, tmp_path, monkeypatch):
    config = wp.PipelineQuantizationConfig("gguf", {"quant_type": "q8_0"}, "unet")
    packed = wp.load_pipeline(source, quantization_config=config)
    plain = wp.load_pipeline(source)
    new = tmp_path / "above" / "new"
    with monkeypatch.context() as patch:
        patch.setattr(type(wp.quantizer_of(packed.unet)), "is_serializable", False)
        with pytest.raises(ConfigError, match="unet: gguf models cannot be saved"):
            wp.save_pipeline(packed, new)
    with pytest.raises(ConfigError, match="max_shard_size is not a size"):
        wp.save_pipeline(plain, new, max_shard_size="5 potatoes")
    with pytest.raises(ConfigError, match=r"UNet2DConditionModel is no pipeline of diffusers\n.*save_pretrained"):
        wp.save_pipeline(plain.unet, new)
    scheduler, plain.scheduler = plain.scheduler, object.__new__(Unsaveable)
    with pytest.raises(ConfigError, match="scheduler: Unsaveable cannot be saved"):
        wp.save_pipeline(plain, new)
    plain.scheduler = object.__new__(Broken)
    with pytest.raises(OSError, match="no space for this"):
        wp.save_pipeline(plain, new)
    assert os.listdir(tmp_path) == []
    plain.scheduler = scheduler
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        wp.save_pipeline(plain, tmp_path / "file", overwrite=True)
    assert os.listdir(tmp_path) == ["file"]


class Unsaveable:
    pass


class Broken:
    def save_pretrained(self, folder):
        raise OSError("no space for this")


def test_models_that_a_host_packed_by_itself(source, tmp_path, peer):
    torchao = peer("torchao.quantization")
    mapping = {"unet": diffusers.TorchAoConfig(torchao.Int8WeightOnlyConfig())}
    theirs = diffusers.DiffusionPipeline.from_pretrained(
        source, quantization_config=diffusers.PipelineQuantizationConfig(quant_mapping=mapping)
    )
    with pytest.raises(ConfigError, match="unet: diffusers packed this model by itself"):
        wp.save_pipeline(theirs, tmp_path / "saved")
    assert os.listdir(tmp_path) == []


def test_a_pipeline_that_diffusers_loaded_is_saved_without_its_place(source, tmp_path):
    theirs = diffusers.DiffusionPipeline.from_pretrained(source)
    wp.save_pipeline(theirs, tmp_path / "saved")
    for name, data in content(tmp_path / "saved").items():
        assert str(source).encode() not in data, name
    assert (tmp_path / "saved" / "model_index.json").read_bytes() == (source / "model_index.json").read_bytes()


def test_a_part_set_later_is_not_lost(source, tmp_path):
    """diffusers' own index keeps saying that there is none."""
    import transformers

    pipeline = wp.load_pipeline(source)
    pipeline.feature_extractor = transformers.CLIPImageProcessor(size={"shortest_edge": 32})
    pipeline.image_encoder = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32,
            patch_size=16, projection_dim=16,
        )
    )  # fmt: skip
    wp.save_pipeline(pipeline, tmp_path / "saved")
    for again in (
        wp.load_pipeline(tmp_path / "saved"),
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved"),
    ):
        assert type(again.feature_extractor) is type(pipeline.feature_extractor)
        assert again.feature_extractor.size == pipeline.feature_extractor.size
        assert storage(again.image_encoder) == storage(pipeline.image_encoder)
    pipeline.image_encoder = None
    wp.save_pipeline(pipeline, tmp_path / "saved", overwrite=True)
    assert wp.load_pipeline(tmp_path / "saved").image_encoder is None


def test_readers_meanwhile_see_a_whole_pipeline(source, tmp_path):
    """While pipelines of two kinds replace each other, every file is of one of them, never of both."""
    place = tmp_path / "pipeline"
    kinds = [wp.load_pipeline(source, torch_dtype=dtype) for dtype in ("bfloat16", "float32")]
    wp.save_pipeline(kinds[0], place)
    expected = set()
    for number, one in enumerate(kinds):
        wp.save_pipeline(one, tmp_path / str(number))
        expected.add(sizes(tmp_path / str(number)))
    seen, done = set(), threading.Event()

    def look():
        while not done.is_set():
            handle = os.open(place, os.O_RDONLY)
            try:
                seen.add(sizes(f"/proc/self/fd/{handle}"))
            except FileNotFoundError:
                # The folder was replaced and is being removed.
                pass
            finally:
                os.close(handle)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for number in range(6):
            wp.save_pipeline(kinds[(number + 1) % 2], place, overwrite=True)
    finally:
        done.set()
        reader.join()
    assert seen
    assert seen <= expected


def sizes(folder):
    names = ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model")
    return tuple(os.stat(f"{folder}/{name}.safetensors").st_size for name in names)


def test_a_pipeline_is_no_model(source, tmp_path):
    with pytest.raises(ConfigError, match=r"StableDiffusionPipeline is a pipeline of models\n.*load_pipeline"):
        wp.from_pretrained(diffusers.StableDiffusionPipeline, source)
    with pytest.raises(ConfigError, match=r"StableDiffusionPipeline is a pipeline of models\n.*save_pipeline"):
        wp.save_pretrained(wp.load_pipeline(source), tmp_path / "saved")
