"""Models of diffusers loaded by weightpack, against diffusers' own loader."""

from __future__ import annotations

import json

import pytest

import weightpack as wp
from weightpack.errors import CheckpointError, ConfigError

from .tiny_diffusers import CONFIGS, assert_same_state, lift_gpu_check, make, run, save

MODELS = ("flux", "sd3", "dit", "wan", "unet", "vae")
DTYPES = (None, "bfloat16", "float16")


@pytest.mark.parametrize("name", MODELS)
def test_models_are_those_of_diffusers(peer, tmp_path, name):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls = save(name, diffusers, tmp_path, dtype=torch.bfloat16)
    for dtype in DTYPES:
        dtype = dtype and getattr(torch, dtype)
        theirs = cls.from_pretrained(tmp_path, torch_dtype=dtype)
        ours = wp.from_pretrained(cls, tmp_path, torch_dtype=dtype)
        assert type(ours) is cls
        assert not ours.training
        assert_same_state(ours, theirs)
        buffers = dict(theirs.named_buffers())
        assert buffers.keys() == dict(ours.named_buffers()).keys()
        for key, buffer in ours.named_buffers():
            assert torch.equal(buffer, buffers[key])
            assert buffer.dtype == buffers[key].dtype
        if dtype != torch.float16:
            assert torch.equal(run(name, ours), run(name, theirs))
        if name == "wan" and dtype is not None:
            assert ours.scale_shift_table.dtype == torch.float32


def test_the_stored_type_is_kept_on_request(peer, tmp_path):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls = save("dit", diffusers, tmp_path, dtype=torch.bfloat16)
    assert wp.from_pretrained(cls, tmp_path, torch_dtype="auto").dtype == torch.bfloat16
    assert wp.from_pretrained(cls, tmp_path).dtype == torch.float32


@pytest.mark.parametrize("case", ["sharded", "variant", "sharded variant", "subfolder"])
def test_layouts_of_folders(peer, tmp_path, case):
    torch, diffusers = peer("torch"), peer("diffusers")
    subfolder = "transformer" if case == "subfolder" else None
    variant = "fp16" if "variant" in case else None
    options = {"variant": variant, "max_shard_size": "100KB" if "sharded" in case else "1GB"}
    cls = save("flux", diffusers, tmp_path / (subfolder or ""), dtype=torch.float16, **options)
    chosen = {"variant": variant, "subfolder": subfolder, "torch_dtype": torch.bfloat16}
    assert_same_state(wp.from_pretrained(cls, tmp_path, **chosen), cls.from_pretrained(tmp_path, **chosen))
    if "sharded" in case:
        assert len(list(tmp_path.glob("*.safetensors"))) > 3


def test_auto_model_gives_way_to_the_class_of_the_config(peer, tmp_path):
    diffusers = peer("diffusers")
    cls = save("unet", diffusers, tmp_path)
    assert type(wp.from_pretrained(diffusers.AutoModel, tmp_path)) is cls
    config = json.loads((tmp_path / "config.json").read_text())
    for name, message in (("NoSuchModel", "no model class NoSuchModel"), (None, "has no _class_name")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": name} if name else {"a": 1}))
        with pytest.raises(ConfigError, match=message):
            wp.from_pretrained(diffusers.AutoModel, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="transformers"):
        wp.from_pretrained(diffusers.AutoModel, tmp_path)


def test_an_old_class_gives_way_to_its_successor(peer, tmp_path):
    diffusers = peer("diffusers")
    cls = save("dit", diffusers, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    assert type(wp.from_pretrained(diffusers.Transformer2DModel, tmp_path)) is cls
    assert type(wp.from_pretrained(diffusers.AutoModel, tmp_path)) is cls


def test_keys_of_old_attention_blocks(peer, tmp_path):
    torch, diffusers = peer("torch"), peer("diffusers")
    from safetensors.torch import load_file, save_file

    cls = save("vae", diffusers, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    renamed = {}
    for key, tensor in load_file(file).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{new}.", f".{old}.")
        renamed[key] = tensor
    assert sum(".query." in key for key in renamed) > 1
    save_file(renamed, file, metadata={"format": "pt"})
    ours = wp.from_pretrained(cls, tmp_path)
    assert_same_state(ours, make("vae", diffusers))
    assert torch.equal(run("vae", ours), run("vae", cls.from_pretrained(tmp_path)))


def test_keys_that_a_class_passes_over(peer, tmp_path, recwarn):
    torch, diffusers = peer("torch"), peer("diffusers")
    from safetensors.torch import load_file, save_file

    cls = save("wan", diffusers, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    extra = {"blocks.0.attn2.norm_added_q.weight": torch.ones(64)}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    _, info = wp.from_pretrained(cls, tmp_path, output_loading_info=True)
    assert not info.unexpected
    assert not [warning for warning in recwarn if "norm_added_q" in str(warning.message)]


def test_configs_keep_what_the_class_does_not_know_and_no_local_path(peer, tmp_path):
    diffusers = peer("diffusers")
    cls = save("dit", diffusers, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    for name in (str(tmp_path / "elsewhere"), "owner/model"):
        config = {**json.loads(file.read_text()), "later_addition": 3, "_name_or_path": name}
        file.write_text(json.dumps(config))
        model = wp.from_pretrained(cls, tmp_path / "model")
        assert model.config["later_addition"] == 3
        model.save_pretrained(tmp_path / "again")
        saved = json.loads((tmp_path / "again" / "config.json").read_text())
        assert saved["later_addition"] == 3
        assert str(tmp_path) not in json.dumps(saved)
        assert saved.get("_name_or_path") == ("owner/model" if name == "owner/model" else None)


@pytest.mark.parametrize("packed", [False, True])
def test_layers_of_ones_own_class_that_share_a_weight(peer, tmp_path, packed):
    torch, diffusers = peer("torch"), peer("diffusers")
    from safetensors.torch import save_file

    class Shared(diffusers.ModelMixin, diffusers.ConfigMixin):
        config_name = "config.json"

        @peer("diffusers.configuration_utils").register_to_config
        def __init__(self, width: int = 4):
            super().__init__()
            self.first = torch.nn.Linear(width, width, bias=False)
            self.other = torch.nn.Linear(width, width, bias=False)
            self.second = torch.nn.Linear(width, width, bias=False)
            self.second.weight = self.first.weight

    model = Shared(width=64)
    model.save_config(tmp_path)
    tensors = {"first.weight": model.first.weight.detach(), "other.weight": model.other.weight.detach()}
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    config = wp.BitsAndBytesConfig(load_in_8bit=True) if packed else None
    loaded, info = wp.from_pretrained(Shared, tmp_path, quantization_config=config, output_loading_info=True)
    assert not info.missing
    assert loaded.second.weight is loaded.first.weight
    assert torch.equal(loaded.second.weight.float(), model.second.weight.to(loaded.second.weight.dtype).float())
    assert (loaded.other.weight.dtype == torch.int8) is packed


def test_a_class_that_does_not_say_what_stays_together(peer, tmp_path):
    diffusers = peer("diffusers")
    cls = save("dit", diffusers, tmp_path)
    cls._no_split_modules, before = None, cls._no_split_modules
    try:
        with pytest.raises(ConfigError, match="does not say which of its modules"):
            wp.from_pretrained(cls, tmp_path, device_map="auto")
    finally:
        cls._no_split_modules = before


def test_a_file_of_another_model_is_refused(peer, tmp_path):
    diffusers = peer("diffusers")
    save("dit", diffusers, tmp_path)
    other = {**CONFIGS["dit"][1], "attention_head_dim": 16, "_class_name": "DiTTransformer2DModel"}
    with pytest.raises(CheckpointError, match="has shape"):
        wp.from_pretrained(diffusers.DiTTransformer2DModel, tmp_path, config=other)


QUANTIZED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "double quant": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", QUANTIZED)
@pytest.mark.parametrize("name", ["flux", "unet", "wan"])
def test_bitsandbytes_models_are_those_of_diffusers(peer, monkeypatch, tmp_path, name, case, dtype):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls = save(name, diffusers, tmp_path, dtype=torch.bfloat16)
    dtype = dtype and getattr(torch, dtype)
    ours = wp.from_pretrained(
        cls, tmp_path, torch_dtype=dtype, quantization_config=wp.BitsAndBytesConfig(**QUANTIZED[case])
    )
    lift_gpu_check(peer, monkeypatch)
    config = diffusers.BitsAndBytesConfig(**QUANTIZED[case])
    theirs = cls.from_pretrained(tmp_path, torch_dtype=dtype, quantization_config=config)
    assert_same_state(ours, theirs)
    assert ours.is_quantized
    assert ours.quantization_method == theirs.quantization_method
    assert isinstance(ours.hf_quantizer, peer("diffusers.quantizers.base").DiffusersQuantizer)
    assert ours.config._pre_quantization_dtype == theirs.config._pre_quantization_dtype
    assert ours.num_parameters() == theirs.num_parameters()


def test_a_packed_model_is_saved_by_diffusers_itself(peer, monkeypatch, tmp_path):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls = save("flux", diffusers, tmp_path / "source", dtype=torch.bfloat16)
    config = wp.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    ours = wp.from_pretrained(cls, tmp_path / "source", torch_dtype=torch.bfloat16, quantization_config=config)
    ours.save_pretrained(tmp_path / "packed")
    saved = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert saved["quantization_config"] == config.to_dict()
    assert_same_state(wp.from_pretrained(cls, tmp_path / "packed", torch_dtype=torch.bfloat16), ours)
    lift_gpu_check(peer, monkeypatch)
    assert_same_state(cls.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16), ours)
