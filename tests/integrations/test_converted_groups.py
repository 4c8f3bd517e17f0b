"""Checkpoints of torchao's integers, of groups, and of tensors with one scale, in unmodified hosts: the same
files as a model that the host itself packed and saved, and the same outputs."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest

import weightpack as wp
from weightpack.errors import CheckpointError, ConfigError, UnsupportedError

from .test_converted_rows import assert_same_file, llama, section, stored
from .tiny_diffusers import run, save

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
convert = partial(wp.convert, layers="names")
"""Without a process of the host's own for each conversion: that has tests of its own."""
CASES = {
    "intx4": ("torchao:intx4", 16),
    "intx4 rows": ("torchao:intx4", None),
    "intx2": ("torchao:intx2", 16),
    "intx8": ("torchao:intx8", 80),
    "int8": ("torchao:int8", 16),
    "float8": ("torchao:float8", 16),
    "float8_tensor": ("torchao:float8_tensor", None),
}


def config_of(peer, name, group):
    """What torchao calls a format."""
    ao, torch = peer("torchao.quantization"), peer("torch")
    if name == "torchao:float8_tensor":
        return ao.Float8WeightOnlyConfig(granularity=ao.PerTensor())
    if name == "torchao:int8":
        return ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(group))
    if name == "torchao:float8":
        return ao.Float8WeightOnlyConfig(granularity=ao.PerGroup(group))
    granularity = ao.PerAxis(0) if group is None else ao.PerGroup(group)
    return ao.IntxWeightOnlyConfig(getattr(torch, f"int{name[-1]}"), granularity)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][1] != 80])
def test_in_transformers(peer, tmp_path, case):
    torch, transformers, _ = peer("torch"), peer("transformers"), peer("torchao")
    name, group = CASES[case]
    dtype = torch.float32 if case == "intx2" else torch.bfloat16
    cls, ids = llama(transformers, torch, tmp_path / "source", dtype)
    report = convert(tmp_path / "source", tmp_path / "ours", name, group_size=group)
    assert not report.warnings
    config = transformers.TorchAoConfig(config_of(peer, name, group))
    theirs = cls.from_pretrained(tmp_path / "source", quantization_config=config, dtype=dtype)
    if name == "torchao:float8":
        settle_groups(torch, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_file(torch, tmp_path / "ours/model.safetensors", tmp_path / "theirs/model.safetensors")
    assert section(tmp_path / "ours") == section(tmp_path / "theirs")
    loaded = cls.from_pretrained(tmp_path / "ours", dtype=dtype)
    assert type(loaded.model.layers[0].mlp.up_proj.weight) is type(theirs.model.layers[0].mlp.up_proj.weight)
    logits = theirs(ids).logits
    assert torch.isfinite(logits).all()
    assert torch.equal(loaded(ids).logits, logits)
    assert torch.equal(wp.from_pretrained(cls, tmp_path / "ours", torch_dtype=dtype)(ids).logits, logits)


def settle_groups(torch, model):
    """A group of zeros is NaN there."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ == "Float8Tensor":
            empty = weight.scale == 0
            every = empty.repeat_interleave(weight.qdata.shape[1] // weight.scale.shape[1], 1)
            weight.qdata.view(torch.uint8).masked_fill_(every, 0)
            weight.scale.masked_fill_(empty, torch.finfo(torch.float32).smallest_normal)


@pytest.mark.parametrize("case", ["intx4"])
def test_in_diffusers(peer, tmp_path, case):
    torch, diffusers, _ = peer("torch"), peer("diffusers"), peer("torchao")
    name, group = CASES[case]
    cls = save("flux", diffusers, tmp_path / "source", dtype=torch.bfloat16)
    wp.convert(tmp_path / "source", tmp_path / "ours", name, group_size=group)
    config = diffusers.TorchAoConfig(config_of(peer, name, group))
    theirs = cls.from_pretrained(tmp_path / "source", quantization_config=config, torch_dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs")
    file = "diffusion_pytorch_model.safetensors"
    assert_same_file(torch, tmp_path / "ours" / file, tmp_path / "theirs" / file)
    assert section(tmp_path / "ours") == section(tmp_path / "theirs")
    loaded = cls.from_pretrained(tmp_path / "ours", torch_dtype=torch.bfloat16)
    assert torch.equal(run("flux", loaded), run("flux", theirs))


@pytest.mark.parametrize("case", CASES)
def test_packed_checkpoints_are_sources(peer, tmp_path, case):
    torch, transformers = peer("torch"), peer("transformers")
    name, group = CASES[case]
    llama(transformers, torch, tmp_path / "source", torch.bfloat16)
    packed = tmp_path / "packed"
    report = convert(tmp_path / "source", packed, name, group_size=group)
    kept = {tensor.name for tensor in report.tensors if tensor.format == "bf16" and "proj" in tensor.name}
    # Groups of 80 fit in rows of 80 weights only.
    assert all("down_proj" not in one for one in kept)
    assert len(kept) == (12 if group == 80 else 0)
    assert not wp.inspect(packed).problems
    assert wp.inspect(packed).formats[name]["tensors"] == 14 - len(kept)
    # Copied, with the metadata that belongs to it, asked for or not.
    for number, size in enumerate({group, None}):
        if group != 80 or size == 80:
            again = tmp_path / f"again{number}"
            convert(packed, again, name, group_size=size)
            assert_same_file(torch, again / "model.safetensors", packed / "model.safetensors")
            assert section(again) == section(packed)
    # Decoded, and no word left of what it was; the weights are those that `quantize` stands for.
    convert(packed, tmp_path / "plain", "bf16")
    tensors, metadata = stored(tmp_path / "plain/model.safetensors")
    assert metadata == {"format": "pt"}
    weight = stored(tmp_path / "source/model.safetensors")[0][DOWN]
    parts = wp.quantize(weight, name, block_size=group)
    assert torch.equal(tensors[DOWN], wp.dequantize(parts, name, dtype=torch.bfloat16, block_size=group))
    # On into other formats.
    convert(packed, tmp_path / "nf4", "nf4")
    convert(packed, tmp_path / "model.gguf", "q8_0", arch="none")
    with wp.open_checkpoint(tmp_path / "model.gguf") as gguf, wp.open_checkpoint(packed) as source:
        assert gguf[UP].format == "gguf:q8_0"
        np.testing.assert_allclose(gguf.read(UP), source.read(UP, "float32"), atol=0.002)


def test_rows_that_no_group_divides_are_kept(peer, tmp_path):
    torch, transformers, _ = peer("torch"), peer("transformers"), peer("torchao")
    cls, ids = llama(transformers, torch, tmp_path / "source", torch.bfloat16)
    report = convert(tmp_path / "source", tmp_path / "ours", "torchao:intx4", group_size=32)
    why = {tensor.name: tensor.why for tensor in report.tensors}
    assert "row of 80 weights is not a multiple of block_size 32" in why[DOWN]
    loaded = cls.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    assert type(loaded.model.layers[0].mlp.down_proj.weight) is torch.nn.Parameter
    assert type(loaded.model.layers[0].mlp.up_proj.weight).__name__ == "IntxUnpackedToInt8Tensor"
    assert torch.isfinite(loaded(ids).logits).all()
    with pytest.raises(ConfigError, match="row of 80 weights"):
        convert(
            tmp_path / "source", tmp_path / "no", "torchao:intx4", group_size=32, assign=["down_proj=torchao:intx4"]
        )
    for wrong in ({"to": "torchao:float8_tensor", "group_size": 32}, {"to": "torchao:intx4", "group_size": 0}):
        with pytest.raises(ConfigError, match="group_size"):
            convert(tmp_path / "source", tmp_path / "no", **wrong)


def saved_by_torchao(peer, folder, tensor):
    """A checkpoint of one packed weight, as torchao flattens it."""
    support, save_file = peer("torchao.prototype.safetensors.safetensors_support"), peer("safetensors.torch").save_file
    arrays, metadata = support.flatten_tensor_state_dict({"layer.weight": tensor})
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "torchao"}}))
    save_file(arrays, folder / "model.safetensors", metadata)
    return arrays, metadata


def test_other_choices_of_torchao(peer, tmp_path):
    """Zero points, and scales of another type than the weight's, are decoded and copied; float zero points and
    quantized activations are refused."""
    torch, ao = peer("torch"), peer("torchao.quantization")
    torch.manual_seed(2)
    weight = torch.randn(6, 64, dtype=torch.bfloat16) + 1
    layer = torch.nn.Linear(64, 6, bias=False)

    def packed(**choices):
        layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        ao.quantize_(layer, ao.IntxWeightOnlyConfig(torch.int3, ao.PerGroup(16), **choices))
        return layer.weight.detach()

    for number, choices in enumerate(
        ({"mapping_type": ao.MappingType.ASYMMETRIC}, {"scale_dtype": torch.float32}, {"scale_dtype": torch.float16})
    ):
        tensor = packed(**choices)
        folder = tmp_path / str(number)
        arrays, metadata = saved_by_torchao(peer, folder, tensor)
        with wp.open_checkpoint(folder) as checkpoint:
            assert checkpoint["layer.weight"].format == "torchao:intx3"
            found = torch.from_numpy(checkpoint.read("layer.weight", "float32")).bfloat16()
        assert torch.equal(found, tensor.dequantize())
        convert(folder, tmp_path / f"again{number}", "torchao:intx3")
        again, told = stored(tmp_path / f"again{number}/model.safetensors")
        assert json.loads(told["layer.weight"]) == json.loads(metadata["layer.weight"])
        assert {key: value.dtype for key, value in again.items()} == {k: v.dtype for k, v in arrays.items()}
        assert all(torch.equal(again[key], value) for key, value in arrays.items())
        scale = section(tmp_path / f"again{number}")["quant_type"]["default"]["_data"]["scale_dtype"]
        assert (scale or {}).get("_data") == (str(choices["scale_dtype"])[6:] if "scale_dtype" in choices else None)

    zeros = packed().zero_point.float()
    floats = type(layer.weight)(
        layer.weight.qdata, layer.weight.scale, zeros, torch.int3, (1, 16), torch.bfloat16, None
    )
    saved_by_torchao(peer, tmp_path / "floats", floats)
    with pytest.raises(UnsupportedError, match="not decoded"):
        convert(tmp_path / "floats", tmp_path / "plain", "bf16")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ([1, 24], "row of 64 weights is not a multiple of block_size 24"),
        ([1, 0], "block_size is 0"),
        ([1, 32], r"shape \[6, 4\], expected \[6, 2\]"),
        ([1, 2**63], "not a multiple"),
        ([1, 16, 1], None),
        ([2, 16], None),
    ],
)
def test_metadata_that_lies_is_refused(peer, tmp_path, block, message):
    torch, ao, save_file = peer("torch"), peer("torchao.quantization"), peer("safetensors.torch").save_file
    layer = torch.nn.Linear(64, 6, bias=False)
    ao.quantize_(layer, ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(16)))
    arrays, metadata = saved_by_torchao(peer, tmp_path / "packed", layer.weight.detach())
    described = json.loads(metadata["layer.weight"])
    described["_data"]["block_size"] = block
    save_file(arrays, tmp_path / "packed/model.safetensors", {**metadata, "layer.weight": json.dumps(described)})
    with pytest.raises((CheckpointError, ConfigError, UnsupportedError, ValueError), match=message or "not decoded"):
        convert(tmp_path / "packed", tmp_path / "plain", "bf16")
