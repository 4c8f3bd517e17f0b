"""Checkpoints of torchao's block floats that `weightpack.convert` writes, in unmodified hosts: the same tensors,
metadata and config as a model that the host itself packed and saved. Layers of nvfp4 compute anywhere; those of mx
need an accelerator, so that their weights are compared as they are decoded."""

from __future__ import annotations

import pytest

import weightpack as wp

from .test_converted_rows import assert_same_file, section
from .tiny_diffusers import run, save

FORMATS = ("nvfp4", "mxfp8", "mxfp4")


def config(torch, form):
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4WeightOnlyConfig

    if form == "nvfp4":
        return NVFP4WeightOnlyConfig()
    codes = torch.float8_e4m3fn if form == "mxfp8" else torch.float4_e2m1fn_x2
    return MXDynamicActivationMXWeightConfig(activation_dtype=codes, weight_dtype=codes)


@pytest.fixture(scope="module")
def made(peer, tmp_path_factory):
    """A model, the folder that it is saved in, and one that it is converted into, by format and type."""
    torch, transformers = peer("torch"), peer("transformers")
    folders = {}

    def make(form, dtype="bfloat16"):
        if (form, dtype) not in folders:
            folder = tmp_path_factory.mktemp(f"{form}-{dtype}")
            # 160 rows are more than one row of tiles; 96 columns are six blocks of 16, three of 32.
            config = transformers.LlamaConfig(
                vocab_size=96, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=3,
                num_key_value_heads=1, head_dim=32, tie_word_embeddings=False,
            )  # fmt: skip
            torch.manual_seed(5)
            model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight[3] = 0
            model.save_pretrained(folder / "source")
            wp.convert(folder / "source", folder / "packed", f"torchao:{form}")
            folders[form, dtype] = folder
        folder = folders[form, dtype]
        return transformers.LlamaForCausalLM, folder / "source", folder / "packed"

    return make


@pytest.mark.parametrize(
    ("form", "dtype"), [("nvfp4", "bfloat16"), ("nvfp4", "float32"), ("mxfp8", "bfloat16"), ("mxfp4", "bfloat16")]
)
def test_in_transformers(peer, made, tmp_path, form, dtype):
    torch, transformers, _ = peer("torch"), peer("transformers"), peer("torchao")
    cls, source, packed = made(form, dtype)
    dtype, ids = getattr(torch, dtype), torch.arange(12)[None]
    quantization = transformers.TorchAoConfig(config(torch, form))
    theirs = cls.from_pretrained(source, quantization_config=quantization, dtype=dtype)
    theirs.save_pretrained(tmp_path)
    assert_same_file(torch, packed / "model.safetensors", tmp_path / "model.safetensors")
    assert section(packed) == section(tmp_path)
    for model in (cls.from_pretrained(packed, dtype=dtype), wp.from_pretrained(cls, packed, torch_dtype=dtype)):
        weight = model.model.layers[1].mlp.up_proj.weight
        assert type(weight).__name__ == ("NVFP4Tensor" if form == "nvfp4" else "MXTensor")
        assert torch.equal(weight.dequantize(), theirs.model.layers[1].mlp.up_proj.weight.dequantize())
        if form == "nvfp4":
            assert torch.equal(model(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("form", FORMATS)
def test_decoded_as_torchao_does(peer, made, tmp_path, form):
    torch, _, _ = peer("torch"), peer("transformers"), peer("torchao")
    cls, _, packed = made(form)
    info = wp.inspect(packed)
    assert not info.problems
    assert info.formats[f"torchao:{form}"]["tensors"] == 14
    wp.convert(packed, tmp_path / "plain", "bf16")
    plain = cls.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    expected = cls.from_pretrained(packed, dtype=torch.bfloat16)
    for one, other in zip(plain.model.layers, expected.model.layers, strict=True):
        assert torch.equal(one.mlp.down_proj.weight, other.mlp.down_proj.weight.dequantize())


def test_copied_and_packed_anew(peer, made, tmp_path):
    torch, _, _ = peer("torch"), peer("transformers"), peer("torchao")
    _, source, packed = made("mxfp4")
    wp.convert(packed, tmp_path / "again", "torchao:mxfp4")
    assert_same_file(torch, tmp_path / "again/model.safetensors", packed / "model.safetensors")
    assert section(tmp_path / "again") == section(packed)
    wp.convert(packed, tmp_path / "nf4", "nf4")
    assert wp.inspect(tmp_path / "nf4").formats["bitsandbytes:nf4"]["tensors"] == 14
    assert wp.diff(source, tmp_path / "nf4").error.snr_db > 15


@pytest.mark.parametrize("form", ["nvfp4", "mxfp8"])
def test_in_diffusers(peer, tmp_path, form):
    torch, diffusers, _ = peer("torch"), peer("diffusers"), peer("torchao")
    cls = save("flux", diffusers, tmp_path / "source", dtype=torch.bfloat16)
    wp.convert(tmp_path / "source", tmp_path / "ours", f"torchao:{form}")
    loaded = cls.from_pretrained(tmp_path / "ours", torch_dtype=torch.bfloat16)
    # Rows that are not whole blocks are left as they are; diffusers has to be told.
    left = [
        path
        for path, module in loaded.named_modules()
        if isinstance(module, torch.nn.Linear) and module.in_features % (16 if form == "nvfp4" else 32)
    ]
    assert bool(left) == (form == "mxfp8")
    quantization = diffusers.TorchAoConfig(config(torch, form), modules_to_not_convert=left or None)
    theirs = cls.from_pretrained(tmp_path / "source", quantization_config=quantization, torch_dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    file = "diffusion_pytorch_model.safetensors"
    assert_same_file(torch, tmp_path / "ours" / file, tmp_path / "theirs" / file)
    assert section(tmp_path / "ours")["quant_type"] == section(tmp_path / "theirs")["quant_type"]
    ours = wp.from_pretrained(cls, tmp_path / "ours", torch_dtype=torch.bfloat16)
    if form == "nvfp4":
        assert torch.equal(run("flux", loaded), run("flux", theirs))
        assert torch.equal(run("flux", ours), run("flux", theirs))
