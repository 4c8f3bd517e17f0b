"""torchao's config and quantizer: which layers, what they can do, what a machine lacks."""

from __future__ import annotations

import copy
import gc
import json
import weakref

import pytest

import weightpack as wp
from tests.conftest import find_peer
from weightpack.errors import BackendError, CheckpointError, ConfigError, FormatError
from weightpack.quantizers.auto import AutoQuantizer

torch = find_peer("torch")
find_peer("torchao")
quantization = find_peer("torchao.quantization")
mx = find_peer("torchao.prototype.mx_formats")

from tests.quantizers.torchao_models import TOKENS, Net, assert_same, pack  # noqa: E402

RUNNING = {
    "int8": quantization.Int8WeightOnlyConfig(),
    "int8_group": quantization.Int8WeightOnlyConfig(granularity=quantization.PerGroup(32)),
    "int8_dynamic": quantization.Int8DynamicActivationInt8WeightConfig(),
    "float8": quantization.Float8WeightOnlyConfig(),
    "intx2": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=quantization.PerGroup(32)),
    "intx3": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=quantization.PerGroup(32)),
    "intx4": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32)),
    "intx8": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int8),
    "int8_dynamic_int4": quantization.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4),
    "nvfp4": mx.NVFP4WeightOnlyConfig(),
}
"""Configs that pack and run on any CPU."""
ERROR = {"intx2": 0.9, "intx3": 0.35, "intx4": 0.15, "int8_dynamic_int4": 0.15, "nvfp4": 0.2}


def net(dtype=torch.bfloat16, seed=0, width=64):
    torch.manual_seed(seed)
    return Net(width).to(dtype).eval()


# The config.


def test_a_config_goes_to_json_and_back():
    config = wp.TorchAoConfig(
        quantization.Int8WeightOnlyConfig(),
        modules_to_not_convert=["a.b", "c"],
        include_input_output_embeddings=True,
        untie_embedding_weights=True,
    )
    fields = json.loads(config.to_json_string(use_diff=False))
    assert fields["quant_method"] == "torchao"
    assert fields["quant_type"]["default"]["_type"] == "Int8WeightOnlyConfig"
    assert fields["modules_to_not_convert"] == ["a.b", "c"]
    again = AutoQuantizer.from_dict(fields)
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_dict() == config.to_dict()
    assert type(again.build()) is quantization.Int8WeightOnlyConfig
    short = wp.TorchAoConfig("float8")
    assert set(json.loads(short.to_json_string())) == {"quant_method", "quant_type"}
    assert wp.TorchAoConfig.from_dict(json.loads(short.to_json_string())) == short


def test_a_name_an_object_and_a_section_are_the_same_config():
    made = wp.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    assert wp.TorchAoConfig("int8") == made
    assert wp.TorchAoConfig(made.to_dict()["quant_type"]) == made
    assert hash(wp.TorchAoConfig("int8")) == hash(made)
    assert wp.TorchAoConfig("float8") != made
    assert wp.TorchAoConfig("int8", ["x"]) != made
    other = quantization.Int8WeightOnlyConfig(granularity=quantization.PerGroup(32))
    assert wp.TorchAoConfig(other) != made
    assert made != "int8"


def test_the_callers_lists_and_dictionaries_are_not_touched():
    entries, section = ["a"], wp.TorchAoConfig("int4").to_dict()["quant_type"]
    before = copy.deepcopy(section)
    config = wp.TorchAoConfig(section, entries)
    config.to_dict()["quant_type"]["default"]["_data"]["group_size"] = 7
    entries.append("b")
    assert config.modules_to_not_convert == ("a",)
    assert section == before
    assert config.to_dict()["quant_type"] == before


@pytest.mark.parametrize("host", ["transformers", "diffusers"])
def test_the_hosts_read_what_is_written_and_the_other_way_round(host):
    library = find_peer(host)
    config = wp.TorchAoConfig(RUNNING["int8_group"], ["proj"])
    theirs = library.TorchAoConfig.from_dict(config.to_dict())
    assert theirs.quant_type == RUNNING["int8_group"]
    assert theirs.modules_to_not_convert == ["proj"]
    assert AutoQuantizer.from_dict(theirs.to_dict()) == config
    assert AutoQuantizer.as_config(theirs) == config
    assert AutoQuantizer.as_config(theirs).build() == RUNNING["int8_group"]
    by_name = library.TorchAoConfig.from_dict(wp.TorchAoConfig("int8_dynamic").to_dict())
    assert by_name.quant_type == RUNNING["int8_dynamic"]


def test_a_model_that_is_packed_keeps_its_config_without_a_warning(recwarn):
    config = wp.TorchAoConfig("int8")
    merged = AutoQuantizer.merge_quantization_configs(
        config.to_dict(), wp.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    )
    assert merged == config
    assert not recwarn.list
    with pytest.warns(UserWarning, match="packed already"):
        AutoQuantizer.merge_quantization_configs(config.to_dict(), wp.TorchAoConfig("float8"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("int8wo", "is none of int8, int8_dynamic, float8, float8_dynamic, int4, nvfp4"),
        (8, "quant_type is a int, expected a config object of torchao or a name"),
        (None, "quant_type is a NoneType"),
        (quantization.Int8WeightOnlyConfig, "quant_type is the class Int8WeightOnlyConfig"),
        ({"a": 1, "default": {}}, r"has the keys \['a', 'default'\], expected default alone"),
    ],
)
def test_a_quant_type_that_is_none_is_an_error(given, message):
    with pytest.raises(ConfigError, match=message):
        wp.TorchAoConfig(given)


def test_configs_of_old_releases_are_told_as_such():
    old = {"quant_method": "torchao", "quant_type": "int8wo", "quant_type_kwargs": {}}
    with pytest.raises(ConfigError, match="'int8wo' was written by a release") as raised:
        AutoQuantizer.from_dict(old)
    assert "anew" in raised.value.hint
    with pytest.raises(ConfigError, match='has no field "modules_to_not_covert"'):
        wp.TorchAoConfig.from_dict({"quant_type": "int8", "modules_to_not_covert": []})
    with pytest.raises(ConfigError, match="neither True nor False"):
        wp.TorchAoConfig("int8", include_input_output_embeddings=1)


# Which layers, and what becomes of them.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", RUNNING)
def test_layers_are_torchaos_own_and_run(name, dtype):
    model, own = net(dtype), net(dtype)
    full = net(torch.float32)(TOKENS)
    skip = ["odd"] if name == "nvfp4" else []
    quantization.quantize_(
        own,
        RUNNING[name],
        filter_fn=lambda module, path: isinstance(module, torch.nn.Linear) and path not in skip,
    )
    quantizer = pack(model, wp.TorchAoConfig(RUNNING[name], skip), dtype=dtype)
    assert assert_same(model, own) == 3 - len(skip)
    assert set(quantizer.quantized) == {"up", "down", "odd"} - set(skip)
    result = model(TOKENS)
    assert torch.equal(result, own(TOKENS))
    assert (result.float() - full).norm() / full.norm() < ERROR.get(name, 0.08)


@pytest.mark.parametrize("name", RUNNING)
def test_is_trainable_says_whether_gradients_reach_the_input(name):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, dtype=torch.bfloat16))
    full = model[0].weight.detach().float().clone()
    quantizer = pack(model, wp.TorchAoConfig(RUNNING[name]))
    given = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    result = model(given).float().sum()
    if not quantizer.is_trainable:
        assert not result.requires_grad or torch.autograd.grad(result, given, allow_unused=True)[0] is None
        return
    (gradient,) = torch.autograd.grad(result, given)
    assert (gradient.float() - full.sum(0)).norm() / (full.sum(0).norm() * 3**0.5) < ERROR.get(name, 0.08)


@pytest.mark.parametrize("name", ["int8", "float8", "intx4", "nvfp4", "int8_dynamic"])
def test_compiled_layers_give_the_same(name):
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, dtype=torch.bfloat16))
    quantizer = pack(model, wp.TorchAoConfig(RUNNING[name]))
    assert quantizer.is_compileable
    given = torch.randn(3, 64, dtype=torch.bfloat16)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend="aot_eager")(given), model(given))


def test_skip_lists_take_dotted_entries_and_slips_are_told():
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(Net() for _ in range(2))
    quantizer = pack(model, wp.TorchAoConfig("int8", ["blocks.0.up", "odd"]))
    assert set(quantizer.quantized) == {"blocks.1.up", "blocks.0.down", "blocks.1.down"}
    with pytest.warns(UserWarning, match='entry "upp" of the skip list names no layer'):
        pack(net(), wp.TorchAoConfig("int8", ["upp"]))


def test_layers_that_do_not_fit_stay_and_are_told():
    model = net()
    with pytest.warns(UserWarning, match=r"cannot pack 1 layers, they stay as they are: odd \(NVFP4 only supports"):
        quantizer = pack(model, wp.TorchAoConfig("nvfp4"))
    assert set(quantizer.quantized) == {"up", "down"}
    assert type(model.odd.weight) is torch.nn.Parameter
    assert model(TOKENS).isfinite().all()
    small = torch.nn.Sequential(torch.nn.Linear(40, 8), torch.nn.Linear(64, 8))
    with pytest.warns(UserWarning, match="cannot pack 1 layers"):
        quantizer = pack(small, wp.TorchAoConfig(RUNNING["int8_group"]))
    assert set(quantizer.quantized) == {"1"}


def test_the_output_projection_of_attention_is_left_to_torch():
    model = torch.nn.ModuleDict({"a": torch.nn.MultiheadAttention(64, 2, dtype=torch.bfloat16)})
    assert pack(model, wp.TorchAoConfig("int8")).quantized == {}
    given = torch.randn(4, 1, 64, dtype=torch.bfloat16)
    assert model["a"](given, given, given)[0].isfinite().all()


def test_modules_may_have_configs_of_their_own():
    model, own = net(), net()
    config = quantization.FqnToConfig({"up": RUNNING["float8"], "re:d.*": RUNNING["int8_group"], "odd": None})
    quantization.quantize_(own, config, filter_fn=None)
    quantizer = pack(model, wp.TorchAoConfig(config))
    assert assert_same(model, own) == 2
    assert type(model.up.weight).__name__ == "Float8Tensor"
    assert set(quantizer.quantized) == {"up", "down"}
    # Named in full, a module is packed though the host protects it.
    assert set(pack(net(), wp.TorchAoConfig(config), skip=["up", "down"]).quantized) == {"up"}


def test_a_parameter_may_be_packed_by_its_own_name():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gates = torch.nn.Parameter(torch.randn(4, 32, 64))

    model, own = torch.nn.ModuleDict({"e": Experts()}), torch.nn.ModuleDict({"e": Experts()})
    own["e"].gates = torch.nn.Parameter(model["e"].gates.detach().clone())
    config = quantization.FqnToConfig({"e.gates": RUNNING["float8"]})
    quantization.quantize_(own, config, filter_fn=None)
    pack(model, wp.TorchAoConfig(config), dtype=torch.float32)
    assert assert_same(model, own) == 1


def test_only_one_weight_is_alive_in_full():
    model = net().to("meta")
    quantizer = AutoQuantizer.from_config(wp.TorchAoConfig("int8"), pre_quantized=False)
    quantizer.preprocess_model(model)
    alive = []
    for name in ("up.weight", "down.weight"):
        value = torch.randn(model.get_parameter(name).shape, dtype=torch.bfloat16)
        alive.append(weakref.ref(value))
        quantizer.create_quantized_param(model, name, value, device="cpu", dtype=torch.bfloat16)
        del value
        gc.collect()
        assert [one() for one in alive] == [None] * len(alive)


def test_weights_are_packed_in_the_type_that_is_loaded():
    model, own = net(torch.float32), net(torch.float32).bfloat16()
    quantization.quantize_(own, RUNNING["int8"])
    pack(model, wp.TorchAoConfig("int8"))
    assert assert_same(model, own) == 3


def test_a_weight_that_overflows_the_type_is_refused():
    model = net(torch.float32)
    with torch.no_grad():
        model.up.weight[0, 1] = 1e38
    with pytest.raises(FormatError, match=r'inf at index 1 .*tensor "up.weight".* as float16'):
        pack(model, wp.TorchAoConfig("int8"), dtype=torch.float16)


def test_moving_and_decoding():
    model = net()
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    quantizer = pack(model, wp.TorchAoConfig("int8"))
    assert model.to(torch.device("cpu")) is model
    decoded = model.up.weight.dequantize()
    # No circle of references, which would keep the layer in memory.
    assert "extra_repr" not in vars(model.up)
    assert quantizer.dequantize(model, dtype="float32") is model
    assert all(type(value) is torch.Tensor for value in model.state_dict().values())
    assert model.up.weight.dtype == torch.float32
    assert torch.equal(model.up.weight.bfloat16(), decoded)
    assert quantizer.quantized == {}
    for name in ("up", "down", "odd"):
        full = before[f"{name}.weight"].float()
        assert (model.get_submodule(name).weight - full).norm() / full.norm() < 0.01


@pytest.mark.parametrize("name", ["int8", "float8", "nvfp4"])
def test_accelerate_moves_packed_layers_in_and_out(name):
    accelerate = find_peer("accelerate")
    model = net()
    pack(model, wp.TorchAoConfig(name, ["odd"]))
    expected = model(TOKENS)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.up.weight.device.type == "meta"
    assert torch.equal(model(TOKENS), expected)


def test_shared_weights_stay_shared_when_they_are_decoded():
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, dtype=torch.bfloat16) for _ in range(2)))
    quantizer = pack(model, wp.TorchAoConfig("int8"))
    model[1].weight = model[0].weight
    quantizer.dequantize(model)
    assert model[1].weight is model[0].weight
    assert model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", [*RUNNING, "mxfp8"])
def test_planned_sizes_are_the_real_ones(name):
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    config = wp.TorchAoConfig(RUNNING.get(name, name))
    planner = AutoQuantizer.from_config(config, pre_quantized=False)
    planner.update_torch_dtype(torch.bfloat16)
    skeleton = copy.deepcopy(model).to("meta")
    planner.preprocess_model(skeleton)
    assert planner.packed_bytes(skeleton, "0.bias") is None
    planned = planner.packed_bytes(skeleton, "0.weight")
    pack(model, config, dtype=torch.bfloat16)
    weight = model[0].weight
    names = [*weight.tensor_data_names, *getattr(weight, "optional_tensor_data_names", ())]
    arrays = [getattr(weight, name) for name in names if getattr(weight, name) is not None]
    assert planned == sum(array.nbytes for array in arrays)


# What is serializable, and what the machine lacks.


def test_is_serializable_depends_on_the_tensors():
    def serializable(config):
        return AutoQuantizer.from_config(wp.TorchAoConfig(config), pre_quantized=False).is_serializable

    assert serializable("int8")
    assert serializable("int4")
    assert not serializable(quantization.Int4WeightOnlyConfig(int4_packing_format="preshuffled"))
    quantizer = pack(net(), wp.TorchAoConfig("int8"))
    assert quantizer.is_serializable


LACKING = {
    "int4": (None, "a CUDA device of capability 8.0 or later; this machine has no CUDA device"),
    "preshuffled": (quantization.Int4WeightOnlyConfig(int4_packing_format="preshuffled"), "the package mslk 1.0.0"),
    "plain_int32": (quantization.Int4WeightOnlyConfig(int4_packing_format="plain_int32"), "an XPU or NPU"),
    "float8_dynamic": (None, "a CUDA device of capability 8.9 or later, an MI300 or an XPU"),
    "nvfp4_dynamic": (None, "a CUDA device of capability 10.0 or later"),
    "float8_int4": (quantization.Float8DynamicActivationInt4WeightConfig(), "the package mslk"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may have what others lack")
@pytest.mark.parametrize("name", LACKING)
def test_what_is_missing_is_named_before_anything_is_loaded(name):
    config, message = LACKING[name]
    quantizer = AutoQuantizer.from_config(wp.TorchAoConfig(config or name), pre_quantized=False)
    with pytest.raises(BackendError, match=message):
        quantizer.validate_environment()
    # Packed already, it can be moved, decoded and saved here.
    AutoQuantizer.from_config(wp.TorchAoConfig(config or name), pre_quantized=True).validate_environment()


@pytest.mark.parametrize("name", [*RUNNING, "mxfp8", "mxfp4"])
@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, "auto", {"up": "cpu", "": "disk"}])
def test_what_works_is_not_refused(name, device_map):
    quantizer = AutoQuantizer.from_config(wp.TorchAoConfig(RUNNING.get(name, name)), pre_quantized=False)
    quantizer.validate_environment(device_map=device_map)


def test_types_that_a_config_does_not_pack_are_refused_early():
    quantizer = AutoQuantizer.from_config(wp.TorchAoConfig("mxfp8"), pre_quantized=False)
    with pytest.raises(ConfigError, match="MXDynamicActivationMXWeightConfig does not pack weights of float32"):
        quantizer.update_torch_dtype(torch.float32)
    assert quantizer.update_torch_dtype(None) == torch.bfloat16
    nvfp4 = AutoQuantizer.from_config(wp.TorchAoConfig("nvfp4"), pre_quantized=False)
    with pytest.raises(ConfigError, match="float16"):
        nvfp4.update_torch_dtype(torch.float16)
    assert nvfp4.update_torch_dtype(torch.float32) == torch.float32


def test_packed_arrays_without_a_description_are_an_error():
    quantizer = AutoQuantizer.from_config(wp.TorchAoConfig("int8"), pre_quantized=True)
    assert quantizer.component_of("up.bias") is None
    with pytest.raises(CheckpointError, match=r'describes how torchao packed "up\._weight_qdata"'):
        quantizer.component_of("up._weight_qdata")


def test_a_packed_weight_of_another_shape_is_refused():
    support = find_peer("torchao.prototype.safetensors.safetensors_support")
    packed = net()
    pack(packed, wp.TorchAoConfig("int8"))
    flat, metadata = support.flatten_tensor_state_dict({"up.weight": packed.down.weight})
    quantizer = AutoQuantizer.from_config(wp.TorchAoConfig("int8"), pre_quantized=True)
    quantizer.file_metadata = metadata
    parts = {quantizer.component_of(key)[1]: value for key, value in flat.items()}
    with pytest.raises(FormatError, match=r'"up.weight" has shape \[64, 128\], not \[128, 64\]'):
        quantizer.create_quantized_param(net().to("meta"), "up.weight", parts, device="cpu")


# On a CUDA machine.


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["int8", "float8", "int4", "nvfp4", "float8_dynamic", "nvfp4_dynamic"])
def test_on_cuda_layers_are_torchaos_own_and_run(name):
    capability = torch.cuda.get_device_capability()
    needed = {"float8_dynamic": (8, 9), "nvfp4_dynamic": (10, 0), "int4": (8, 0)}.get(name, (0, 0))
    config = wp.TorchAoConfig(name, ["odd"])
    if capability < needed:
        with pytest.raises(BackendError, match="capability"):
            AutoQuantizer.from_config(config, pre_quantized=False).validate_environment()
        return
    model, own = net(width=256).to("meta"), net(width=256).cuda()
    weights = net(width=256).state_dict()
    linear = torch.nn.Linear
    quantization.quantize_(own, config.build(), filter_fn=lambda m, path: isinstance(m, linear) and path != "odd")
    quantizer = AutoQuantizer.from_config(config, pre_quantized=False)
    quantizer.validate_environment(device_map={"": "cuda"})
    quantizer.update_torch_dtype(torch.bfloat16)
    quantizer.preprocess_model(model)
    for key, value in weights.items():
        if quantizer.check_if_quantized_param(model, key):
            quantizer.create_quantized_param(model, key, value, device="cuda", dtype=torch.bfloat16)
        else:
            model.get_submodule(key.rpartition(".")[0])._parameters[key.rpartition(".")[2]] = torch.nn.Parameter(
                value.cuda()
            )
    assert assert_same(model, own) == 2
    assert torch.equal(model(TOKENS.cuda()), own(TOKENS.cuda()))
    decoded = {path: net(width=256).get_submodule(path).weight.float() for path in ("up", "down")}
    quantizer.dequantize(model, dtype=torch.float32)
    for path, full in decoded.items():
        assert (model.get_submodule(path).weight.cpu() - full).norm() / full.norm() < 0.15


@pytest.mark.cuda
def test_weights_for_the_cpu_are_packed_on_cuda_where_only_that_packs():
    model = net(width=256).to("meta")
    quantizer = AutoQuantizer.from_config(wp.TorchAoConfig("int4"), pre_quantized=False)
    quantizer.validate_environment(device_map={"": "cpu"})
    quantizer.update_torch_dtype(torch.bfloat16)
    quantizer.preprocess_model(model)
    full = net(width=256).up.weight.detach()
    quantizer.create_quantized_param(model, "up.weight", full, device="cpu", dtype=torch.bfloat16)
    assert model.up.weight.device.type == "cpu"
    assert model.up.weight.qdata.dtype == torch.int32
    planned = quantizer.packed_bytes(model, "up.weight")
    assert planned == model.up.weight.qdata.nbytes + model.up.weight.scale_and_zero.nbytes


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["int8", "float8", "int4", "nvfp4"])
def test_layers_on_the_cpu_and_on_cuda_run_together(tmp_path, name):
    nets = pytest.importorskip("tests.loading.nets")
    folder = nets.save(tmp_path / "net", nets.make(dtype=torch.bfloat16, width=256), width=256)
    config = wp.TorchAoConfig(name, ["head"])
    one = wp.from_pretrained(nets.Net, folder, quantization_config=config, device_map="cuda")
    two = wp.from_pretrained(nets.Net, folder, quantization_config=config, device_map={"": "cuda", "blocks.0": "cpu"})
    assert set(two.hf_quantizer.quantized) == set(one.hf_quantizer.quantized)
    expected = one(nets.TOKENS.cuda())
    assert (two(nets.TOKENS.cuda()) - expected).norm() / expected.norm() < 0.02
