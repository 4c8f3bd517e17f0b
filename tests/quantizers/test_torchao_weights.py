"""One weight of torchao: packed, rebuilt, decoded, and its size."""

from __future__ import annotations

import json

import pytest

from weightpack.errors import CheckpointError, FormatError
from weightpack.quantizers import torchao_slabs as slabs
from weightpack.quantizers import torchao_weights as weights

KINDS = {
    "int8": lambda q, torch: q.Int8WeightOnlyConfig(),
    "int8_group": lambda q, torch: q.Int8WeightOnlyConfig(granularity=q.PerGroup(32)),
    "int8_tensor": lambda q, torch: q.Int8WeightOnlyConfig(granularity=q.PerTensor()),
    "int8_dynamic": lambda q, torch: q.Int8DynamicActivationInt8WeightConfig(),
    "float8": lambda q, torch: q.Float8WeightOnlyConfig(),
    "float8_tensor": lambda q, torch: q.Float8WeightOnlyConfig(granularity=q.PerTensor()),
    "float8_group": lambda q, torch: q.Float8WeightOnlyConfig(granularity=q.PerGroup(32)),
    "intx2": lambda q, torch: q.IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=q.PerGroup(32)),
    "intx3": lambda q, torch: q.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=q.PerGroup(32)),
    "intx4": lambda q, torch: q.IntxWeightOnlyConfig(weight_dtype=torch.int4),
    "intx8": lambda q, torch: q.IntxWeightOnlyConfig(weight_dtype=torch.int8),
    "int8_dynamic_int4": lambda q, torch: q.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4),
    "nvfp4": lambda q, torch: q.NVFP4WeightOnlyConfig(),
    "nvfp4_blocks": lambda q, torch: q.NVFP4WeightOnlyConfig(use_dynamic_per_tensor_scale=False),
    "mxfp8": lambda q, torch: q.MXDynamicActivationMXWeightConfig(),
}
"""Every kind that packs on a CPU."""

ERROR = {"intx2": 0.4, "intx3": 0.2, "intx4": 0.15, "int8_dynamic_int4": 0.1, "nvfp4": 0.13, "nvfp4_blocks": 0.15}


class Kinds:
    """torchao's config classes, those that are prototypes included."""

    def __init__(self, peer):
        peer("torchao")
        for module in ("torchao.quantization", "torchao.prototype.mx_formats"):
            for name, value in vars(peer(module)).items():
                setattr(self, name, value)

    def __call__(self, name):
        import torch

        return KINDS[name](self, torch)


@pytest.fixture(scope="module")
def kinds(peer):
    return Kinds(peer)


def layer(rows=64, columns=128, dtype="bfloat16", seed=0):
    import torch

    torch.manual_seed(seed)
    return torch.nn.Linear(columns, rows, dtype=getattr(torch, dtype))


def arrays_of(packed):
    names = [*packed.tensor_data_names, *getattr(packed, "optional_tensor_data_names", ())]
    return {name: getattr(packed, name) for name in names if getattr(packed, name) is not None}


def same(one, other):
    import torch

    assert type(one) is type(other)
    mine, theirs = arrays_of(one), arrays_of(other)
    assert set(mine) == set(theirs)
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype
        one, other = (array.reshape(-1).view(torch.uint8) for array in (mine[name], theirs[name]))
        assert torch.equal(one, other), name


@pytest.mark.parametrize("name", KINDS)
def test_a_packed_weight_is_torchaos_own_and_decodes(kinds, name):
    import torch

    module, own = layer(), layer()
    full = module.weight.detach().clone()
    kinds.quantize_(own, kinds(name))
    slabs.pack(module, "weight", kinds(name), name="a.weight")
    same(module.weight, own.weight)
    for dtype in (None, torch.float32):
        decoded = weights.decode(module.weight.detach(), dtype)
        assert type(decoded) is torch.Tensor
        assert decoded.dtype == (dtype or torch.bfloat16)
        error = (decoded.float() - full.float()).norm() / full.float().norm()
        assert error < ERROR.get(name, 0.04)


@pytest.mark.parametrize("name", KINDS)
def test_the_size_is_known_before_and_is_that_of_the_file(kinds, peer, name):
    support = peer("torchao.prototype.safetensors.safetensors_support")
    import torch

    module = layer()
    slabs.pack(module, "weight", kinds(name), name="a.weight")
    planned = weights.packed_size(weights.trial(kinds(name), (64, 128), torch.bfloat16, "meta"))
    stored, _ = support.flatten_tensor_state_dict({"a.weight": module.weight})
    assert planned == weights.packed_size(module.weight)
    assert planned == sum(array.numel() * array.element_size() for array in stored.values())


@pytest.mark.parametrize("place", ["row", "block", "all"])
@pytest.mark.parametrize("name", KINDS)
def test_zeros_stay_zeros(kinds, name, place):
    import torch

    module = layer()
    with torch.no_grad():
        if place == "all":
            module.weight.zero_()
        else:
            module.weight[3, : 128 if place == "row" else 32] = 0
    full = module.weight.detach().clone()
    own = layer()
    own.weight = torch.nn.Parameter(full.clone())
    kinds.quantize_(own, kinds(name))
    slabs.pack(module, "weight", kinds(name), name="a.weight")
    decoded = weights.decode(module.weight.detach(), torch.float32)
    assert torch.isfinite(decoded).all()
    assert not decoded[full == 0].any()
    if name != "mxfp8":
        assert torch.isfinite(module(torch.ones(1, 128, dtype=torch.bfloat16))).all()
    theirs = own.weight.dequantize().float()
    if torch.isfinite(theirs).all():
        same(module.weight, own.weight)
    else:
        # What is not zero is as torchao has it.
        assert torch.equal(decoded.bfloat16()[full != 0], theirs.bfloat16()[full != 0])


def test_torchao_still_makes_nan_of_zeros(kinds):
    # Once this fails, torchao mends pytorch/ao#4713 itself.
    import torch

    for name in ("float8", "nvfp4"):
        module = layer()
        module.weight = torch.nn.Parameter(torch.zeros_like(module.weight))
        kinds.quantize_(module, kinds(name))
        assert torch.isnan(module.weight.dequantize()).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["int8", "float8", "intx4", "nvfp4"])
def test_a_weight_that_is_not_finite_is_refused_by_name(kinds, name, value):
    import torch

    module = layer()
    with torch.no_grad():
        module.weight[1, 2] = value
    with pytest.raises(FormatError, match=rf'{value} at index 130 .*tensor "blocks.0.weight", shape \[64, 128\]'):
        slabs.pack(module, "weight", kinds(name), name="blocks.0.weight")


def test_a_layer_that_torchao_would_leave_in_silence_is_an_error(kinds):
    module = layer(64, 96)
    with pytest.raises(FormatError, match="Int4WeightOnlyConfig leaves this weight as it is") as raised:
        slabs.pack(module, "weight", kinds.Int4WeightOnlyConfig(group_size=64), name="a.weight")
    assert "modules_to_not_convert" in raised.value.hint


@pytest.mark.parametrize("name", KINDS)
def test_a_weight_is_rebuilt_from_the_arrays_of_a_file(kinds, peer, name):
    import torch

    support = peer("torchao.prototype.safetensors.safetensors_support")
    module = layer()
    slabs.pack(module, "weight", kinds(name), name="a.weight")
    stored, metadata = support.flatten_tensor_state_dict({"m.a.weight": module.weight, "m.a.bias": module.bias.data})
    found = weights.FileWeights(metadata)
    assert found
    assert found.component_of("m.a.bias") is None
    assert found.component_of("m.a.weight") is None
    parts = {}
    for key, array in reversed(stored.items()):
        if key != "m.a.bias":
            parameter, component = found.component_of(key)
            assert parameter == "m.a.weight"
            parts[component] = array
    for parameter in ("m.a.weight", "a.weight", "model.m.a.weight"):
        same(found.rebuild(parameter, parts, dtype=torch.bfloat16), module.weight)
    parts.pop("qdata")
    with pytest.raises(CheckpointError, match=r'lacks qdata of the packed tensor "m.a.weight"'):
        found.rebuild("m.a.weight", parts)
    with pytest.raises(CheckpointError, match=r'does not describe the packed tensor "b.weight"'):
        found.rebuild("b.weight", parts)


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"mxfp8"}))
def test_a_rebuilt_weight_computes_in_the_type_of_the_model(kinds, peer, name):
    import torch

    support = peer("torchao.prototype.safetensors.safetensors_support")
    module = layer()
    slabs.pack(module, "weight", kinds(name), name="a.weight")
    stored, metadata = support.flatten_tensor_state_dict({"a.weight": module.weight})
    parts = {key.removeprefix("a._weight_"): array for key, array in stored.items()}
    rebuilt = weights.FileWeights(metadata).rebuild("a.weight", parts, dtype=torch.float32)
    given = torch.randn(3, 128)
    expected = torch.nn.functional.linear(given, module.weight.dequantize().float())
    result = torch.nn.functional.linear(given, rebuilt)
    assert result.dtype == torch.float32
    assert (result - expected).norm() / expected.norm() < 0.02


def test_descriptions_that_are_wrong_are_errors(kinds, peer):
    support = peer("torchao.prototype.safetensors.safetensors_support")
    module = layer()
    slabs.pack(module, "weight", kinds("int8"), name="a.weight")
    stored, metadata = support.flatten_tensor_state_dict({"a.weight": module.weight})
    parts = {key.removeprefix("a._weight_"): array for key, array in stored.items()}
    described = json.loads(metadata["a.weight"])
    for change in ({"_type": "os.system"}, {"_data": {"wrong": 1}}):
        found = weights.FileWeights({"a.weight": json.dumps({**described, **change})})
        with pytest.raises(CheckpointError, match=r'packed tensor "a.weight" does not fit'):
            found.rebuild("a.weight", parts)
    assert not weights.FileWeights({"format": "pt", "a.weight": '{"_type": "Tensor"}', "b": "{", "c": "[1]"})
