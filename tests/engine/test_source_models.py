"""Whole models that their libraries packed and saved become plain ones that transformers loads as its own."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import warnings
from pathlib import Path

import pytest

import weightpack as wp
from tests.conftest import find_peer

torch = pytest.importorskip("torch")

TOKENS = torch.arange(24).reshape(2, 12)
PACKED = 14
"""Linear layers of the model, but for the head."""


@pytest.fixture(scope="module")
def llama():
    """A small Llama."""
    transformers = find_peer("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    return transformers.LlamaForCausalLM(config).bfloat16().eval()


def by_compressed_tensors(llama, folder: Path, **weights) -> dict[str, torch.Tensor]:
    """A model packed and saved by compressed-tensors, also with ranges of what is kept of keys and values;
    gives the weights that it makes of it."""
    quantization = find_peer("compressed_tensors.quantization")
    compressors = find_peer("compressed_tensors.compressors")
    model = copy.deepcopy(llama)
    kept = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    inputs = {"num_bits": 8, "type": weights["type"], "dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel", **weights}}
    config = quantization.QuantizationConfig(
        config_groups={"group_0": {**group, "input_activations": inputs}}, ignore=["lm_head"], kv_cache_scheme=kept
    )
    quantization.apply_quantization_config(model, config)
    calculate = find_peer("compressed_tensors.quantization.utils").calculate_qparams
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and hasattr(module, "weight"):
            ends = module.weight.amin(1, keepdim=True), module.weight.amax(1, keepdim=True)
            module.weight_scale.data, module.weight_zero_point.data = calculate(*ends, scheme.weights)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    compressor.decompress_model(model)
    return {name: value for name, value in model.state_dict().items() if name.endswith("weight")}


def by_transformers(llama, folder: Path, **config) -> dict[str, torch.Tensor]:
    """A model packed by bitsandbytes and saved by transformers."""
    transformers = find_peer("transformers")
    find_peer("bitsandbytes")
    plain = folder.parent / "plain"
    copy.deepcopy(llama).save_pretrained(plain)
    config = transformers.BitsAndBytesConfig(**config)
    kind = transformers.LlamaForCausalLM
    model = kind.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16, device_map="cpu")
    model.save_pretrained(folder)
    model.dequantize(dtype=torch.bfloat16)
    return dict(model.state_dict())


def by_modelopt(llama, folder: Path) -> dict[str, torch.Tensor]:
    """A model whose layers ModelOpt packs in two ways, exported; gives the weights as its classes decode them."""
    find_peer("modelopt")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import modelopt.torch.export as mte
        import modelopt.torch.quantization as mtq
        from modelopt.torch.quantization import qtensor

        model = copy.deepcopy(llama)
        nvfp4 = next(one for one in mtq.W4A16_NVFP4_CFG["quant_cfg"] if one["quantizer_name"] == "*weight_quantizer")
        entries = [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*self_attn*weight_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}},
            {"quantizer_name": "*self_attn*_proj.input_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}},
            {**copy.deepcopy(nvfp4), "quantizer_name": "*mlp*weight_quantizer"},
        ]
        mtq.quantize(model, {"quant_cfg": entries, "algorithm": "max"}, forward_loop=lambda one: one(TOKENS))
        mte.export_hf_checkpoint(model, export_dir=folder)
    stored = find_peer("safetensors.torch").load_file(folder / "model.safetensors")
    weights = {}
    for name, value in stored.items():
        if not name.endswith(".weight"):
            continue
        scale, second = stored.get(f"{name}_scale"), stored.get(f"{name}_scale_2")
        if scale is None:
            weights[name] = value
        elif second is None:
            weights[name] = (value.float() * scale).bfloat16()
        else:
            shape = torch.Size((value.shape[0], value.shape[1] * 2))
            codes = qtensor.NVFP4QTensor(shape, torch.bfloat16, value)
            weights[name] = codes.dequantize(scale=scale, double_scale=second, block_sizes={-1: 16})
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert section["quant_algo"] == "MIXED_PRECISION"
    return weights


MODELS = {
    "compressed-tensors fp8": lambda llama, folder: by_compressed_tensors(llama, folder, type="float"),
    "compressed-tensors int8": lambda llama, folder: by_compressed_tensors(llama, folder, type="int"),
    "bitsandbytes int8": lambda llama, folder: by_transformers(llama, folder, load_in_8bit=True),
    "bitsandbytes nf4": lambda llama, folder: by_transformers(
        llama, folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "modelopt, two ways": by_modelopt,
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_packed_model_becomes_a_plain_one(llama, tmp_path, kind):
    expected = MODELS[kind](llama, tmp_path / "packed")
    assert wp.inspect(tmp_path / "packed").problems == ()
    wp.convert(tmp_path / "packed", tmp_path / "plain_again", to="bf16")
    model, info = type(llama).from_pretrained(tmp_path / "plain_again", output_loading_info=True)
    assert not any(info.values())
    found = model.state_dict()
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], value.bfloat16()), name

    report = wp.convert(tmp_path / "packed", tmp_path / "llama.gguf", to="q8_0")
    assert f"{PACKED} tensors are packed already, and lose precision a second time" in report.warnings
    with wp.open_checkpoint(tmp_path / "llama.gguf") as checkpoint:
        down = torch.from_numpy(checkpoint.read("blk.0.ffn_down.weight", dtype="float32"))
    wanted = expected["model.layers.0.mlp.down_proj.weight"].float()
    assert (down - wanted).norm() < 0.01 * wanted.norm()


def test_a_model_packed_in_two_ways_becomes_one_packed_in_one(llama, tmp_path):
    by_modelopt(llama, tmp_path / "packed")
    report = wp.convert(tmp_path / "packed", tmp_path / "new", to="modelopt:nvfp4", layers="names")
    with wp.open_checkpoint(tmp_path / "new") as checkpoint:
        packed = [entry.format for entry in checkpoint.values() if len(entry.parts) > 1]
    assert packed == ["modelopt:nvfp4"] * PACKED
    assert "8 tensors are packed already, and lose precision a second time" in report.warnings
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == "W4A16_NVFP4"
