"""FP8 in blocks against transformers' own code, and FP8 of others against the formula in float64."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

import weightpack as wp
from tests.conftest import find_peer
from weightpack.errors import FormatError, UnsupportedError

torch = pytest.importorskip("torch")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def peer():
    """Packing and unpacking of one weight."""
    fp8 = find_peer("transformers.integrations.finegrained_fp8")
    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    quantizer = SimpleNamespace(quantization_config=config)
    return fp8.Fp8Quantize(quantizer), fp8.Fp8Dequantize(quantizer)


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-5, 3e4])
def test_blocks(peer, dtype, scale):
    torch.manual_seed(0)
    pack, unpack = peer
    for shape in ((128, 128), (256, 384), (128, 1024)):
        weight = (torch.randn(shape) * scale).clamp(-6e4, 6e4).to(dtype)
        weight[:64, :128] = 0
        weight[0, 0] = -0.0
        if shape[0] > 128:
            weight[:128, :128] = 0
        expected = pack._quantize_one("a.weight", weight)
        found = wp.quantize(weight, "fp8:block")
        assert torch.equal(raw(found[""]), raw(expected["a.weight"]))
        scales = expected["a.weight_scale_inv"]
        assert found["weight_scale_inv"].shape == scales.shape
        assert torch.equal(raw(found["weight_scale_inv"]), raw(scales))
        decoded = wp.dequantize(found, "fp8:block")
        assert torch.equal(raw(decoded), raw(unpack._dequantize_one(expected["a.weight"], scales, torch.float32)))


def test_blocks_at_the_edges_are_partial():
    torch.manual_seed(1)
    weight = torch.randn(300, 200)
    found = wp.quantize(weight, "fp8:block")
    assert found["weight_scale_inv"].shape == (3, 2)
    padded = torch.zeros(384, 256)
    padded[:300, :200] = weight
    whole = wp.quantize(padded, "fp8:block")
    assert torch.equal(raw(found["weight_scale_inv"]), raw(whole["weight_scale_inv"]))
    assert torch.equal(raw(found[""]), raw(whole[""][:300, :200]))
    one = wp.quantize(torch.randn(1, 1), "fp8:block")
    assert one["weight_scale_inv"].shape == (1, 1)


def test_what_cannot_be_packed():
    parts = wp.quantize(torch.full((128, 256), 1e-40), "fp8:block")
    assert wp.dequantize(parts, "fp8:block").abs().max() == 0
    assert torch.equal(parts["weight_scale_inv"], torch.ones(1, 2))
    with pytest.raises(FormatError, match="NaN"):
        wp.quantize(torch.full((128, 128), torch.nan), "fp8:block")
    with pytest.raises(FormatError, match="2 dimensions"):
        wp.quantize(torch.ones(128), "fp8:block")
    with pytest.raises(UnsupportedError, match="decoded, and not encoded"):
        wp.quantize(torch.ones(128, 128), "fp8:row")


def in_float64(codes, scales, rows, columns):
    """The formula, without a rounding."""
    scales = scales.double().repeat_interleave(rows, 0)[: codes.shape[0]]
    return codes.to(torch.float32).double() * scales.repeat_interleave(columns, 1)[:, : codes.shape[1]]


SOURCES = {
    "float blocks": ("weight_scale_inv", torch.float32, (3, 2), (128, 128)),
    "bf16 blocks": ("weight_scale_inv", torch.bfloat16, (3, 2), (128, 128)),
    "powers of two": ("weight_scale_inv", "e8m0", (3, 2), (128, 128)),
    "rows": ("weight_scale", torch.float32, (300, 1), (1, 200)),
    "bf16 rows": ("weight_scale", torch.bfloat16, (300, 1), (1, 200)),
    "vector of rows": ("weight_scale", torch.float32, (300,), (1, 200)),
    "tensor": ("weight_scale", torch.float32, (1,), (300, 200)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_sources_are_decoded(source, tmp_path):
    save = find_peer("safetensors.torch").save_file
    name, dtype, shape, (rows, columns) = SOURCES[source]
    torch.manual_seed(2)
    codes = (torch.randn(300, 200) * 100).to(torch.float8_e4m3fn)
    if dtype == "e8m0":
        scales = torch.randint(100, 130, shape).to(torch.uint8).view(torch.float8_e8m0fnu)
        values = torch.exp2(scales.view(torch.uint8).double() - 127)
    else:
        scales = (torch.rand(shape) + 0.01).to(dtype)
        values = scales
    save({"a.weight": codes, f"a.{name}": scales, "a.input_scale": torch.ones(())}, tmp_path / "model.safetensors")
    exact = in_float64(codes, values.reshape(-1, 1) if values.dim() < 2 else values, rows, columns)
    with wp.open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        assert list(checkpoint) == ["a.weight"]
        assert checkpoint["a.weight"].format.startswith("fp8:")
        found = torch.from_numpy(checkpoint.read("a.weight", "float32"))
    assert torch.equal(found, exact.float())
    # Through bf16: one rounding of the product in float32.
    wp.convert(tmp_path / "model.safetensors", tmp_path / "out.safetensors", "bf16")
    with wp.open_checkpoint(tmp_path / "out.safetensors") as checkpoint:
        again = torch.from_numpy(checkpoint.read("a.weight", "float32"))
    assert torch.equal(again, found.bfloat16().float())


def test_slabs_change_nothing(tmp_path):
    save = find_peer("safetensors.torch").save_file
    torch.manual_seed(3)
    weight = torch.randn(700, 2048).bfloat16()
    parts = wp.quantize(weight, "fp8:block")
    save(
        {"l.up_proj.weight": parts[""], "l.up_proj.weight_scale_inv": parts["weight_scale_inv"]},
        tmp_path / "a.safetensors",
    )
    for to in ("q4_k", "nf4", "modelopt:nvfp4", "fp8:block"):
        results = set()
        for memory, threads in (("256MB", 1), ("16MB", 3)):
            out = tmp_path / ("out.gguf" if to == "q4_k" else "out.safetensors")
            wp.convert(
                tmp_path / "a.safetensors", out, to, layers="names", max_memory=memory, threads=threads, overwrite=True
            )
            results.add(out.read_bytes())
        assert len(results) == 1, to
    decoded = wp.dequantize(parts, "fp8:block", dtype="float32")
    expected = wp.dequantize(wp.quantize(decoded, "q4_k"), "q4_k")
    with wp.open_checkpoint(tmp_path / "out.gguf") as checkpoint:
        found = torch.from_numpy(checkpoint.read("l.up_proj.weight", "float32"))
    assert torch.equal(found, expected)


def test_a_host_loads_what_is_converted(tmp_path):
    transformers = find_peer("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    model = transformers.LlamaForCausalLM(config).bfloat16().eval()
    model.save_pretrained(tmp_path / "model")
    report = wp.convert(tmp_path / "model", tmp_path / "fp8", "fp8:block")
    assert sum(tensor.format == "fp8:block" for tensor in report.tensors) == 7
    section = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    theirs = json.loads(json.dumps(transformers.FineGrainedFP8Config().to_dict()))
    assert section == theirs | {"modules_to_not_convert": ["lm_head"]}
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", output_loading_info=True, dtype=torch.bfloat16
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    wp.convert(tmp_path / "fp8", tmp_path / "back", "bf16")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name
    before, after = model.model.layers[0].mlp.up_proj.weight.float(), back.model.layers[0].mlp.up_proj.weight.float()
    assert 0.02 < (after - before).norm() / before.norm() < 0.03
    again = wp.convert(tmp_path / "fp8", tmp_path / "again", "fp8:block")
    assert all(tensor.copied for tensor in again.tensors)
