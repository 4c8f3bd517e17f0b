"""Weights that the engine packs for torchao: the tensors that torchao makes, from files and from memory."""

from __future__ import annotations

import pytest

import weightpack as wp
from tests.conftest import find_peer
from weightpack.quantizers import torchao
from weightpack.quantizers import torchao_engine as engine

torch = find_peer("torch")
find_peer("torchao")

from safetensors.torch import save_file  # noqa: E402

from tests.quantizers.test_torchao_weights import KINDS, Kinds, same  # noqa: E402

MORE = {
    "int4": lambda q: q.Int4WeightOnlyConfig(group_size=32),
    "intx5_axis": lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int5, granularity=q.PerAxis(0)),
    "dynamic_intx6": lambda q: q.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int6, weight_granularity=q.PerAxis(0)
    ),
    "mxfp4": lambda q: q.MXDynamicActivationMXWeightConfig(
        activation_dtype=torch.float4_e2m1fn_x2, weight_dtype=torch.float4_e2m1fn_x2
    ),
}
LEFT = {
    "asymmetric": lambda q: q.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, mapping_type=find_peer("torchao.quantization").MappingType.ASYMMETRIC
    ),
    "scales of another type": lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, scale_dtype=torch.float32),
    "one bit": lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int1),
    "searched": lambda q: q.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, intx_choose_qparams_algorithm="hqq_scale_only"
    ),
    "columns": lambda q: q.Int8WeightOnlyConfig(granularity=q.PerRow(0)),
    "reduced range": lambda q: q.Int8DynamicActivationInt8WeightConfig(reduce_range=True),
    "e5m2": lambda q: q.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2),
    "floored scales": lambda q: q.MXDynamicActivationMXWeightConfig(
        scaling_mode=find_peer("torchao.prototype.mx_formats.config").ScaleCalculationMode.FLOOR
    ),
    "int4 in tiles": lambda q: q.Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d"),
}
TORCHS_OWN = {"int8_tensor", "nvfp4_blocks"}
BFLOAT16_ONLY = {"mxfp8", "mxfp4"}
SHAPES = [(48, 64), (16, 2752), (144, 96)]


@pytest.fixture(scope="module")
def kinds(peer):
    found = Kinds(peer)
    return lambda name: MORE[name](found) if name in MORE else LEFT[name](found) if name in LEFT else found(name)


def weights(shape, dtype):
    """Random ones, with rows and blocks of zeros, of one number and of very small ones."""
    torch.manual_seed(shape[0])
    made = torch.randn(shape) * torch.rand(shape[0], 1) * 3
    made[1] = 0
    made[2, :32] = 0
    made[3] = -0.7
    made[4:6] *= 1e-6
    made[6, ::3] = 0
    return made.to(dtype)


def by_torchao(weight, config):
    from weightpack.quantizers.torchao_weights import pack_whole

    module = torch.nn.Linear(1, 1, device="meta")
    module.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    pack_whole(module, "weight", config, name="a.weight", is_zero=False)
    return module.weight.data


@pytest.mark.parametrize("name", [*sorted(set(KINDS) - TORCHS_OWN), *sorted(set(MORE) - {"int4"})])
def test_bytes_and_attributes_are_those_of_torchao(kinds, name):
    config = kinds(name)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype != torch.bfloat16 and (name in BFLOAT16_ONLY or (name == "nvfp4" and dtype == torch.float16)):
            continue
        for shape in SHAPES:
            weight = weights(shape, dtype)
            made, expected = engine.pack(weight, config), by_torchao(weight, config)
            same(made, expected)
            assert (made.shape, made.stride(), made.dtype) == (expected.shape, expected.stride(), dtype)
            assert made.__tensor_flatten__() == expected.__tensor_flatten__()


@pytest.mark.parametrize("name", [*LEFT, *sorted(TORCHS_OWN)])
def test_what_is_left_to_torchao(kinds, name):
    assert engine.packing_of(kinds(name)) is None


def test_weights_that_are_left_to_torchao(kinds):
    config = kinds("int8_group")
    assert engine.pack(torch.ones(4, 64), config) is not None
    assert engine.pack(torch.ones(4, 60), config) is None
    assert engine.pack(torch.ones(2, 4, 64), config) is None
    assert engine.pack(torch.ones(4, 64, dtype=torch.float64), config) is None


class Net(torch.nn.Module):
    """One layer."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(96, 144, bias=False)


@pytest.mark.parametrize("name", ["int8_group", "int8_dynamic", "intx4", "float8_tensor", "nvfp4", "mxfp8", "mxfp4"])
def test_a_file_is_packed_by_the_engine(kinds, tmp_path, monkeypatch, name):
    weight, config = weights((144, 96), torch.bfloat16), kinds(name)
    save_file({"layer.weight": weight}, tmp_path / "model.safetensors")
    # Nothing is packed from memory.
    monkeypatch.setattr(engine, "pack", None)
    options = {"quantization_config": wp.TorchAoConfig(config), "torch_dtype": torch.bfloat16}
    model = wp.from_pretrained(Net, tmp_path, **options)
    same(model.layer.weight.data, by_torchao(weight, config))


@pytest.mark.filterwarnings("ignore:Int4WeightOnlyConfig needs:UserWarning")
@pytest.mark.parametrize("from_memory", [False, True])
def test_int4_needs_no_kernels_to_be_packed(kinds, tmp_path, monkeypatch, from_memory):
    """The bytes are those of the format, which has an oracle of its own; torchao's file reads back."""
    config = kinds("int4")
    weight = weights((144, 96), torch.bfloat16)
    save_file({"layer.weight": weight}, tmp_path / "model.safetensors")
    if from_memory:
        monkeypatch.setattr(torchao, "packing_of", lambda one: None)
    options = {"quantization_config": wp.TorchAoConfig(config), "torch_dtype": torch.bfloat16}
    model = wp.from_pretrained(Net, tmp_path, **options)
    packed = model.layer.weight.data
    assert type(packed).__name__ == "Int4Tensor"
    assert packed.shape == weight.shape
    assert packed.dtype == torch.bfloat16
    for name, expected in wp.quantize(weight, "torchao:int4", block_size=32).items():
        assert torch.equal(getattr(packed, name), expected), name
    assert sum(array.nbytes for array in (packed.qdata, packed.scale, packed.zero_point)) == (
        model.hf_quantizer.packed_bytes(model, "layer.weight")
    )
    wp.save_pretrained(model, tmp_path / "saved")
    same(wp.from_pretrained(Net, tmp_path / "saved").layer.weight.data, packed)
    model.hf_quantizer.dequantize(model)
    assert (model.layer.weight.float() - weight.float()).norm() < 0.1 * weight.float().norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have what others lack")
def test_what_int4_lacks_to_run_is_told(kinds):
    quantizer = wp.AutoQuantizer.from_config(wp.TorchAoConfig(kinds("int4")), pre_quantized=False)
    with pytest.warns(UserWarning, match="the package mslk .* to run; without it weights are packed"):
        quantizer.validate_environment()
