"""Whole models through `from_pretrained`, against what the hosts make of the same files."""

from __future__ import annotations

import json

import pytest

import weightpack as wp
from tests.conftest import find_peer

torch = find_peer("torch")
bnb = find_peer("bitsandbytes")

from tests.loading import nets  # noqa: E402
from tests.quantizers.bitsandbytes_models import bits  # noqa: E402

CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4 double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "nf4 as bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "bfloat16",
        "bnb_4bit_compute_dtype": "bfloat16",
    },
    "nf4 as float32": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "float32"},
    "int8": {"load_in_8bit": True},
}


def assert_same(found, expected):
    """Two state dicts byte for byte; statistics of double quantization given the offset of each."""
    ours, theirs = bits(found), bits(expected)
    assert list(ours) == list(theirs)
    loose = ("absmax", "nested_absmax", "quant_state")
    for name in ours:
        nested = any(f"{name.partition('.weight.')[0]}.weight.nested_absmax" == other for other in ours)
        if not nested or not any(f".weight.{part}" in name for part in loose):
            assert ours[name] == theirs[name], name
        elif name.endswith(".weight.absmax"):
            assert (found[name].int() - expected[name].int()).abs().max() <= 1, name
        elif name.endswith("nested_absmax"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)
        else:
            own, other = (json.loads(bytes(state[name].tolist())) for state in (found, expected))
            assert own.pop("nested_offset") == pytest.approx(other.pop("nested_offset"), rel=5e-7)
            assert own == other


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Folder of a small Llama in float32, whose layers bitsandbytes' own CPU kernels take."""
    transformers = find_peer("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=96,
    )
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200KB")
    return folder


TOKENS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in CONFIGS), ("nf4", torch.float32), ("int8", torch.float32)]
)
def test_the_state_of_transformers_and_its_outputs(llama, name, dtype):
    transformers = find_peer("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        llama,
        quantization_config=transformers.BitsAndBytesConfig(**CONFIGS[name]),
        dtype=dtype,
        device_map="cpu",
    )
    model = wp.from_pretrained(
        transformers.LlamaForCausalLM,
        llama,
        quantization_config=wp.BitsAndBytesConfig(**CONFIGS[name]),
        torch_dtype=dtype,
    )
    before = bits(model.state_dict())
    assert_same(model.state_dict(), theirs.state_dict())
    with torch.no_grad():
        ours = model(TOKENS).logits.float()
        expected = theirs(TOKENS).logits.float()
    # Its 4-bit kernels round activations and scales to bfloat16 in any case.
    assert ((ours - expected).norm() / expected.norm()).item() < 0.02
    assert bits(model.state_dict()) == before


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_after_a_forward_and_read_by_transformers(llama, name, tmp_path):
    transformers = find_peer("transformers")
    kind = transformers.LlamaForCausalLM
    config = wp.BitsAndBytesConfig(**CONFIGS[name])
    model = wp.from_pretrained(kind, llama, quantization_config=config, torch_dtype=torch.bfloat16)
    before = bits(model.state_dict())
    with torch.no_grad():
        logits = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    assert bits(kind.from_pretrained(tmp_path, device_map="cpu").state_dict()) == before
    again = wp.from_pretrained(kind, tmp_path)
    assert bits(again.state_dict()) == before
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, logits)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in CONFIGS), ("nf4", torch.float16), ("int8", torch.float16)]
)
def test_the_state_of_diffusers(name, dtype, tmp_path, monkeypatch):
    """diffusers refuses a machine without a GPU before it would pack the same bytes."""
    diffusers = find_peer("diffusers")
    quantizers = find_peer("diffusers.quantizers.bitsandbytes.bnb_quantizer")
    for kind in (quantizers.BnB4BitDiffusersQuantizer, quantizers.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(kind, "validate_environment", lambda self, *args, **kwargs: None)
        monkeypatch.setattr(kind, "update_device_map", lambda self, device_map: {"": "cpu"})
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
    )
    model.save_pretrained(tmp_path)
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(
        tmp_path, quantization_config=diffusers.BitsAndBytesConfig(**CONFIGS[name]), torch_dtype=dtype
    )
    ours = wp.from_pretrained(
        diffusers.FluxTransformer2DModel,
        tmp_path,
        quantization_config=wp.BitsAndBytesConfig(**CONFIGS[name]),
        torch_dtype=dtype,
    )
    assert_same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_plain_module_and_back(name, tmp_path):
    net = nets.make(width=48)
    folder = nets.save(tmp_path / "net", net, width=48)
    config = wp.BitsAndBytesConfig(**CONFIGS[name], llm_int8_skip_modules=["head"])
    model = nets.Net.from_pretrained(folder, quantization_config=config, torch_dtype=torch.bfloat16)
    packed = [
        path for path, layer in model.named_modules() if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    ]
    assert len(packed) == 4
    reference = net(nets.TOKENS)
    with torch.no_grad():
        got = model(nets.TOKENS).float()
        assert ((got - reference).norm() / reference.norm()).item() < (0.03 if "int8" in name else 0.15)
        model.hf_quantizer.dequantize(model, dtype=torch.float32)
        plain = model.to(torch.float32)(nets.TOKENS)
    assert type(model.blocks[0].up) is torch.nn.Linear
    assert ((plain - got).norm() / got.norm()).item() < 0.02
