"""Checkpoints of torchao's packed 4-bit weights: what unmodified hosts and torchao read of them on a CPU.
Only GPUs multiply with such weights, by kernels of MSLK."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

import weightpack as wp
from weightpack.errors import CheckpointError, ConfigError, UnsupportedError

from .test_converted_rows import assert_same_file, llama, section, stored
from .tiny_diffusers import save

NAME = "torchao:int4"
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
ARRAYS = ("qdata", "scale", "zero_point")
convert = partial(wp.convert, layers="names")
"""Without a process of the host's own for each conversion: that has tests of its own."""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_in_transformers(peer, tmp_path, dtype):
    torch, transformers, ao = peer("torch"), peer("transformers"), peer("torchao.quantization")
    dtype = getattr(torch, dtype)
    cls, _ = llama(transformers, torch, tmp_path / "source", dtype)
    report = convert(tmp_path / "source", tmp_path / "ours", NAME, group_size=16)
    assert not report.warnings
    assert not wp.inspect(tmp_path / "ours").problems
    config = transformers.TorchAoConfig(ao.Int4WeightOnlyConfig(group_size=16))
    assert section(tmp_path / "ours") == json.loads(json.dumps(config.to_dict()))
    source = stored(tmp_path / "source/model.safetensors")[0]
    loaded = [
        cls.from_pretrained(tmp_path / "ours", dtype=dtype),
        wp.from_pretrained(cls, tmp_path / "ours", torch_dtype=dtype),
    ]
    for model in loaded:
        packed = {name: one for name, one in model.named_parameters() if type(one).__name__ == "Int4Tensor"}
        assert len(packed) == 14
        for name, weight in packed.items():
            assert (list(weight.block_size), weight.shape, weight.dtype) == ([1, 16], source[name].shape, dtype)
            assert (weight.activation_dtype, weight.act_pre_scale) == (torch.bfloat16, None)
            parts = wp.quantize(source[name], NAME, block_size=16)
            for one in ARRAYS:
                array = getattr(weight, one)
                assert array.is_contiguous()
                assert (array.dtype, array.shape) == (parts[one].dtype, parts[one].shape)
                assert torch.equal(array, parts[one])


def test_a_cpu_computes_once_it_is_decoded(peer, tmp_path):
    """Otherwise torchao says that kernels are missing."""
    torch, transformers, _ = peer("torch"), peer("transformers"), peer("torchao")
    cls, ids = llama(transformers, torch, tmp_path / "source", torch.bfloat16)
    convert(tmp_path / "source", tmp_path / "ours", NAME, group_size=16)
    convert(tmp_path / "ours", tmp_path / "plain", "bf16")
    expected = cls.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    model = wp.from_pretrained(cls, tmp_path / "ours", torch_dtype=torch.bfloat16)
    model.hf_quantizer.dequantize(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_in_diffusers(peer, tmp_path):
    torch, diffusers, ao = peer("torch"), peer("diffusers"), peer("torchao.quantization")
    cls = save("flux", diffusers, tmp_path / "source", dtype=torch.bfloat16)
    report = convert(tmp_path / "source", tmp_path / "ours", NAME, group_size=16)
    config = diffusers.TorchAoConfig(ao.Int4WeightOnlyConfig(group_size=16))
    assert section(tmp_path / "ours") == json.loads(json.dumps(config.to_dict()))
    packed = {tensor.name for tensor in report.tensors if tensor.format == NAME}
    source = stored(tmp_path / "source/diffusion_pytorch_model.safetensors")[0]
    model = cls.from_pretrained(tmp_path / "ours", torch_dtype=torch.bfloat16)
    found = {name: one for name, one in model.named_parameters() if type(one).__name__ == "Int4Tensor"}
    assert found.keys() == packed
    for name, weight in found.items():
        parts = wp.quantize(source[name], NAME, block_size=16)
        assert all(torch.equal(getattr(weight, one), parts[one]) for one in ARRAYS)


def test_as_torchao_flattens(peer, tmp_path):
    """There and back through torchao's own functions."""
    torch, transformers = peer("torch"), peer("transformers")
    support = peer("torchao.prototype.safetensors.safetensors_support")
    llama(transformers, torch, tmp_path / "source", torch.bfloat16)
    convert(tmp_path / "source", tmp_path / "ours", NAME, group_size=16)
    arrays, metadata = stored(tmp_path / "ours/model.safetensors")
    tensors, left = support.unflatten_tensor_state_dict(arrays, metadata)
    assert not left
    assert type(tensors[UP]).__name__ == "Int4Tensor"
    again, told = support.flatten_tensor_state_dict(tensors)
    assert again.keys() == arrays.keys()
    assert all(torch.equal(again[name], array) for name, array in arrays.items())
    assert {name: json.loads(text) for name, text in told.items()} == {
        name: json.loads(text) for name, text in metadata.items() if name != "format"
    }


def test_as_torchao_packs(peer, tmp_path):
    """The same file as a model that transformers and torchao packed, where MSLK's functions are there."""
    from ..oracles import int4_peer

    torch, transformers, ao = peer("torch"), peer("transformers"), peer("torchao.quantization")
    cls, _ = llama(transformers, torch, tmp_path / "source", torch.bfloat16)
    convert(tmp_path / "source", tmp_path / "ours", NAME, group_size=16)
    with int4_peer.given():
        config = transformers.TorchAoConfig(ao.Int4WeightOnlyConfig(group_size=16))
        theirs = cls.from_pretrained(tmp_path / "source", quantization_config=config, dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_file(torch, tmp_path / "ours/model.safetensors", tmp_path / "theirs/model.safetensors")
    assert section(tmp_path / "ours") == section(tmp_path / "theirs")


@pytest.mark.cuda
def test_on_cuda(peer, tmp_path):
    """As near to the model as the weights that are decoded on the CPU."""
    torch, transformers, _ = peer("torch"), peer("transformers"), peer("mslk.gemm")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    cls = transformers.LlamaForCausalLM
    cls(config).bfloat16().save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ours", NAME)
    convert(tmp_path / "ours", tmp_path / "plain", "bf16")
    ids = torch.arange(24, device="cuda").reshape(2, 12)
    with torch.no_grad():
        found, expected = (
            cls.from_pretrained(tmp_path / name, dtype=torch.bfloat16, device_map="cuda")(ids).logits.float()
            for name in ("ours", "plain")
        )
    assert (found - expected).norm() <= 0.05 * expected.norm()


def test_packed_checkpoints_are_sources(peer, tmp_path):
    torch, transformers = peer("torch"), peer("transformers")
    llama(transformers, torch, tmp_path / "source", torch.bfloat16)
    packed = tmp_path / "packed"
    convert(tmp_path / "source", packed, NAME, group_size=16)
    assert wp.inspect(packed).formats[NAME]["tensors"] == 14
    # Copied, with the metadata that belongs to it, asked for or not.
    for number, size in enumerate((16, None)):
        report = convert(packed, tmp_path / f"again{number}", NAME, group_size=size)
        assert sum(tensor.copied for tensor in report.tensors) == len(report.tensors)
        assert_same_file(torch, tmp_path / f"again{number}/model.safetensors", packed / "model.safetensors")
        assert section(tmp_path / f"again{number}") == section(packed)
    # Decoded, and no word left of what it was; the weights are those that `quantize` stands for.
    convert(packed, tmp_path / "plain", "bf16")
    tensors, metadata = stored(tmp_path / "plain/model.safetensors")
    assert metadata == {"format": "pt"}
    source = stored(tmp_path / "source/model.safetensors")[0]
    for name in (UP, DOWN):
        parts = wp.quantize(source[name], NAME, block_size=16)
        assert torch.equal(tensors[name], wp.dequantize(parts, NAME, dtype=torch.bfloat16, block_size=16))
    # On into other formats.
    for number, other in enumerate(("torchao:int8", "quanto:int4")):
        convert(packed, tmp_path / f"other{number}", other)
        assert wp.inspect(tmp_path / f"other{number}").formats[other]["tensors"] == 14
    convert(packed, tmp_path / "model.gguf", "q8_0", arch="none")
    with wp.open_checkpoint(tmp_path / "model.gguf") as gguf, wp.open_checkpoint(packed) as checkpoint:
        np.testing.assert_allclose(gguf.read(UP), checkpoint.read(UP, "float32"), atol=0.002)


def test_rows_that_no_group_divides_are_kept(peer, tmp_path):
    torch, transformers = peer("torch"), peer("transformers")
    llama(transformers, torch, tmp_path / "source", torch.bfloat16)
    report = convert(tmp_path / "source", tmp_path / "ours", NAME, group_size=32)
    why = {tensor.name: tensor.why for tensor in report.tensors}
    assert "row of 80 weights is not a multiple of block_size 32" in why[DOWN]
    assert {tensor.format for tensor in report.tensors if tensor.name == UP} == {NAME}
    with pytest.raises(ConfigError, match="row of 80 weights"):
        convert(tmp_path / "source", tmp_path / "no", NAME, group_size=32, assign=[f"down_proj={NAME}"])


def described(**changes):
    attributes = {
        "activation_dtype": {"_type": "torch.dtype", "_data": "bfloat16"}, "block_size": [1, 16], "shape": [6, 64],
    }  # fmt: skip
    return {"_type": "Int4Tensor", "_data": {**attributes, **changes}, "_tensor_data_names": list(ARRAYS)}


@pytest.mark.parametrize(
    ("changes", "shapes", "message"),
    [
        ({"block_size": [1, 24]}, {}, "row of 64 weights is not a multiple of block_size 24"),
        ({"block_size": [1, 0]}, {}, "block_size is 0"),
        ({"block_size": [1, 32]}, {}, r"shape \[4, 6\], expected \[2, 6\]"),
        ({"block_size": [1, 2**63]}, {}, "not a multiple"),
        ({"block_size": [16, 1]}, {}, "not decoded"),
        ({"block_size": [1, 1, 16]}, {}, "not decoded"),
        ({"shape": [64, 6]}, {}, "not decoded"),
        ({"activation_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"}}, {}, "not decoded"),
        ({}, {"scale": (6, 4)}, r"shape \[6, 4\], expected \[4, 6\]"),
        ({}, {"zero_point": (2, 12)}, r"shape \[2, 12\], expected \[4, 6\]"),
        ({}, {"act_pre_scale": (64,)}, "not decoded"),
    ],
)
def test_what_is_not_this_format_is_refused(tmp_path, safetensors_file, changes, shapes, message):
    """Also what torchao has of this class beside it: float8 activations, activations that are scaled, transposed."""
    found = described(**changes)
    arrays = {"qdata": (6, 32), "scale": (4, 6), "zero_point": (4, 6), **shapes}
    found["_tensor_data_names"] = list(arrays)
    tensors = {
        f"layer._weight_{name}": ("I8" if name == "qdata" else "BF16", list(shape), bytes(np.prod(shape) * size))
        for name, shape in arrays.items()
        for size in [1 if name == "qdata" else 2]
    }
    folder = tmp_path / "packed"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "torchao"}}))
    metadata = {"layer.weight": json.dumps(found), "tensor_names": json.dumps(["layer.weight"])}
    safetensors_file(folder / "model.safetensors", tensors, metadata)
    with pytest.raises((CheckpointError, ConfigError, UnsupportedError, ValueError), match=message):
        convert(folder, tmp_path / "plain", "bf16")


def test_other_packings_are_refused_by_name(tmp_path, safetensors_file):
    others = {
        "Int4TilePackedTo4dTensor": ("qdata", "scale_and_zero"),
        "Int4PlainInt32Tensor": ("qdata", "scale", "zero_point"),
        "Int4PreshuffledTensor": ("qdata", "group_scale", "group_zero"),
    }
    for number, (kind, names) in enumerate(others.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "torchao"}}))
        found = {**described(), "_type": kind, "_tensor_data_names": names}
        metadata = {"layer.weight": json.dumps(found), "tensor_names": json.dumps(["layer.weight"])}
        tensors = {f"layer._weight_{name}": ("BF16", [4, 6], bytes(48)) for name in names}
        safetensors_file(folder / "model.safetensors", tensors, metadata)
        with pytest.raises(UnsupportedError, match="not decoded"):
            convert(folder, tmp_path / "plain", "bf16")
