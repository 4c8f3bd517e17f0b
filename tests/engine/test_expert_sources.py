"""Stacks of experts in 4-bit floats, as gpt-oss stores them, packed here by the published formula."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

import weightpack as wp
from tests.conftest import write_safetensors
from weightpack.checkpoint import native_checkpoint
from weightpack.errors import UnsupportedError, WeightpackError

VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
VALUES = np.concatenate([VALUES, -VALUES])
SECTION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
PLACE = "model.layers.0.mlp.experts"


def part(dtype: str, array: np.ndarray):
    """As `write_safetensors` takes it."""
    array = np.ascontiguousarray(array)
    return dtype, list(array.shape), array.tobytes()


def made(seed: int, experts: int, rows: int, columns: int, exponents=(100, 140)):
    """Blocks and scales of a stack [E, K, N], `rows` being K."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (experts, columns, rows // 32, 16), np.uint8)
    scales = rng.integers(*exponents, (experts, columns, rows // 32)).astype(np.uint8)
    return blocks, scales


def weight(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """value·2^(scale - 127) in float64, [E, K, N]."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    found = VALUES[codes] * np.exp2(scales.astype(np.float64) - 127)[..., None]
    return np.moveaxis(found.reshape(*blocks.shape[:2], -1), 1, 2)


def stacks(name: str, blocks: np.ndarray, scales: np.ndarray):
    return {f"{PLACE}.{name}_blocks": part("U8", blocks), f"{PLACE}.{name}_scales": part("U8", scales)}


def folder(place, tensors, **config):
    place.mkdir(parents=True)
    config = {"model_type": "x", "dtype": "bfloat16", "quantization_config": SECTION} | config
    (place / "config.json").write_text(json.dumps(config))
    write_safetensors(place / "model.safetensors", tensors)
    return place


@pytest.mark.parametrize(
    ("experts", "rows", "columns"),
    [(1, 32, 1), (2, 64, 96), (3, 96, 40), (2, 4128, 17), (5, 32, 4304)],
)
def test_the_model_has_its_own_name_and_shape(tmp_path, experts, rows, columns):
    blocks, scales = made(rows, experts, rows, columns)
    bias = np.ones((experts, columns), np.float32)
    tensors = {**stacks("down_proj", blocks, scales), f"{PLACE}.down_proj_bias": part("F32", bias)}
    name = f"{PLACE}.down_proj"
    with wp.open_checkpoint(folder(tmp_path / "model", tensors)) as checkpoint:
        assert set(checkpoint) == {name, f"{name}_bias"}
        entry = checkpoint[name]
        assert (entry.shape, entry.dtype, entry.format) == ((experts, rows, columns), "BF16", "mxfp4:experts")
        assert entry.nbytes == blocks.nbytes + scales.nbytes
        assert entry.bits_per_weight == 4.25
        expected = weight(blocks, scales)
        found = checkpoint.read(name, dtype="float32")
        np.testing.assert_array_equal(found, expected)
        assert not (np.signbit(found) ^ np.signbit(expected)).any()


def test_every_scale_and_code_is_what_transformers_decodes(tmp_path, peer):
    torch = peer("torch")
    decode = peer("transformers.integrations.mxfp4").convert_moe_packed_tensors
    codes = np.arange(256, dtype=np.uint8).reshape(16, 1, 16)
    blocks = np.broadcast_to(codes, (1, 16, 255, 16)).copy()
    scales = np.broadcast_to(np.arange(255, dtype=np.uint8), (1, 16, 255)).copy()
    place = folder(tmp_path / "model", stacks("down_proj", blocks, scales))
    with wp.open_checkpoint(place) as checkpoint:
        found = checkpoint.read(f"{PLACE}.down_proj", dtype="bfloat16").view(np.uint16)
    expected = decode(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.bfloat16)
    np.testing.assert_array_equal(found, expected.view(torch.uint16).numpy())
    scales[:] = 255
    (tmp_path / "2").mkdir()
    with wp.open_checkpoint(folder(tmp_path / "2" / "model", stacks("down_proj", blocks, scales))) as checkpoint:
        assert np.isnan(checkpoint.read(f"{PLACE}.down_proj", dtype="float32")).all()


@pytest.mark.parametrize("wrong", ["missing", "shape", "length"])
def test_codes_without_their_scales_are_refused(tmp_path, wrong):
    blocks, scales = made(1, 2, 64, 32)
    tensors = stacks("down_proj", blocks, scales[:, :, :1] if wrong == "shape" else scales)
    tensors |= stacks("gate_up_proj", blocks, scales)
    if wrong == "missing":
        del tensors[f"{PLACE}.down_proj_scales"]
    if wrong == "length":
        tensors[f"{PLACE}.down_proj_blocks"] = part("U8", blocks[..., :8])
    place = folder(tmp_path / "model", tensors)
    with pytest.raises(UnsupportedError, match=r"down_proj_blocks"):
        wp.convert(place, tmp_path / "out", to="bf16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["bf16", "f32", "q8_0"])
def test_decoded_and_packed_anew(tmp_path, to):
    blocks, scales = made(4, 2, 64, 96, (110, 130))
    tensors = {**stacks("gate_up_proj", blocks, scales)}
    tensors[f"{PLACE}.gate_up_proj_bias"] = part("F32", np.arange(192, dtype=np.float32).reshape(2, 96))
    place = folder(tmp_path / "model", tensors)
    target = tmp_path / ("out.gguf" if to == "q8_0" else "out")
    report = wp.convert(place, target, to=to, arch="none" if to == "q8_0" else None)
    expected = weight(blocks, scales)
    with wp.open_checkpoint(target) as checkpoint:
        name = f"{PLACE}.gate_up_proj"
        assert set(checkpoint) == {name, f"{name}_bias"}
        found = checkpoint.read(name, dtype="float32")
        if to == "q8_0":
            assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)
            assert "lose precision a second time" in " ".join(report.warnings)
        else:
            np.testing.assert_array_equal(found, expected)
            assert "quantization_config" not in checkpoint.config
        np.testing.assert_array_equal(checkpoint.read(f"{name}_bias", dtype="float32").reshape(-1), np.arange(192))


def test_arrays_by_themselves_are_refused():
    blocks, scales = made(4, 2, 64, 96)
    with pytest.raises(WeightpackError, match="mxfp4:experts: "):
        wp.dequantize({"blocks": blocks, "scales": scales}, "mxfp4:experts", shape=(2, 64, 96))


def test_rows_that_begin_anywhere(tmp_path):
    blocks, scales = made(6, 2, 96, 40)
    expected = weight(blocks, scales).reshape(-1, 40).astype(np.float32)
    name = f"{PLACE}.down_proj"
    with wp.open_checkpoint(folder(tmp_path / "model", stacks("down_proj", blocks, scales))) as checkpoint:
        native = native_checkpoint(checkpoint)
        for first, end in [(0, 192), (32, 33), (64, 190), (5, 6), (33, 150), (191, 192)]:
            got = np.empty((end - first, 40), np.float32)
            native.read(name, got.view(np.uint8).reshape(-1), "F32", 2, (first, end))
            np.testing.assert_array_equal(got, expected[first:end])


def test_a_tiny_model_computes_what_transformers_decodes(tmp_path, peer):
    torch, transformers = peer("torch"), peer("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 64, "num_experts_per_tok": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = transformers.GptOssConfig(num_hidden_layers=1, num_local_experts=2, **sizes, **heads)
    model = transformers.GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "bias" in name or "sinks" in name:
            torch.nn.init.normal_(parameter)
    tensors = {}
    for name, tensor in model.to(torch.bfloat16).state_dict().items():
        if name.endswith("_proj"):
            blocks, scales = made(len(name), *tensor.shape, (117, 123))
            tensors |= stacks(name.rpartition(".")[2], blocks, scales)
        else:
            tensors[name] = part("BF16", tensor.view(torch.uint16).numpy())
    told = json.loads(config.to_json_string()) | {"architectures": ["GptOssForCausalLM"]}
    place = folder(tmp_path / "model", tensors, **told)
    report = wp.convert(place, tmp_path / "out", to="bf16")
    assert not report.warnings
    with wp.open_checkpoint(tmp_path / "out") as checkpoint:
        assert "quantization_config" not in checkpoint.config
    load = transformers.GptOssForCausalLM.from_pretrained
    decoded = load(place, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=torch.bfloat16)
    converted, told = load(tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True)
    assert not any(told.values())
    expected = decoded.state_dict()
    for name, tensor in converted.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(converted(tokens).logits, decoded(tokens).logits)


def every_block(last: int):
    """All codes at all scales up to `last`, as modelopt:mxfp4: codes [last + 1, 256], scales [last + 1, 16].
    A block holds large and small codes, or small ones only, or zeros of both signs."""
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 16, (last + 1, 16, 32), np.uint8)
    for block, most in enumerate([0, 1, 2, 3, 4, 5, 6, 7] * 2):
        codes[:, block] = np.minimum(codes[:, block] & 7, most) | codes[:, block] & 8
    codes[:, 8:, :16] = np.arange(16)
    pairs = codes.reshape(last + 1, -1, 2)
    scales = np.repeat(np.arange(last + 1, dtype=np.uint8)[:, None], 16, axis=1)
    return pairs[..., 0] | pairs[..., 1] << 4, scales


def layer(codes: np.ndarray, scales: np.ndarray):
    return {"a.up_proj.weight": part("U8", codes), "a.up_proj.weight_scale": part("U8", scales)}


def test_mxfp4_keeps_every_code_and_scale_on_the_way_to_gguf_and_back(tmp_path):
    codes, scales = every_block(252)
    write_safetensors(tmp_path / "a.safetensors", layer(codes, scales))
    there = wp.convert(tmp_path / "a.safetensors", tmp_path / "b.gguf", to="gguf:mxfp4")
    back = wp.convert(tmp_path / "b.gguf", tmp_path / "c.safetensors", to="modelopt:mxfp4", layers="names")
    for report in (there, back):
        assert not report.warnings
        assert [tensor.error.max_error for tensor in report.tensors] == [0.0]
    with wp.open_checkpoint(tmp_path / "a.safetensors") as source, wp.open_checkpoint(tmp_path / "b.gguf") as other:
        assert other["a.up_proj.weight"].format == "gguf:mxfp4"
        expected = source.read("a.up_proj.weight", dtype="float32")
        np.testing.assert_array_equal(other.read("a.up_proj.weight", dtype="float32"), expected)
    text = (tmp_path / "c.safetensors").read_bytes()
    assert codes.tobytes() in text
    assert scales.tobytes() in text


@pytest.mark.parametrize(("scale", "code"), [(253, 6), (254, 4), (255, 0), (255, 1)])
def test_mxfp4_that_is_not_finite_is_refused(tmp_path, scale, code):
    codes, scales = every_block(2)
    scales[1, 3] = scale
    codes[1, 48:64] = 0
    codes[1, 50] = code
    write_safetensors(tmp_path / "a.safetensors", layer(codes, scales))
    with pytest.raises(WeightpackError, match=r"weight \d+ is (inf|NaN), which cannot be quantized"):
        wp.convert(tmp_path / "a.safetensors", tmp_path / "b.gguf", to="gguf:mxfp4")


@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (256, 80)])
def test_experts_in_blocks_of_fp8(tmp_path, rows, columns):
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 0x7E, (3, rows, columns), np.uint8)
    scales = rng.random((3, rows // 128, -(-columns // 128)), np.float32)
    name = f"{PLACE}.gate_up_proj"
    tensors = {name: part("F8_E4M3", codes), f"{name}_scale_inv": part("F32", scales)}
    place = folder(tmp_path / "model", tensors, quantization_config={"quant_method": "fp8"})
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = values * scales.repeat(128, axis=1).repeat(128, axis=2)[:, :, :columns]
    wp.convert(place, tmp_path / "out", to="f32")
    wp.convert(place, tmp_path / "same", to="fp8:block")
    with wp.open_checkpoint(place) as source, wp.open_checkpoint(tmp_path / "out") as checkpoint:
        assert set(source) == set(checkpoint) == {name}
        assert (source[name].format, source[name].shape) == ("fp8:block", (3, rows, columns))
        np.testing.assert_allclose(checkpoint.read(name), expected, rtol=2**-23)
        assert "quantization_config" not in checkpoint.config
    with wp.open_checkpoint(tmp_path / "same") as checkpoint:
        assert (checkpoint[name].format, checkpoint[name].shape) == ("fp8:block", (3, rows, columns))
        assert {piece.name for piece in checkpoint[name].parts} == set(tensors)
    uneven = {name: part("F8_E4M3", codes[:, :96]), f"{name}_scale_inv": part("F32", scales[:, :1])}
    with pytest.raises(UnsupportedError, match="experts of 96 rows in blocks that two of them share"):
        wp.open_checkpoint(folder(tmp_path / "uneven", uneven, quantization_config={"quant_method": "fp8"}))
