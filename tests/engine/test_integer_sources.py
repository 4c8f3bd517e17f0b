"""GPTQ, AWQ and compressed-tensors' packed integers as sources, packed here by the published formulas."""

from __future__ import annotations

import json

import numpy as np
import pytest

import weightpack as wp
from tests.conftest import write_safetensors
from weightpack.checkpoint import native_checkpoint
from weightpack.errors import CheckpointError, UnsupportedError

from .packed_sources import eights, made, part, weight, words


def folder(tmp_path, tensors, section):
    """A model folder of one packed layer and a norm."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"model_type": "x", "quantization_config": section}))
    tensors = {**tensors, "norm.weight": part("F32", np.ones(4, np.float32))}
    write_safetensors(place / "model.safetensors", tensors)
    return place


def check(place, expected, dtype="float32"):
    """The weight as it is read whole and by rows; gives the entry."""
    with wp.open_checkpoint(place) as checkpoint:
        entry = checkpoint["layer.weight"]
        assert entry.shape == expected.shape
        found = checkpoint.read("layer.weight", dtype="float32")
        wanted = expected.astype(np.float32)
        np.testing.assert_array_equal(found, wanted)
        step = next(rows for rows in (32, 16, 8) if len(wanted) % rows == 0)
        for first, end in ((0, step), (len(wanted) - step, len(wanted))):
            got = np.empty((end - first, expected.shape[1]), np.float32)
            native = native_checkpoint(checkpoint)
            native.read("layer.weight", got.view(np.uint8).reshape(-1), "F32", 1, (first, end))
            np.testing.assert_array_equal(got, wanted[first:end])
        return entry


@pytest.mark.parametrize("version", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [(32, 64, 32), (96, 128, 128), (64, 96, 32)])
def test_gptq(tmp_path, version, bits, rows, columns, group):
    codes, zeros, scales = made(bits, rows, columns, bits, group, "F16")
    order = np.arange(columns) // group
    added = 0 if version == "gptq_v2" else 1
    tensors = {
        "layer.qweight": part("I32", words(codes, bits)),
        "layer.qzeros": part("I32", words(zeros.T, bits).T),
        "layer.scales": part("F16", scales),
        "layer.g_idx": part("I32", order.astype(np.int32)),
    }
    section = {"quant_method": "gptq", "bits": bits, "group_size": group}
    place = folder(tmp_path, tensors, section | ({"checkpoint_format": version} if version else {}))
    entry = check(place, weight(codes, zeros + added, scales, order))
    assert (entry.format, entry.dtype) == ("gptq:int", "F16")


@pytest.mark.parametrize("scale", ["F16", "F32"])
def test_gptq_in_the_order_of_activations(tmp_path, scale):
    codes, zeros, scales = made(5, 40, 64, 4, 16, scale)
    order = np.random.default_rng(6).permutation(np.arange(64) // 16)
    tensors = {
        "layer.qweight": part("I32", words(codes, 4)),
        "layer.qzeros": part("I32", words(zeros.T, 4).T),
        "layer.scales": part(scale, scales),
        "layer.g_idx": part("I32", order.astype(np.int32)),
    }
    place = folder(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True})
    check(place, weight(codes, zeros + 1, scales, order))
    outside = folder(
        tmp_path / "2" if (tmp_path / "2").mkdir() is None else tmp_path,
        tensors | {"layer.g_idx": part("I32", (order + 1).astype(np.int32))},
        {"quant_method": "gptq", "bits": 4, "group_size": 16},
    )
    with pytest.raises(CheckpointError, match=r'"layer.g_idx": column \d+ belongs to group 4 of 4'):
        wp.open_checkpoint(outside)


@pytest.mark.parametrize(("rows", "columns", "group"), [(8, 32, 32), (64, 128, 64), (24, 48, 16)])
def test_awq(tmp_path, rows, columns, group):
    codes, zeros, scales = made(9, rows, columns, 4, group, "F16")
    tensors = {
        "layer.qweight": part("I32", eights(codes)),
        "layer.qzeros": part("I32", eights(zeros)),
        "layer.scales": part("F16", scales),
    }
    section = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    place = folder(tmp_path, tensors, section)
    entry = check(place, weight(codes, zeros, scales, np.arange(columns) // group))
    assert entry.format == "awq:int"


def test_layouts_that_are_not_decoded_are_refused(tmp_path):
    codes, zeros, scales = made(9, 8, 32, 4, 32, "F16")
    tensors = {
        "layer.qweight": part("I32", eights(codes)),
        "layer.qzeros": part("I32", eights(zeros)),
        "layer.scales": part("F16", scales),
    }
    place = folder(tmp_path, tensors, {"quant_method": "awq", "bits": 4, "version": "gemv"})
    with pytest.raises(UnsupportedError, match=r'version "gemv" is not decoded'):
        wp.open_checkpoint(place)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8, 2])
@pytest.mark.parametrize(("rows", "columns", "groups"), [(16, 64, 2), (32, 80, 1), (48, 128, 4)])
def test_compressed_tensors(tmp_path, symmetric, bits, rows, columns, groups):
    group = columns // groups
    codes, zeros, scales = made(bits + 20, rows, columns, bits, group, "F32")
    bfloat = (scales.view(np.uint32) & 0xFFFF0000).view(np.float32)
    if symmetric:
        zeros = np.full_like(zeros, 1 << (bits - 1))
    tensors = {
        "layer.weight_packed": part("I32", words(codes, bits).T),
        "layer.weight_scale": part("BF16", np.ascontiguousarray(bfloat.T.view(np.uint32) >> 16).astype(np.uint16)),
        "layer.weight_shape": part("I64", np.array([rows, columns])),
    }
    if not symmetric:
        tensors["layer.weight_zero_point"] = part("I32", words(zeros.T, bits))
    weights = {"num_bits": bits, "symmetric": symmetric, "group_size": group, "strategy": "group"}
    section = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    place = folder(tmp_path, tensors, section)
    entry = check(place, weight(codes, zeros, bfloat, np.arange(columns) // group))
    assert (entry.format, entry.dtype) == ("compressed-tensors:int", "BF16")


def test_a_library_of_its_own_agrees(tmp_path, peer):
    torch = peer("torch")
    pack = peer("compressed_tensors.compressors.pack_quantized.helpers").pack_to_int32
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (24, 72), dtype=torch.int8)
    mine = words((codes.numpy().astype(np.int64) + 8).T, 4).T
    assert np.array_equal(pack(codes, 4).numpy(), mine)


@pytest.mark.parametrize(("to", "name"), [("q8_0", "out.gguf"), ("bf16", "out"), ("nf4", "out")])
def test_gptq_becomes_anything(tmp_path, to, name):
    codes, zeros, scales = made(3, 64, 256, 4, 128, "F16")
    tensors = {
        "layer.qweight": part("I32", words(codes, 4)),
        "layer.qzeros": part("I32", words(zeros.T, 4).T),
        "layer.scales": part("F16", scales),
    }
    place = folder(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 128})
    report = wp.convert(place, tmp_path / name, to=to, arch="none" if to == "q8_0" else None, layers="names")
    expected = weight(codes, zeros + 1, scales, np.arange(256) // 128)
    with wp.open_checkpoint(tmp_path / name) as checkpoint:
        assert set(checkpoint) == {"layer.weight", "norm.weight"}
        found = checkpoint.read("layer.weight", dtype="float32")
        distance = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert distance < {"q8_0": 0.01, "bf16": 0.003, "nf4": 0.12}[to]
        config = checkpoint.config
    told = " ".join(report.warnings)
    assert ("lose precision a second time" in told) == (to != "bf16")
    if config is not None:
        assert ("quantization_config" in config) == (to == "nf4")


def test_gptq_is_decoded_where_a_pattern_keeps_it(tmp_path):
    codes, zeros, scales = made(3, 64, 256, 4, 128, "F16")
    tensors = {
        "layer.qweight": part("I32", words(codes, 4)),
        "layer.qzeros": part("I32", words(zeros.T, 4).T),
        "layer.scales": part("F16", scales),
    }
    place = folder(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 128})
    wp.convert(place, tmp_path / "out", to="bf16", keep=["layer"])
    with wp.open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint["layer.weight"].format in ("f16", "bf16")


def test_codes_without_their_scales_are_refused(tmp_path):
    codes, zeros, _ = made(3, 64, 256, 4, 128, "F16")
    tensors = {"layer.qweight": part("I32", words(codes, 4)), "layer.qzeros": part("I32", words(zeros.T, 4).T)}
    place = folder(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 128})
    with pytest.raises(CheckpointError, match=r'"layer.scales" or "layer.qzeros" is missing'):
        wp.convert(place, tmp_path / "out", to="bf16")
