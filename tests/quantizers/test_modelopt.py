"""ModelOpt's layers, filled while a model is loaded: its bytes, its outputs, on any device."""

from __future__ import annotations

import copy
import warnings

import pytest

import weightpack as wp
from tests.conftest import find_peer
from weightpack.errors import BackendError, CheckpointError, ConfigError, FormatError

torch = find_peer("torch")
find_peer("modelopt")

with warnings.catch_warnings():
    # It warns of kernels that a machine without CUDA does not have.
    warnings.simplefilter("ignore")
    mtq = find_peer("modelopt.torch.quantization")

from tests.quantizers.modelopt_models import Net, inputs, load, make, raw, save, whole  # noqa: E402

Config = wp.NVIDIAModelOptConfig

# Layers whose shapes are no whole blocks are told of, and ModelOpt of CUDA that is not there.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*stay in full precision"),
    pytest.mark.filterwarnings("ignore:.*extension"),
    pytest.mark.filterwarnings("ignore:.*model_fields"),
    pytest.mark.filterwarnings("ignore:.*[Rr]eal.quant"),
]

KINDS = {
    "fp8": Config("FP8"),
    "fp8 rows": Config("FP8", channel_quantize=0),
    "fp8 blocks": Config("FP8", block_quantize=32),
    "int8": Config("INT8"),
    "int8 rows": Config("INT8", channel_quantize=0),
    "int8 columns": Config("INT8", channel_quantize=1),
    "int8 blocks": Config("INT8", block_quantize=26),
    "int4": Config("INT4"),
    "int4 of 32": Config("INT4", block_quantize=32),
    "nf4": Config("NF4"),
    "nf4 of 128": Config("NF4", block_quantize=128, scale_block_quantize=8),
    "nvfp4": Config("NVFP4"),
    "nvfp4 of 32": Config("NVFP4", block_quantize=32),
}
ERRORS = {"FP8": 0.05, "INT8": 0.012, "INT4": 0.16, "NF4": 0.2, "NVFP4": 0.18}
PLAIN = [kind for kind in KINDS if " " not in kind]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_outputs_are_those_of_modelopt(tmp_path, kind, dtype):
    config = KINDS[kind]
    net = make(dtype=dtype)
    x = inputs(dtype)
    before = net(x)
    model = load(save(tmp_path / "net", net), config, torch_dtype=dtype)
    packed = list(model.hf_quantizer.quantized)
    assert "lm_head" not in packed
    theirs = whole(net, config, packed)
    ours = model.state_dict()
    expected = theirs.state_dict()
    # The largest of each block is in ModelOpt's state besides its scale.
    spare = {name for name in expected if name.endswith("_amax")} - set(ours)
    assert not spare or "block" in kind or kind.split()[0] in ("int4", "nf4")
    assert set(ours) == set(expected) - spare
    for name, value in ours.items():
        assert value.dtype == expected[name].dtype, name
        assert value.shape == expected[name].shape, name
        assert torch.equal(raw(value), raw(expected[name])), name
    for path in packed:
        assert type(model.get_submodule(path)) is type(theirs.get_submodule(path)), path
    found = model(x)
    if config.weight_type != "NF4":
        for one, other in zip(found, theirs(x), strict=True):
            assert torch.equal(one, other)
    for one, other in zip(found, before, strict=True):
        assert (one - other).norm() < ERRORS[config.weight_type] * other.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_packed_loads_from_its_config_alone(tmp_path, kind):
    # ModelOpt restores its own state, unpickled, and not on the meta device (NVIDIA/Model-Optimizer#185).
    model = load(save(tmp_path / "net", make(dtype=torch.bfloat16)), KINDS[kind])
    x = inputs(torch.bfloat16)
    state = model.state_dict()
    folder = save(tmp_path / "packed", state, model.hf_quantizer.config.to_dict())
    again = load(folder)
    found = again.state_dict()
    assert list(found) == list(state)
    for name, value in state.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(raw(found[name]), raw(value)), name
    assert [type(one) for one in again.modules()] == [type(one) for one in model.modules()]
    for one, other in zip(again(x), model(x), strict=True):
        assert torch.equal(one, other)
    assert again.hf_quantizer.is_serializable
    assert again.hf_quantizer.is_trainable
    assert not again.hf_quantizer.is_compileable


@pytest.mark.parametrize("kind", KINDS)
def test_turned_back_the_outputs_stay(tmp_path, kind):
    finer = load(save(tmp_path / "other", make(dtype=torch.bfloat16)), KINDS[kind])
    is_packed = "wide" in finer.hf_quantizer.quantized
    finer.hf_quantizer.dequantize(finer, dtype="float32")
    if is_packed:
        # Rounded to float32 alone, and not to the type of the packed weight before.
        assert finer.wide.weight.dtype == torch.float32
        assert not torch.equal(finer.wide.weight, finer.wide.weight.bfloat16().float())
    model = load(save(tmp_path / "net", make(dtype=torch.bfloat16)), KINDS[kind])
    x = inputs(torch.bfloat16)
    expected = model(x)
    quantizer = model.hf_quantizer
    assert quantizer.dequantize(model) is model
    for one, other in zip(model(x), expected, strict=True):
        assert torch.equal(one, other)
    assert torch.allclose(model.wide.weight.float(), finer.wide.weight.float(), rtol=0.01, atol=1e-4)
    assert [type(one) for one in model.modules()] == [type(one) for one in Net().modules()]
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    assert list(model.state_dict()) == list(Net().state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_known_before_anything_is_read(kind, dtype):
    quantizer = wp.AutoQuantizer.from_config(KINDS[kind], pre_quantized=False)
    quantizer.torch_dtype = dtype
    with torch.device("meta"):
        model = Net()
    quantizer.preprocess_model(model)
    for name, value in make(dtype=dtype).named_parameters():
        expected = quantizer.packed_bytes(model, name)
        if expected is None:
            assert name.rpartition(".")[0] not in quantizer.quantized or name.endswith("bias")
            continue
        quantizer.create_quantized_param(model, name, value.detach(), device="cpu", dtype=dtype)
        layer = model.get_submodule(name.rpartition(".")[0])
        found = sum(one.nbytes for part, one in layer.state_dict().items() if part != "bias")
        assert found == expected, name


def test_nf4_beyond_one_block_of_scales(tmp_path):
    # ModelOpt 0.47 packs it and cannot decode it; where there is one block it can, and values are its own.
    from modelopt.torch.quantization.qtensor import NF4QTensor

    from weightpack.quantizers import modelopt_decode

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight = torch.randn(24, 96, dtype=dtype)
        packed, scales = NF4QTensor.quantize(weight, 64, 256)
        scale, double_scale, zeros = NF4QTensor.double_quantization(scales, 256, 8)
        parts = {"scale": scale, "double_scale": double_scale, "scale_zeros": zeros, "block_sizes": {-1: 64}}
        expected = packed.dequantize(**parts)
        found = modelopt_decode.nf4(packed._quantized_data, scale, double_scale, zeros, weight.shape, dtype, 64)
        assert torch.equal(found, expected)
    model = load(save(tmp_path / "net", make()), Config("NF4"))
    broken = whole(make(), Config("NF4"), ["wide"])
    with pytest.raises(RuntimeError, match="must match"):
        broken(inputs())
    layer = model.wide
    decoded = layer.weight_quantizer(layer.weight)
    assert (decoded - make().wide.weight).norm() < 0.11 * decoded.norm()


@pytest.mark.parametrize("kind", ["fp8 rows", "int8 columns", "int4 of 32", "nf4 of 128", "nvfp4 of 32"])
def test_slabs_change_nothing(tmp_path, monkeypatch, kind):
    slab = 1 << 12
    from weightpack.quantizers import modelopt_decode, modelopt_layers

    folder = save(tmp_path / "net", make())
    expected = load(folder, KINDS[kind])
    whole_slabs = modelopt_layers._slabs
    monkeypatch.setattr(modelopt_decode, "SLAB_WEIGHTS", slab)
    monkeypatch.setattr(
        modelopt_layers,
        "_slabs",
        lambda count, weights, multiple=1, most=0: whole_slabs(count, weights, multiple, slab),
    )
    found = load(folder, KINDS[kind])
    for name, value in expected.state_dict().items():
        assert torch.equal(raw(found.state_dict()[name]), raw(value)), name
    for one, other in zip(found(inputs()), expected(inputs()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["fp8", "fp8 rows", "fp8 blocks", "int8", "int8 rows", "int8 of 32", "nvfp4"])
def test_the_engine_packs_as_modelopt_does(tmp_path, monkeypatch, kind):
    """Ties, powers, spreads, huge ones and rows of zeros; from a file, from memory, and in torch operations."""
    from tests.oracles.test_modelopt import adversarial
    from weightpack.quantizers import modelopt_engine, modelopt_layers

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(256, 128, bias=False) for _ in range(10))

    config = KINDS.get(kind, Config("INT8", block_quantize=32))
    asked = []
    whole = modelopt_layers.of_engine
    monkeypatch.setattr(modelopt_layers, "of_engine", lambda *rest: asked.append(1) or whole(*rest))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        cases = [weight for _, weight in adversarial(dtype)]
        cases += [torch.zeros(128, 256), torch.randn(128, 256, generator=torch.Generator().manual_seed(1))]
        state = {f"layers.{number}.weight": weight for number, weight in enumerate(cases)}
        folder = save(tmp_path / str(dtype), state)
        made = [load(folder, config, kind=Layers, torch_dtype=dtype)]
        with monkeypatch.context() as patch:
            patch.setattr(modelopt_engine, "is_whole", lambda *_: False)
            made.append(load(folder, config, kind=Layers, torch_dtype=dtype))
            assert len(asked) == 20
            patch.setattr(modelopt_engine, "form_of", lambda *_: None)
            expected = load(folder, config, kind=Layers, torch_dtype=dtype).state_dict()
        assert len(asked) == 20
        asked.clear()
        for found in (model.state_dict() for model in made):
            assert list(found) == list(expected)
            for key, value in expected.items():
                assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
                ours, theirs = raw(found[key]), raw(value)
                if kind.startswith("fp8") and key.endswith("weight"):
                    # Zeros of a block of zeros have a sign in torch operations.
                    ours, theirs = (codes.masked_fill(codes == 0x80, 0) for codes in (ours, theirs))
                assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zeros", ["all", "rows"])
def test_zeros_stay_zeros(tmp_path, kind, dtype, zeros):
    net = make(dtype=dtype)
    with torch.no_grad():
        for layer in (net.wide, net.odd, net.up, net.conv):
            layer.weight[: None if zeros == "all" else 4] = 0
    model = load(save(tmp_path / "net", net), KINDS[kind], torch_dtype=dtype)
    assert all(torch.isfinite(part).all() for part in model(inputs(dtype)))
    quantized = list(model.hf_quantizer.quantized)
    model.hf_quantizer.dequantize(model)
    for path in quantized:
        weight = model.get_submodule(path).weight
        assert torch.isfinite(weight).all(), path
        if zeros == "all" or path == "wide" or "block" not in kind:
            assert not weight[: len(weight) if zeros == "all" else 4].any(), path


@pytest.mark.parametrize("kind", ["fp8", "fp8 rows", "fp8 blocks", "int8", "int8 columns", "int8 blocks"])
def test_weights_too_small_for_a_scale_are_finite(tmp_path, kind):
    # ModelOpt stores NaN in FP8.
    net = make(dtype=torch.float16)
    with torch.no_grad():
        for layer in (net.wide, net.odd, net.up, net.conv):
            layer.weight *= 2e-6
    model = load(save(tmp_path / "net", net), KINDS[kind], torch_dtype=torch.float16)
    model.hf_quantizer.dequantize(model)
    for name, value in model.named_parameters():
        assert torch.isfinite(value).all(), name
        assert not name.endswith("weight") or value.abs().max() <= 2 * net.get_parameter(name).abs().max(), name


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(tmp_path, kind, value):
    net = make()
    with torch.no_grad():
        net.up.weight[300, 7] = value
    with pytest.raises(FormatError, match=r"at \[300, 7\].*\"up.weight\""):
        load(save(tmp_path / "net", net), KINDS[kind])


def test_skip_lists_are_those_of_every_backend(tmp_path):
    # diffusers adds to the mapping that ModelOpt's list is no longer: a TypeError there.
    folder = save(tmp_path / "net", make())
    model = load(folder, Config("FP8", modules_to_not_convert=["up", "re:^od+$"]))
    assert list(model.hf_quantizer.quantized) == ["wide", "conv"]
    assert type(model.up) is type(model.odd) is torch.nn.Linear
    assert torch.equal(model.up.weight, make().up.weight)
    model = load(folder, Config("FP8", disable_conv_quantization=True))
    assert list(model.hf_quantizer.quantized) == ["wide", "odd", "up"]
    with pytest.warns(UserWarning, match='"sideways" of the skip list'):
        load(folder, Config("FP8", modules_to_not_convert=["sideways"]))
    model = load(folder, Config("FP8"), keep_in_fp32_modules=["odd"], torch_dtype=torch.bfloat16)
    assert type(model.odd) is torch.nn.Linear
    assert model.odd.weight.dtype == torch.float32


def test_shapes_that_are_no_blocks_are_told(tmp_path):
    with pytest.warns(UserWarning, match=r"2 layers stay in full precision.*NVFP4: odd, conv"):
        model = load(save(tmp_path / "net", make()), Config("NVFP4"))
    assert list(model.hf_quantizer.quantized) == ["wide", "up"]


def test_a_config_of_modelopts_own(tmp_path):
    folder = save(tmp_path / "net", make())
    preset = {**mtq.INT8_WEIGHT_ONLY_CFG}
    model = load(folder, Config("INT8", modelopt_config=preset))
    assert list(model.hf_quantizer.quantized) == ["wide", "odd", "up", "conv"]
    assert torch.equal(model(inputs())[0], load(folder, Config("INT8", channel_quantize=0))(inputs())[0])
    mixed = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8}},
        {"quantizer_name": "up.weight_quantizer", "cfg": {"num_bits": (4, 3)}},
        {"quantizer_name": "*", "parent_class": "nn.Conv2d", "enable": False},
    ]
    model = load(folder, Config("INT8", modelopt_config={"quant_cfg": mixed}))
    types = {name: value.dtype for name, value in model.state_dict().items() if name.endswith("weight")}
    assert types["wide.weight"] == types["lm_head.weight"] == torch.int8
    assert types["up.weight"] == torch.float8_e4m3fn
    assert types["conv.weight"] == torch.float32
    for algorithm in ("awq_lite", {"method": "smoothquant"}):
        with pytest.raises(ConfigError, match="needs the whole model"):
            load(folder, Config("INT8", modelopt_config={**preset, "algorithm": algorithm}))
    for cfg, told in (({"num_bits": (2, 3)}, "none of the packed forms"), ({"num_bits": 8, "nim": 1}, "nim")):
        entries = [{"quantizer_name": "*weight_quantizer", "cfg": cfg}]
        with pytest.raises(ConfigError, match=told):
            load(folder, Config("INT8", modelopt_config={"quant_cfg": entries}))


@pytest.mark.parametrize("kind", ["FP8_FP8", "INT8_INT8", "NVFP4_FP8", "FP8_INT4"])
def test_activations_have_ranges_of_their_own_or_those_of_a_loop(tmp_path, kind):
    net = make()
    x = inputs()
    folder = save(tmp_path / "net", net)
    dynamic = load(folder, Config(kind))
    assert dynamic.wide.input_quantizer.is_enabled
    assert not any("input_quantizer" in name for name in dynamic.state_dict())
    calls = []

    def loop(model):
        calls.append(model)
        model(x)

    fixed = load(folder, Config(kind, forward_loop=loop))
    assert calls == [fixed]
    ranges = {name: value for name, value in fixed.state_dict().items() if "input_quantizer" in name}
    assert list(ranges) == [f"{path}.input_quantizer._amax" for path in fixed.hf_quantizer.quantized]
    assert ranges["wide.input_quantizer._amax"] == x.abs().max()
    for one, other in zip(fixed(x), dynamic(x), strict=True):
        # On the inputs that the loop saw, the ranges are the same but for what came before.
        assert (one - other).norm() < (0.05 if kind != "FP8_INT4" else 0.25) * other.norm()
    # Inputs beyond the range are cut off, and in the other model they are not.
    assert not torch.allclose(fixed(x * 8)[0], dynamic(x * 8)[0], rtol=0.1)
    weight_only = load(folder, Config(kind, weight_only=True))
    assert not weight_only.wide.input_quantizer.is_enabled
    again = load(save(tmp_path / "packed", fixed.state_dict(), fixed.hf_quantizer.config.to_dict()))
    assert set(again.state_dict()) == set(fixed.state_dict())
    for one, other in zip(again(x), fixed(x), strict=True):
        assert torch.equal(one, other)


def test_activations_are_quantized_as_modelopt_does(tmp_path):
    net, x = make(), inputs()
    model = load(save(tmp_path / "net", net), Config("FP8_FP8", forward_loop=lambda one: one(x)))
    config = Config("FP8_FP8")
    theirs = whole(net, config, list(model.hf_quantizer.quantized))
    for path in model.hf_quantizer.quantized:
        theirs.get_submodule(path).input_quantizer.amax = model.get_submodule(path).input_quantizer.amax
    for one, other in zip(model(x), theirs(x), strict=True):
        assert torch.equal(one, other)


def test_activations_in_nvfp4_need_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    quantizer = wp.AutoQuantizer.from_config(Config("NVFP4_NVFP4"), pre_quantized=False)
    with pytest.raises(BackendError, match="on a CUDA device only"):
        quantizer.validate_environment(device_map={"": "cpu"})
    wp.AutoQuantizer.from_config(Config("NVFP4"), pre_quantized=False).validate_environment()


def test_old_releases_are_refused(monkeypatch):
    import modelopt

    monkeypatch.setattr(modelopt, "__version__", "0.39.0")
    quantizer = wp.AutoQuantizer.from_config(Config("FP8"), pre_quantized=False)
    with pytest.raises(BackendError, match=r"0\.39\.0 is too old"):
        quantizer.validate_environment()


def broken(state, change):
    state = {name: value.clone() for name, value in state.items()}
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("up.weight_quantizer._double_scale"), r'no component "_double_scale".*"up.weight"'),
        (
            lambda state: state.update({"up.weight_quantizer._scale": torch.ones(7)}),
            r'"_scale" holds 7 numbers, expected 512 .*"up.weight", shape \[512, 64\]',
        ),
        (lambda state: state.update({"up.weight": state["up.weight"][:-1]}), "holds 16383 numbers, expected 16384"),
        (lambda state: state.update({"up.weight": state["up.weight"].view(torch.int8)}), "stored as torch.int8"),
    ],
)
def test_packed_weights_that_are_not_whole_are_refused(tmp_path, change, told):
    model = load(save(tmp_path / "net", make()), Config("NF4"))
    state = broken(model.state_dict(), change)
    with pytest.raises(CheckpointError, match=told):
        load(save(tmp_path / "packed", state, model.hf_quantizer.config.to_dict()))


def test_codes_without_scales_are_not_taken_for_weights(tmp_path):
    model = load(save(tmp_path / "net", make()), Config("FP8"))
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("up.weight_quant")}
    with pytest.raises(CheckpointError, match=r'"up\.weight" is stored as F8_E4M3, and has no scale'):
        load(save(tmp_path / "packed", state, Config("FP8").to_dict()))


def test_weights_saved_before_they_were_compressed(tmp_path):
    # As diffusers saves with ModelOpt: ranges are there, the weights are not packed.
    net = make()
    folder = save(tmp_path / "net", net)
    expected = load(folder, Config("FP8"))
    state = {**net.state_dict(), "wide.weight_quantizer._amax": net.wide.weight.abs().max()}
    model = load(save(tmp_path / "ranges", state, Config("FP8").to_dict()))
    assert list(model.hf_quantizer.quantized) == ["wide"]
    assert torch.equal(raw(model.wide.weight), raw(expected.wide.weight))


@pytest.mark.parametrize("kind", PLAIN)
def test_adapters_can_be_trained_on_top(tmp_path, kind):
    model = load(save(tmp_path / "net", make()), KINDS[kind])
    x = inputs().requires_grad_()
    model(x)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert not any(one.weight.requires_grad for one in (model.wide, model.up))


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"wide": "cpu", "": "cpu"}])
def test_device_maps(tmp_path, kind, device_map):
    folder = save(tmp_path / "net", make())
    expected = load(folder, KINDS[kind])
    model = load(folder, KINDS[kind], device_map=device_map)
    for one, other in zip(model(inputs()), expected(inputs()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", PLAIN)
def test_copies_and_offloaded_models_run_alike(tmp_path, kind):
    accelerate = find_peer("accelerate")
    folder = save(tmp_path / "net", make())
    model = load(folder, KINDS[kind])
    expected = model(inputs())
    again = copy.deepcopy(model)
    assert again.wide.weight.data_ptr() != model.wide.weight.data_ptr()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.wide._parameters["weight"].is_meta
    for other in (again, model):
        for one, wanted in zip(other(inputs()), expected, strict=True):
            assert torch.equal(one, wanted)
    # What is on disk is not packed.
    parts = load(folder, KINDS[kind], device_map={"": "cpu", "up": "disk"}, offload_folder=tmp_path / "offload")
    assert set(parts.hf_quantizer.quantized) == set(again.hf_quantizer.quantized) - {"up"}
    assert (parts(inputs())[0] - expected[0]).norm() < 0.2 * expected[0].norm()


def test_the_type_of_a_model_is_not_that_of_its_codes(tmp_path):
    # diffusers and transformers take the first floating parameter for it, and cast inputs to that.
    model = load(save(tmp_path / "net", make()), Config("FP8"), torch_dtype=torch.bfloat16)
    assert model.wide.weight.dtype == torch.float8_e4m3fn
    assert next(one.dtype for one in model.parameters() if one.is_floating_point()) == torch.bfloat16
    assert model.state_dict()["wide.weight"].is_floating_point()


def test_nothing_is_printed(tmp_path, capsys):
    load(save(tmp_path / "net", make()), Config("INT4"))(inputs())
    assert capsys.readouterr().out == ""


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_the_bytes_and_values_are_the_same(tmp_path, kind):
    folder = save(tmp_path / "net", make(dtype=torch.bfloat16))
    expected = load(folder, KINDS[kind])
    model = load(folder, KINDS[kind], device_map="cuda")
    for name, value in model.state_dict().items():
        assert value.is_cuda, name
        assert torch.equal(raw(value.cpu()), raw(expected.state_dict()[name])), name
    x = inputs(torch.bfloat16)
    for one, other in zip(model(x.cuda()), expected(x), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0.05, atol=0.05)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["FP8_FP8", "INT8_INT8", "NVFP4_NVFP4"])
def test_on_a_gpu_activations_are_quantized(tmp_path, kind):
    net = make(dtype=torch.bfloat16)
    x = inputs(torch.bfloat16)
    before = net(x)
    model = load(
        save(tmp_path / "net", net),
        Config(kind, forward_loop=lambda one: one(x.cuda()), disable_conv_quantization=True),
        device_map="cuda",
    )
    found = model(x.cuda())[0].cpu()
    assert (found - before[0]).norm() < 0.3 * before[0].norm()
