"""Converted transformers and pipelines in diffusers.

diffusers refuses bitsandbytes where there is no GPU; only that check is lifted here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import weightpack

FLUX = {
    "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 32,
    "num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 64, "axes_dims_rope": [8, 12, 12],
}  # fmt: skip
WAN = {
    "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "text_dim": 64,
    "freq_dim": 64, "ffn_dim": 128, "num_layers": 2,
}  # fmt: skip
UNET = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 32, "in_channels": 4, "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32, "norm_num_groups": 8,
}  # fmt: skip
MODELS = {
    "flux": ("FluxTransformer2DModel", FLUX),
    "wan": ("WanTransformer3DModel", WAN),
    "unet": ("UNet2DConditionModel", UNET),
}
OPTIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes:int8": {"load_in_8bit": True},
}


@pytest.fixture
def without_gpu_check(peer, monkeypatch):
    peer("bitsandbytes")
    quantizers = peer("diffusers.quantizers.bitsandbytes.bnb_quantizer")
    for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        cls = getattr(quantizers, name)
        monkeypatch.setattr(cls, "validate_environment", lambda self, *args, **options: None)
        monkeypatch.setattr(cls, "update_device_map", lambda self, device_map: {"": "cpu"})


def save(peer, folder: Path, name: str):
    torch, diffusers = peer("torch"), peer("diffusers")
    class_name, config = MODELS[name]
    torch.manual_seed(5)
    cls = getattr(diffusers, class_name)
    cls(**config).to(torch.bfloat16).save_pretrained(folder)
    return cls


@pytest.mark.parametrize("to", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_converted_transformer_is_the_one_diffusers_packs(peer, without_gpu_check, tmp_path, name, to):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls = save(peer, tmp_path / "source", name)
    weightpack.convert(tmp_path / "source", tmp_path / "out", to)
    ours = cls.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16).state_dict()
    config = diffusers.BitsAndBytesConfig(**OPTIONS[to])
    theirs = cls.from_pretrained(
        tmp_path / "source", quantization_config=config, torch_dtype=torch.bfloat16
    ).state_dict()
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(ours[key], tensor), key
    assert sum(tensor.dtype in (torch.uint8, torch.int8) for tensor in ours.values()) > 10


def test_a_transformer_reads_back_within_the_error_of_the_format(peer, tmp_path):
    save(peer, tmp_path / "source", "flux")
    report = weightpack.convert(tmp_path / "source", tmp_path / "out", "nf4")
    assert report.layers[""].startswith("diffusers ")
    difference = weightpack.diff(tmp_path / "source", tmp_path / "out")
    packed = [pair for pair in difference.tensors if pair.format_b == "bitsandbytes:nf4"]
    assert len(packed) == 34
    assert all(0.07 < pair.error.relative_rms < 0.1 for pair in packed)
    assert all(pair.error.noise == 0 for pair in difference.tensors if pair not in packed)


def test_diffusers_writes_the_same_config(peer, without_gpu_check, tmp_path):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls = save(peer, tmp_path / "source", "flux")
    weightpack.convert(tmp_path / "source", tmp_path / "out", "nf4")
    config = diffusers.BitsAndBytesConfig(
        **OPTIONS["nf4"], bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=[]
    )
    model = cls.from_pretrained(tmp_path / "source", quantization_config=config, torch_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = ((tmp_path / name / "config.json").read_text() for name in ("out", "theirs"))
    theirs = {key: value for key, value in json.loads(theirs).items() if key != "_name_or_path"}
    assert json.loads(ours) == theirs
    assert list(json.loads(ours)) == sorted(theirs)


def test_kept_layers_are_left_alone_and_no_others(peer, without_gpu_check, tmp_path):
    """`proj_out` at the top has the name of the layers that every single block ends in."""
    torch = peer("torch")
    cls = save(peer, tmp_path / "source", "flux")
    report = weightpack.convert(tmp_path / "source", tmp_path / "out", "nf4", keep=["^proj_out", "norm1.linear"])
    model = cls.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16)
    plain = {name for name, module in model.named_modules() if type(module).__name__ == "Linear"}
    assert plain == {
        "proj_out",
        "single_transformer_blocks.0.proj_out",
        "single_transformer_blocks.1.proj_out",
        "transformer_blocks.0.norm1.linear",
    }
    assert any("2 more layers are left unpacked" in warning for warning in report.warnings)


def test_shards_keep_a_weight_and_its_statistics_together(peer, without_gpu_check, tmp_path):
    torch = peer("torch")
    cls = save(peer, tmp_path / "source", "flux")
    weightpack.convert(tmp_path / "source", tmp_path / "one", "nf4")
    weightpack.convert(tmp_path / "source", tmp_path / "many", "nf4", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    one, many = (cls.from_pretrained(tmp_path / n, torch_dtype=torch.bfloat16).state_dict() for n in ("one", "many"))
    assert all(torch.equal(one[key], many[key]) for key in one)


@pytest.fixture
def pipeline(peer, tmp_path) -> Path:
    """A tiny Flux pipeline: transformer, VAE, text encoder and scheduler."""
    torch, diffusers, transformers = peer("torch"), peer("diffusers"), peer("transformers")
    torch.manual_seed(7)
    clip = transformers.CLIPTextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    made = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8),
        text_encoder=transformers.CLIPTextModel(clip).to(torch.bfloat16),
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=diffusers.FluxTransformer2DModel(**FLUX).to(torch.bfloat16),
    )
    made.save_pretrained(tmp_path / "pipeline")
    (tmp_path / "pipeline" / "README.md").write_text("tiny")
    (tmp_path / "pipeline" / "all_in_one.safetensors").write_bytes(b"left out")
    return tmp_path / "pipeline"


def test_a_pipeline_is_converted_component_by_component(peer, without_gpu_check, pipeline, tmp_path):
    torch, diffusers, bnb = peer("torch"), peer("diffusers"), peer("bitsandbytes")
    report = weightpack.convert(pipeline, tmp_path / "out", "nf4")
    assert set(report.layers) == {"text_encoder", "transformer"}
    assert {t.name.split("/")[0] for t in report.tensors} == {"text_encoder", "transformer"}
    assert report.left_out == ("all_in_one.safetensors",)
    for path in pipeline.rglob("*"):
        relative = path.relative_to(pipeline)
        if path.is_file() and relative.parts[0] not in ("text_encoder", "transformer", "all_in_one.safetensors"):
            assert (tmp_path / "out" / relative).read_bytes() == path.read_bytes()
    made = diffusers.FluxPipeline.from_pretrained(
        tmp_path / "out", torch_dtype=torch.bfloat16, tokenizer=None, text_encoder_2=None, tokenizer_2=None
    )
    for component in (made.transformer, made.text_encoder):
        kinds = {type(module).__name__ for module in component.modules()}
        assert "Linear4bit" in kinds
        assert "Linear" not in kinds
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in made.vae.modules())
    info = weightpack.inspect(tmp_path / "out")
    assert info.problems == ()
    assert weightpack.diff(pipeline, tmp_path / "out").is_complete


def test_components_are_chosen(peer, pipeline, tmp_path):
    report = weightpack.convert(pipeline, tmp_path / "one", "nf4", components="transformer", layers="names")
    assert set(report.layers) == {"transformer"}
    source = pipeline / "text_encoder" / "model.safetensors"
    assert (tmp_path / "one" / "text_encoder" / "model.safetensors").read_bytes() == source.read_bytes()
    with pytest.raises(weightpack.ConfigError, match='no component "unet" with weights'):
        weightpack.convert(pipeline, tmp_path / "two", "nf4", components=["unet"])
    cast = weightpack.convert(pipeline, tmp_path / "cast", "f32")
    assert {t.name.split("/")[0] for t in cast.tensors} == {"text_encoder", "transformer", "vae"}


def test_a_pipeline_in_gguf_has_one_file_per_component(peer, pipeline, tmp_path):
    gguf = peer("gguf")
    weightpack.convert(pipeline, tmp_path / "out", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.gguf")
    assert reader.fields["general.architecture"].contents() == "flux"
    assert (tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    with pytest.raises(weightpack.ConfigError, match="the destination is one file"):
        weightpack.convert(pipeline, tmp_path / "out.gguf", "q8_0")
