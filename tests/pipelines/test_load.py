"""Pipelines loaded by weightpack: packed on the way, run on the CPU."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest

from tests.conftest import find_peer

torch = find_peer("torch")
diffusers = find_peer("diffusers")
find_peer("transformers")

import numpy as np  # noqa: E402

import weightpack as wp  # noqa: E402
from tests.loading.test_hub import put_in_cache  # noqa: E402
from tests.pipelines import tiny  # noqa: E402
from tests.quantizers.test_contract import storage  # noqa: E402
from weightpack.errors import CheckpointError, ConfigError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
MODELS = ("unet", "text_encoder", "vae")
BACKENDS = {
    "bitsandbytes_4bit": ("bitsandbytes", {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}, 0.2),
    "bitsandbytes_8bit": ("bitsandbytes", {"load_in_8bit": True}, 0.05),
    "gguf": (None, {"quant_type": "q8_0"}, 0.05),
    "quanto": ("optimum.quanto", {"weights_dtype": "int8"}, 0.05),
    "torchao": ("torchao", {"quant_type": "int8"}, 0.05),
    "modelopt": ("modelopt", {"quant_type": "FP8"}, 0.1),
}
"""What each needs, the fields of its config, and how far images may be off."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "pipeline"
    pipeline = tiny.save(folder, torch.bfloat16)
    return folder, tiny.image(pipeline)


def packed(pipeline):
    """The number of packed layers of each model."""
    found = {name: wp.quantizer_of(getattr(pipeline, name)) for name in MODELS}
    return {name: len(quantizer.quantized) for name, quantizer in found.items() if quantizer is not None}


def distance(found, wanted):
    """Relative to how much the wanted image varies."""
    return float(np.abs(found - wanted).mean() / wanted.std())


def test_a_plain_pipeline_is_what_diffusers_loads(source):
    folder, wanted = source
    pipeline = wp.load_pipeline(folder, torch_dtype="bfloat16")
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert type(pipeline) is type(theirs)
    own, other = dict(pipeline.config), dict(theirs.config)
    assert other.pop("_name_or_path")
    assert own == other
    assert not hasattr(pipeline, "quantization_config")
    for name in MODELS:
        assert storage(getattr(pipeline, name)) == storage(getattr(theirs, name))
    assert pipeline.safety_checker is None
    assert pipeline.device.type == "cpu"
    assert np.array_equal(tiny.image(pipeline), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_packs_a_pipeline(source, peer, backend):
    needs, kwargs, bound = BACKENDS[backend]
    if needs is not None:
        peer(needs)
    folder, wanted = source
    config = wp.PipelineQuantizationConfig(backend, kwargs)
    pipeline = wp.load_pipeline(folder, quantization_config=config, torch_dtype="bfloat16")
    assert pipeline.quantization_config is config
    found = packed(pipeline)
    assert set(found) == {"unet", "text_encoder"}
    assert found["text_encoder"] == 12
    assert wp.quantizer_of(pipeline.unet).name == backend
    image = tiny.image(pipeline)
    assert 0 < distance(image, wanted) < bound
    assert np.array_equal(tiny.image(pipeline.to("cpu")), image)


def test_each_component_its_own_config(source, peer):
    torchao, transformers = peer("torchao.quantization"), peer("transformers")
    peer("bitsandbytes")
    folder, wanted = source
    # diffusers fails with a config of one host for a model of the other.
    mapping = {
        "text_encoder": diffusers.TorchAoConfig(torchao.Int8WeightOnlyConfig()),
        "unet": transformers.BitsAndBytesConfig(load_in_8bit=True),
    }
    for config in (
        wp.PipelineQuantizationConfig(quant_mapping=mapping),
        diffusers.PipelineQuantizationConfig(quant_mapping=mapping),
    ):
        pipeline = wp.load_pipeline(folder, quantization_config=config, torch_dtype=torch.bfloat16)
        names = {name: wp.quantizer_of(getattr(pipeline, name)) for name in MODELS}
        assert names["unet"].name == "bitsandbytes_8bit"
        assert names["text_encoder"].name == "torchao"
        assert names["vae"] is None
        assert distance(tiny.image(pipeline), wanted) < 0.05


def test_named_components_alone_are_packed(source):
    folder, _ = source
    config = wp.PipelineQuantizationConfig("gguf", {"quant_type": "q8_0"}, ["vae", "unet"])
    found = packed(wp.load_pipeline(folder, quantization_config=config))
    assert set(found) == {"unet", "vae"}
    assert found["vae"] == 8


def test_what_is_packed_already_stays_so(source, tmp_path, peer):
    peer("torchao")
    peer("bitsandbytes")
    folder = shutil.copytree(source[0], tmp_path / "mixed")
    one = wp.load_pipeline(
        folder, quantization_config=wp.PipelineQuantizationConfig("torchao", {"quant_type": "int8"}, "unet")
    )
    one.unet.save_pretrained(folder / "unet")
    eight = wp.PipelineQuantizationConfig("bitsandbytes_8bit", {"load_in_8bit": True})
    pipeline = wp.load_pipeline(folder, quantization_config=eight)
    assert wp.quantizer_of(pipeline.unet).name == "torchao"
    assert wp.quantizer_of(pipeline.text_encoder).name == "bitsandbytes_8bit"
    named = wp.PipelineQuantizationConfig("bitsandbytes_8bit", {"load_in_8bit": True}, "unet")
    with pytest.raises(ConfigError, match="unet: the model is packed for torchao"):
        wp.load_pipeline(folder, quantization_config=named)


def test_types_for_all_and_for_each(source):
    folder, _ = source
    for given, expected in (
        (None, ("float32", "float32", "float32")),
        ("auto", ("bfloat16", "bfloat16", "bfloat16")),
        (torch.float16, ("float16", "float16", "float16")),
        ({"unet": "bfloat16"}, ("bfloat16", "float32", "float32")),
        ({"unet": torch.float16, "default": "bfloat16"}, ("float16", "bfloat16", "bfloat16")),
    ):
        pipeline = wp.load_pipeline(folder, torch_dtype=given)
        found = [str(getattr(pipeline, name).dtype).removeprefix("torch.") for name in MODELS]
        if given is None:
            # What each host does by itself: transformers takes the stored type.
            expected = ("float32", "bfloat16", "float32")
        assert tuple(found) == expected, given


def test_one_device_or_a_map_for_each(source):
    folder, wanted = source
    assert np.array_equal(tiny.image(wp.load_pipeline(folder, torch_dtype="bfloat16", device_map="cpu")), wanted)
    pipeline = wp.load_pipeline(folder, torch_dtype="bfloat16", device_map={"unet": {"": "cpu"}, "vae": "cpu"})
    assert np.array_equal(tiny.image(pipeline), wanted)
    for refused, told in (
        ("balanced", 'device_map "balanced" spreads one model'),
        ({"unet": "cpu", "scheduler": "cpu"}, 'device_map names "scheduler"'),
        ({"": "cpu"}, 'device_map names ""'),
        ("gpu", "device_map 'gpu' is none of"),
    ):
        with pytest.raises(ConfigError, match=told):
            wp.load_pipeline(folder, device_map=refused)


def test_parts_that_are_there_already(source):
    folder, _ = source
    unet = wp.from_pretrained(diffusers.UNet2DConditionModel, folder, subfolder="unet", torch_dtype="bfloat16")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = wp.load_pipeline(folder, torch_dtype="bfloat16", unet=unet, scheduler=scheduler, vae=None)
    assert pipeline.unet is unet
    assert pipeline.scheduler is scheduler
    assert pipeline.vae is None
    assert wp.load_pipeline(folder, requires_safety_checker=True).config.requires_safety_checker
    with pytest.raises(ConfigError, match=r"StableDiffusionPipeline has no component or option transformer\n.*unet"):
        wp.load_pipeline(folder, transformer=unet)
    config = wp.PipelineQuantizationConfig("gguf", {"quant_type": "q8_0"}, "unet")
    with pytest.raises(ConfigError, match='names "unet", which is no model that is loaded here'):
        wp.load_pipeline(folder, quantization_config=config, unet=unet)


def test_another_class_with_the_same_parts(source):
    folder, _ = source
    pipeline = wp.load_pipeline(folder, pipeline_class=diffusers.StableDiffusionImg2ImgPipeline)
    assert type(pipeline) is diffusers.StableDiffusionImg2ImgPipeline
    with pytest.raises(ConfigError, match=r"DiTPipeline needs transformer.*\n.*transformer=..."):
        wp.load_pipeline(folder, pipeline_class=diffusers.DiTPipeline)


def test_variants_where_there_are_some(source, tmp_path):
    folder, wanted = source
    copy = shutil.copytree(folder, tmp_path / "variants")
    weights = "diffusion_pytorch_model.safetensors"
    (copy / "unet" / weights).rename(copy / "unet" / weights.replace("model", "model.fp16"))
    pipeline = wp.load_pipeline(copy, torch_dtype="bfloat16", variant="fp16")
    assert np.array_equal(tiny.image(pipeline), wanted)
    with pytest.raises(CheckpointError, match='weights of variant "fp8"'):
        wp.load_pipeline(folder, variant="fp8")


class Extractor:
    """Something that diffusers does not know, and that can be saved."""

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True)
        Path(folder, "extractor.json").write_text("{}")


def test_a_safety_checker_is_a_model_of_transformers(tmp_path, source):
    folder = shutil.copytree(source[0], tmp_path / "checked")
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**size, "image_size": 32, "patch_size": 16},
        text_config={**size, "vocab_size": 32},
        projection_dim=16,
    )
    checker = StableDiffusionSafetyChecker(config)
    checker.save_pretrained(folder / "safety_checker")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    config = wp.PipelineQuantizationConfig("gguf", {"quant_type": "q8_0"})
    pipeline = wp.load_pipeline(folder, quantization_config=config, feature_extractor=Extractor())
    assert wp.quantizer_of(pipeline.safety_checker) is None
    assert storage(pipeline.safety_checker) == storage(checker)
    wp.save_pipeline(wp.load_pipeline(folder, feature_extractor=Extractor()), tmp_path / "saved")
    again = wp.load_pipeline(tmp_path / "saved", feature_extractor=Extractor())
    assert storage(again.safety_checker) == storage(checker)


def test_what_cannot_be_a_pipeline(source, tmp_path):
    with pytest.raises(CheckpointError, match="is no pipeline"):
        wp.load_pipeline(source[0] / "unet")

    def changed(**fields):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(source[0], folder)
        index = {**json.loads((folder / "model_index.json").read_text()), **fields}
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    for folder, told in (
        (changed(_class_name="NoPipeline"), "has no pipeline class NoPipeline"),
        (changed(_class_name="UNet2DConditionModel"), "has no pipeline class UNet2DConditionModel"),
        (changed(_class_name=["mine", "Mine"]), "code of its own, which is not run"),
        (changed(unet=["diffusers", "NoModel"]), "unet: diffusers has no class NoModel"),
        (changed(unet=["evil_module", "Model"]), 'unet: Model comes from "evil_module", which is not imported'),
        (changed(scheduler=["diffusers", None]), 'no library and class for "scheduler"'),
        (changed(image_encoder=["transformers", "CLIPVisionModel"]), 'has no folder "image_encoder"'),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=told):
            wp.load_pipeline(folder)
    damaged = changed()
    (damaged / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        wp.load_pipeline(damaged)
    missing = changed()
    (missing / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"vae: folder .* holds no weights"):
        wp.load_pipeline(missing)


def test_progress_names_the_component(source):
    told = []
    wp.load_pipeline(source[0], on_progress=lambda *one: told.append(one))
    last = {}
    order = []
    for done, total, name in told:
        assert done <= total
        component = name.partition("/")[0]
        last[component] = done == total
        if component not in order[-1:]:
            order.append(component)
    assert last == dict.fromkeys(MODELS, True)
    # One after the other: each is there once.
    assert sorted(order) == sorted(MODELS)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_pipeline_out_of_the_hubs_cache(source, tmp_path, peer, variant):
    peer("huggingface_hub")
    put_in_cache(tmp_path / "cache", source[0], "owner/pipeline")
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    if variant is not None:
        snapshot = next((tmp_path / "cache").glob("*/snapshots/*"))
        weights = snapshot / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    pipeline = wp.load_pipeline("owner/pipeline", torch_dtype="bfloat16", variant=variant, **options)
    assert np.array_equal(tiny.image(pipeline), source[1])
    with pytest.raises(CheckpointError, match='"owner/none" is no folder here'):
        wp.load_pipeline("owner/none", **options)


@pytest.mark.parametrize(("to", "backend"), [("nf4", "bitsandbytes_4bit"), ("q8_0", "gguf")])
def test_a_converted_pipeline(source, tmp_path, peer, to, backend):
    config = None
    if backend == "gguf":
        # GGUF files say nothing of how they are to be run.
        config = wp.PipelineQuantizationConfig("gguf", {"compute_dtype": "bfloat16"})
    else:
        peer("bitsandbytes")
    wp.convert(source[0], tmp_path / "converted", to=to)
    pipeline = wp.load_pipeline(tmp_path / "converted", torch_dtype="bfloat16", quantization_config=config)
    assert wp.quantizer_of(pipeline.unet).name == wp.quantizer_of(pipeline.text_encoder).name == backend
    assert distance(tiny.image(pipeline), source[1]) < 0.2


def test_no_warning_is_ours(source):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wp.load_pipeline(source[0], quantization_config=wp.PipelineQuantizationConfig("gguf", {"quant_type": "q8_0"}))
    assert not [one for one in caught if "weightpack" in one.filename]
