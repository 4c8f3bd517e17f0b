"""HQQ as a source: the state of its layers, by hqq itself and by the published formula."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import weightpack as wp
from tests.conftest import find_peer, write_safetensors
from weightpack.errors import CheckpointError, FormatError, UnsupportedError

from .hqq_layers import TYPES, encoded, layer, section, stored
from .test_integer_sources import check, folder

MANY = [(bits, axis) for bits in (8, 4, 3, 2, 1) for axis in (1, 0)]


def named(arrays):
    return {f"layer.{name}": array for name, array in arrays.items()}


@pytest.mark.parametrize(("bits", "axis"), MANY)
@pytest.mark.parametrize(
    ("rows", "columns", "group"),
    # A group is a part of a row, a whole row, or goes on from one row to the next.
    [(32, 128, 64), (24, 80, 80), (48, 48, 32), (8, 1000, 8), (16, 40, 64)],
)
def test_weights_are_those_of_the_formula(tmp_path, bits, axis, rows, columns, group):
    scale = list(TYPES)[(bits + axis + columns // 8) % 3]
    weights, arrays = layer(bits, rows, columns, bits, group, axis, scale)
    lines = rows * columns // group if axis == 1 else group
    if lines % {4: 2, 2: 4, 1: 8}.get(bits, 1):
        place = folder(tmp_path, named(arrays), section())
        with pytest.raises(FormatError, match="lines of codes, expected a multiple of"):
            wp.open_checkpoint(place)
        return
    entry = check(folder(tmp_path, named(arrays), section()), weights)
    assert (entry.format, entry.dtype) == ("hqq:int", scale)


@pytest.mark.parametrize(("bits", "axis"), MANY)
@pytest.mark.parametrize("scale", TYPES)
def test_codes_that_are_stored_as_floats(tmp_path, bits, axis, scale):
    weights, arrays = layer(bits, 64, 128, bits, 64, axis, scale, as_float=True)
    assert arrays["W_q"][0] == scale
    check(folder(tmp_path, named(arrays), section()), weights)


GOLDEN = json.loads((Path(__file__).parent.parent / "vectors" / "hqq.json").read_text("utf-8"))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['bits']} bits, axis {case['axis']}")
def test_layers_of_hqq_are_what_it_makes_of_them(tmp_path, case):
    read = {name: (dtype, shape, bytes.fromhex(data)) for name, (dtype, shape, data) in case["arrays"].items()}
    _, shape, data = case["weights"]
    weights = np.frombuffer(bytes.fromhex(data), np.float32).reshape(shape)
    write_safetensors(tmp_path / "model.safetensors", named(read))
    with wp.open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        assert list(checkpoint) == ["layer.weight"]
        assert (checkpoint["layer.weight"].format, checkpoint["layer.weight"].dtype) == ("hqq:int", "F16")
        np.testing.assert_array_equal(checkpoint.read("layer.weight", dtype="float32"), weights)


def test_layers_are_known_without_a_config(tmp_path):
    """What hqq saves by itself may say nothing in its config; layers may be packed in several ways."""
    weights, tensors = {}, {}
    for number, (bits, axis) in enumerate(MANY):
        name = f"layers.{number}.up_proj"
        weights[f"{name}.weight"], arrays = layer(number, 32, 128, bits, 64, axis)
        tensors |= {f"{name}.{key}": array for key, array in arrays.items()}
        tensors[f"{name}.bias"] = stored("BF16", np.ones(32, ml_dtypes.bfloat16))
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with wp.open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        assert set(checkpoint) == set(weights) | {name.replace("weight", "bias") for name in weights}
        for name, wanted in weights.items():
            np.testing.assert_array_equal(checkpoint.read(name, dtype="float32"), wanted.astype(np.float32))


def test_codes_of_that_name_alone_are_a_parameter(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_safetensors(tmp_path / "model.safetensors", {"attention.W_q": stored("F32", values)})
    wp.convert(tmp_path / "model.safetensors", tmp_path / "new.safetensors", "bf16")
    with wp.open_checkpoint(tmp_path / "new.safetensors") as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("attention.W_q", dtype="float32"), values)


def without(*names):
    return lambda arrays: {key: value for key, value in arrays.items() if key not in names}


def changed(**arrays):
    return lambda before: {**before, **arrays}


ZEROS = np.zeros((32, 64), np.uint8)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (without("packing"), CheckpointError, r'layer\.packing" is missing'),
        (without("shape"), CheckpointError, r'layer\.shape" is missing'),
        (without("scale"), CheckpointError, r'layer\.scale" is missing'),
        (without("axis"), CheckpointError, r'layer\.axis" is missing'),
        (without("group_size"), CheckpointError, r'layer\.group_size" is missing'),
        (changed(packing=encoded("4bit_32")), UnsupportedError, 'packing "4bit_32" is not decoded by this'),
        (changed(packing=encoded("x" * 65)), CheckpointError, r"is U8 \[65\], expected U8 of at most 64 bytes"),
        (changed(axis=encoded(2)), CheckpointError, r'layer\.axis" is 2, expected 0 or 1'),
        (changed(axis=encoded(True)), CheckpointError, r'layer\.axis" is U8 \[\], expected I32'),
        (changed(group_size=encoded(0)), FormatError, "4096 weights are not divided into groups of 0"),
        (changed(group_size=encoded(-64)), CheckpointError, "one number that is not negative"),
        (changed(group_size=encoded(96)), FormatError, "4096 weights are not divided into groups of 96"),
        (changed(group_size=encoded(32)), CheckpointError, r"is U8 \[32, 64\], but a weight of shape \[32, 128\]"),
        (changed(shape=encoded((32,))), CheckpointError, r"holds \[32\], expected rows and columns"),
        (changed(shape=encoded((32, -128))), CheckpointError, "expected rows and columns"),
        (changed(shape=encoded((2**62, 2**62))), CheckpointError, r"holds more than 2\^64 weights"),
        (changed(shape=encoded((2**31, 128))), CheckpointError, r"but a weight of shape \[2147483648, 128\]"),
        (changed(W_q=stored("U8", ZEROS[:-1])), CheckpointError, r"is U8 \[31, 64\], but"),
        (changed(W_q=stored("I8", ZEROS)), CheckpointError, r"is I8 \[32, 64\], but"),
        (changed(scale=stored("F16", np.zeros((63, 1), np.float16))), CheckpointError, r"is F16 \[63, 1\], but"),
        (changed(scale=stored("I32", np.zeros((64, 1), np.int32))), UnsupportedError, "scales of type I32"),
        (changed(zero=stored("F16", np.zeros((64, 1), np.float16))), CheckpointError, r'zero" is F16 \[64, 1\], but'),
        (changed(channel_wise=encoded(False)), UnsupportedError, "one scale for all weights"),
        (changed(zero_scale=stored("F16", np.zeros((2, 64, 1), np.float16))), UnsupportedError, "arrays of their own"),
        (changed(scale_q=stored("U8", ZEROS)), UnsupportedError, "arrays of their own"),
    ],
)  # fmt: skip
def test_a_damaged_layer_is_refused(tmp_path, damage, error, message):
    _, arrays = layer(1, 32, 128)
    place = folder(tmp_path, named(damage(arrays)), section())
    with pytest.raises(error, match=message) as told:
        wp.convert(place, tmp_path / "new", "bf16")
    assert 'tensor "layer.W_q"' in str(told.value)
    assert str(place / "model.safetensors") in str(told.value)


@pytest.mark.parametrize("damage", [without("zero"), changed(group_size=encoded(96))])
def test_a_damaged_layer_is_exit_code_3(command_line, tmp_path, damage):
    _, arrays = layer(1, 32, 128)
    place = folder(tmp_path, named(damage(arrays)), section())
    done = command_line("convert", place, tmp_path / "new", "--to", "bf16")
    assert done.returncode == 3
    assert f'(tensor "layer.W_q", file "{place / "model.safetensors"}")' in done.stderr


def test_a_llama_becomes_a_plain_one(tmp_path):
    """A model as transformers names it, packed in several ways; what it becomes loads with these weights."""
    transformers, torch = find_peer("transformers"), find_peer("torch")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "hqq")
    expected, tensors = {}, {}
    for number, (name, value) in enumerate(model.state_dict().items()):
        plain = value.float().numpy().astype(ml_dtypes.bfloat16)
        expected[name] = plain
        if "_proj" not in name:
            tensors[name] = stored("BF16", plain)
            continue
        bits, axis = MANY[number % len(MANY)]
        weights, arrays = layer(number, *value.shape, bits, 64, axis)
        # The result is rounded to 32 bits before it is rounded to 16.
        expected[name] = weights.astype(np.float32).astype(ml_dtypes.bfloat16)
        tensors |= {name.removesuffix("weight") + key: array for key, array in arrays.items()}
    write_safetensors(tmp_path / "hqq" / "model.safetensors", tensors, {"format": "pt"})
    path = tmp_path / "hqq" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": section()}))
    assert wp.inspect(tmp_path / "hqq").problems == ()

    wp.convert(tmp_path / "hqq", tmp_path / "plain", "bf16")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    loaded, info = type(model).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info.values())
    found = loaded.state_dict()
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        assert found[name].dtype == torch.bfloat16
        np.testing.assert_array_equal(found[name].float().numpy(), wanted.astype(np.float32))

    for to, name, far in (("nf4", "nf4", 0.15), ("q8_0", "llama.gguf", 0.01)):
        report = wp.convert(tmp_path / "hqq", tmp_path / name, to)
        assert "7 tensors are packed already, and lose precision a second time" in report.warnings
        target = "blk.0.ffn_down.weight" if to == "q8_0" else "model.layers.0.mlp.down_proj.weight"
        wanted = expected["model.layers.0.mlp.down_proj.weight"].astype(np.float32)
        with wp.open_checkpoint(tmp_path / name) as checkpoint:
            got = checkpoint.read(target, dtype="float32")
        assert np.linalg.norm(got - wanted) <= far * np.linalg.norm(wanted)
