"""torchao and quanto checkpoints that `weightpack.convert` writes, in unmodified hosts: the same tensors, metadata
and config as a model that the host itself packed and saved, and the same outputs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

import weightpack as wp
from weightpack.errors import ConfigError, UnsupportedError

from .tiny_diffusers import make, run, save

TORCHAO = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}


def stored(path: Path):
    """Tensors and metadata of one safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if not key.startswith("weightpack.")}
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118


def assert_same_file(torch, ours: Path, theirs: Path) -> None:
    """The order of tensors is that of the source in one, of the model in the other."""
    (tensors, metadata), (expected, told) = stored(ours), stored(theirs)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert tensors[name].shape == tensor.shape, name
        assert torch.equal(tensors[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    listed = [json.loads(one.pop("tensor_names", "[]")) for one in (metadata, told)]
    assert sorted(listed[0]) == sorted(listed[1])
    assert metadata == told


def section(folder: Path):
    return json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]


def quantizations(form: str):
    import torchao.quantization

    return getattr(torchao.quantization, TORCHAO[form])()


def llama(transformers, torch, folder: Path, dtype):
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0
    model.save_pretrained(folder)
    return type(model), torch.arange(12)[None]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", TORCHAO)
def test_torchao_in_transformers(peer, tmp_path, form, dtype):
    torch, transformers, _ = peer("torch"), peer("transformers"), peer("torchao")
    dtype = getattr(torch, dtype)
    cls, ids = llama(transformers, torch, tmp_path / "source", dtype)
    wp.convert(tmp_path / "source", tmp_path / "ours", f"torchao:{form}")
    config = transformers.TorchAoConfig(quantizations(form))
    theirs = cls.from_pretrained(tmp_path / "source", quantization_config=config, dtype=dtype)
    if form == "float8":
        # A row of zeros is NaN there.
        settle(torch, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_file(torch, tmp_path / "ours/model.safetensors", tmp_path / "theirs/model.safetensors")
    assert section(tmp_path / "ours") == section(tmp_path / "theirs")
    loaded = cls.from_pretrained(tmp_path / "ours", dtype=dtype)
    assert type(loaded.model.layers[0].mlp.up_proj.weight).__name__ == f"{form.capitalize()}Tensor"
    assert torch.equal(loaded(ids).logits, theirs(ids).logits)
    assert torch.equal(wp.from_pretrained(cls, tmp_path / "ours", torch_dtype=dtype)(ids).logits, theirs(ids).logits)


def settle(torch, model):
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ == "Float8Tensor":
            empty = weight.scale == 0
            weight.qdata.view(torch.uint8).masked_fill_(empty, 0)
            weight.scale.masked_fill_(empty, torch.finfo(torch.float32).smallest_normal)


@pytest.mark.parametrize("form", TORCHAO)
def test_layers_that_are_kept_and_shards(peer, tmp_path, form):
    torch, transformers, _ = peer("torch"), peer("transformers"), peer("torchao")
    cls, ids = llama(transformers, torch, tmp_path / "source", torch.bfloat16)
    kept = r"layers\.0\.mlp\.down_proj|q_proj"
    report = wp.convert(tmp_path / "source", tmp_path / "ours", f"torchao:{form}", keep=[kept], max_shard_size="30KB")
    assert not report.warnings
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert not wp.inspect(tmp_path / "ours").problems
    loaded = cls.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    assert type(loaded.model.layers[0].mlp.down_proj.weight) is torch.nn.Parameter
    assert type(loaded.model.layers[1].mlp.down_proj.weight).__name__ == f"{form.capitalize()}Tensor"
    again = wp.from_pretrained(cls, tmp_path / "ours")
    assert torch.equal(loaded(ids).logits, again(ids).logits)


def test_packed_checkpoints_are_sources(peer, tmp_path):
    torch, transformers, _ = peer("torch"), peer("transformers"), peer("torchao")
    llama(transformers, torch, tmp_path / "source", torch.bfloat16)
    wp.convert(tmp_path / "source", tmp_path / "int8", "torchao:int8")
    info = wp.inspect(tmp_path / "int8")
    assert not info.problems
    assert info.method == "torchao"
    assert info.formats["torchao:int8"]["tensors"] == 14
    # Copied, with the metadata that belongs to it.
    wp.convert(tmp_path / "int8", tmp_path / "again", "torchao:int8")
    assert_same_file(torch, tmp_path / "again/model.safetensors", tmp_path / "int8/model.safetensors")
    assert section(tmp_path / "again") == section(tmp_path / "int8")
    # Decoded, and no word left of what it was.
    wp.convert(tmp_path / "int8", tmp_path / "plain", "bf16")
    tensors, metadata = stored(tmp_path / "plain/model.safetensors")
    assert metadata == {"format": "pt"}
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text("utf-8"))
    assert not any("_weight_" in name for name in tensors)
    with wp.open_checkpoint(tmp_path / "int8") as packed, wp.open_checkpoint(tmp_path / "plain") as plain:
        name = "model.layers.1.mlp.up_proj.weight"
        assert packed.read(name).tobytes() == plain.read(name).tobytes()
    assert wp.diff(tmp_path / "source", tmp_path / "plain").error.snr_db > 30
    # Into another format.
    wp.convert(tmp_path / "int8", tmp_path / "float8", "torchao:float8")
    assert wp.inspect(tmp_path / "float8").formats["torchao:float8"]["tensors"] == 14


def test_gguf_is_a_source(peer, tmp_path):
    torch, transformers, _ = peer("torch"), peer("transformers"), peer("torchao")
    llama(transformers, torch, tmp_path / "source", torch.bfloat16)
    wp.convert(tmp_path / "source", tmp_path / "model.gguf", "f16")
    out = tmp_path / "host"
    wp.convert(tmp_path / "model.gguf", out, "torchao:int8", names="host")
    (out / "config.json").write_text((tmp_path / "source/config.json").read_text("utf-8"))
    assert wp.inspect(out).formats["torchao:int8"]["tensors"] == 14


def test_formats_that_are_not_decoded_are_refused(peer, tmp_path):
    torch, transformers, _ = peer("torch"), peer("transformers"), peer("torchao")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    cls, _ = llama(transformers, torch, tmp_path / "source", torch.bfloat16)
    config = transformers.TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    cls.from_pretrained(tmp_path / "source", quantization_config=config).save_pretrained(tmp_path / "dynamic")
    with pytest.raises(UnsupportedError, match='packed by "torchao" in a format that is not decoded'):
        wp.convert(tmp_path / "dynamic", tmp_path / "plain", "bf16")
    assert any("of torchao without a packed weight" in one for one in wp.inspect(tmp_path / "dynamic").problems)


def test_one_format_for_a_checkpoint(peer, tmp_path):
    torch, transformers = peer("torch"), peer("transformers")
    llama(transformers, torch, tmp_path / "source", torch.bfloat16)
    for mixed in (["q_proj=torchao:float8"], ["q_proj=bitsandbytes:nf4"]):
        with pytest.raises(ConfigError):
            wp.convert(tmp_path / "source", tmp_path / "ours", "torchao:int8", assign=mixed)


@pytest.mark.parametrize("form", TORCHAO)
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_torchao_in_diffusers(peer, tmp_path, name, form):
    torch, diffusers, _ = peer("torch"), peer("diffusers"), peer("torchao")
    cls = save(name, diffusers, tmp_path / "source", dtype=torch.bfloat16)
    wp.convert(tmp_path / "source", tmp_path / "ours", f"torchao:{form}")
    config = diffusers.TorchAoConfig(quantizations(form))
    theirs = cls.from_pretrained(tmp_path / "source", quantization_config=config, torch_dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    file = "diffusion_pytorch_model.safetensors"
    assert_same_file(torch, tmp_path / "ours" / file, tmp_path / "theirs" / file)
    assert section(tmp_path / "ours") == section(tmp_path / "theirs")
    loaded = cls.from_pretrained(tmp_path / "ours", torch_dtype=torch.bfloat16)
    assert torch.equal(run(name, loaded), run(name, theirs))
    ours = wp.from_pretrained(cls, tmp_path / "ours", torch_dtype=torch.bfloat16)
    assert torch.equal(run(name, ours), run(name, theirs))


@pytest.mark.filterwarnings("ignore:.*[Qq]uanto.* is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "form"), [("flux", "int8"), ("sd3", "float8"), ("flux", "int4"), ("sd3", "int2")])
def test_quanto_in_diffusers(peer, tmp_path, monkeypatch, name, form):
    """In float32: torch's int8 kernel for bfloat16 reads beyond small weights that quanto hands it."""
    torch, diffusers, _ = peer("torch"), peer("diffusers"), peer("optimum.quanto")
    unpack_without_compiler(monkeypatch)
    cls = save(name, diffusers, tmp_path / "source", dtype=torch.float32)
    wp.convert(tmp_path / "source", tmp_path / "ours", f"quanto:{form}")
    theirs = cls.from_pretrained(
        tmp_path / "source", quantization_config=diffusers.QuantoConfig(form), torch_dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "theirs")
    file = "diffusion_pytorch_model.safetensors"
    assert_same_file(torch, tmp_path / "ours" / file, tmp_path / "theirs" / file)
    assert section(tmp_path / "ours") == section(tmp_path / "theirs")
    loaded = cls.from_pretrained(tmp_path / "ours", torch_dtype=torch.float32)
    assert torch.equal(run(name, loaded), run(name, theirs))
    ours = wp.from_pretrained(cls, tmp_path / "ours", torch_dtype=torch.float32)
    assert torch.equal(run(name, ours), run(name, theirs))


@pytest.mark.filterwarnings("ignore:.*[Qq]uanto.* is deprecated:FutureWarning")
def test_layers_of_one_name_are_kept_together(peer, tmp_path):
    torch, diffusers, _ = peer("torch"), peer("diffusers"), peer("optimum.quanto")
    cls = save("flux", diffusers, tmp_path / "source", dtype=torch.float32)
    report = wp.convert(tmp_path / "source", tmp_path / "ours", "quanto:int8", keep=[r"^proj_out"])
    assert section(tmp_path / "ours")["modules_to_not_convert"] == ["proj_out"]
    assert any("2 more layers are left unpacked" in warning for warning in report.warnings)
    loaded = cls.from_pretrained(tmp_path / "ours", torch_dtype=torch.float32)
    source = make("flux", diffusers, dtype=torch.float32)
    assert torch.equal(loaded.proj_out.weight, source.proj_out.weight)
    assert torch.isfinite(run("flux", loaded)).all()
    ours = wp.from_pretrained(cls, tmp_path / "ours", torch_dtype=torch.float32)
    assert torch.equal(run("flux", ours), run("flux", loaded))


def unpack_without_compiler(monkeypatch):
    from tests.quantizers.quanto_models import with_library_unpack

    with_library_unpack(monkeypatch)


@pytest.mark.parametrize(("form", "snr_db"), [("int8", 25), ("float8", 25), ("int4", 18), ("int2", 2)])
def test_quanto_loads_language_models_itself(peer, tmp_path, monkeypatch, form, snr_db):
    torch, transformers, quanto = peer("torch"), peer("transformers"), peer("optimum.quanto")
    unpack_without_compiler(monkeypatch)
    cls, ids = llama(transformers, torch, tmp_path / "source", torch.float32)
    wp.convert(tmp_path / "source", tmp_path / "ours", f"quanto:{form}")
    loaded = wp.from_pretrained(cls, tmp_path / "ours", torch_dtype=torch.float32)
    assert wp.inspect(tmp_path / "ours").formats[f"quanto:{form}"]["tensors"] == 14
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = quanto.QuantizedModelForCausalLM.from_pretrained(str(tmp_path / "ours"))
        assert torch.equal(loaded(ids).logits, theirs(ids).logits)
    wp.convert(tmp_path / "ours", tmp_path / "plain", "bf16")
    assert wp.diff(tmp_path / "source", tmp_path / "plain").error.snr_db > snr_db
    assert not (tmp_path / "plain/quanto_qmap.json").exists()
