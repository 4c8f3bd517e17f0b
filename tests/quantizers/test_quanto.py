"""The quanto quantizer: which layers it takes, packed checkpoints, and what it refuses."""

from __future__ import annotations

import warnings

import pytest

from tests.conftest import find_peer

torch = find_peer("torch")
find_peer("optimum.quanto")

import weightpack as wp  # noqa: E402
from tests.quantizers.quanto_models import (  # noqa: E402
    ERROR,
    WEIGHTS,
    Net,
    assert_equal_states,
    load,
    load_packed,
)
from weightpack.errors import CheckpointError, ConfigError, FormatError  # noqa: E402


class Tree(torch.nn.Module):
    """Blocks with the names that hosts' matchers get wrong."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Net(48, 32) for _ in range(11))
        self.proj = torch.nn.Linear(48, 16)


def packed_layers(model):
    from optimum.quanto import QLinear

    return {path for path, module in model.named_modules() if isinstance(module, QLinear)}


def prepared(model, config=None, **options):
    quantizer = wp.AutoQuantizer.from_config(config or wp.QuantoConfig(), pre_quantized=False)
    quantizer.preprocess_model(model, **options)
    return quantizer


def test_skip_lists_take_dotted_names():
    # diffusers compares leaf names alone.
    model = Tree()
    prepared(model, wp.QuantoConfig(modules_to_not_convert=["blocks.1", "blocks.0.up", "proj"]))
    expected = {f"blocks.{n}.{layer}" for n in range(11) for layer in ("up", "down")}
    assert packed_layers(model) == expected - {"blocks.1.up", "blocks.1.down", "blocks.0.up"}


def test_modules_kept_in_float32_are_not_packed():
    # diffusers packs the linear layers inside a module that it keeps in float32.
    model = Tree()
    prepared(model, keep_in_fp32=["blocks.3"], skip=["proj"])
    assert "proj" not in packed_layers(model)
    assert not {path for path in packed_layers(model) if path.startswith("blocks.3.")}
    assert "blocks.2.up" in packed_layers(model)


def test_the_callers_list_is_left_alone():
    given = ["proj"]
    config = wp.QuantoConfig(modules_to_not_convert=given)
    prepared(Tree(), config, keep_in_fp32=["blocks.3"])
    assert given == ["proj"]
    assert config.to_dict()["modules_to_not_convert"] == ["proj"]


def test_an_entry_that_names_nothing_is_told():
    with pytest.warns(UserWarning, match='"projj" of the skip list names no layer'):
        prepared(Tree(), wp.QuantoConfig(modules_to_not_convert=["projj"]))


def test_keys_and_their_components():
    quantizer = wp.AutoQuantizer.from_config(wp.QuantoConfig())
    found = {
        "a.b.weight._data": ("a.b.weight", "_data"),
        "a.b.weight._data._data": ("a.b.weight", "_data"),
        "a.b.weight._scale": ("a.b.weight", "_scale"),
        "a.b.weight._shift": ("a.b.weight", "_shift"),
        "a.b.input_scale": ("a.b.weight", "input_scale"),
        "weight._data": ("weight", "_data"),
        "a.b.weight": None,
        "a.b.bias": None,
        "a.my_weight._data": None,
        "a.weight._scale_inv": None,
    }
    assert {key: quantizer.component_of(key) for key in found} == found


def test_scales_of_activations_may_be_missing():
    model = Net()
    quantizer = prepared(model)
    keys = ["up.input_scale", "up.output_scale", "up.bias", "other.input_scale"]
    assert quantizer.update_missing_keys(model, keys) == ["up.bias", "other.input_scale"]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_packed_state_is_loaded(weights):
    torch.manual_seed(0)
    first = Net(256, 384)
    quantizer = load(first, wp.QuantoConfig(weights))
    state = first.state_dict()
    second = Net(256, 384)
    read = load_packed(second, state, quantizer.config.to_dict())
    second.norm = first.norm
    second.up.bias = first.up.bias
    assert set(read.quantized) == {"up", "down"}
    assert_equal_states(second.state_dict(), state)
    x = torch.randn(4, 256)
    assert torch.equal(first(x), second(x))


def test_what_is_packed_in_the_file_decides():
    torch.manual_seed(0)
    first = Net()
    load(first, wp.QuantoConfig("int8", modules_to_not_convert=["down"]))
    second = Net()
    # The config of a checkpoint may not name all that was left out.
    read = load_packed(second, first.state_dict(), wp.QuantoConfig("int8"))
    assert set(read.quantized) == {"up"}
    assert type(second.down) is torch.nn.Linear


def test_types_by_layer():
    torch.manual_seed(0)
    first = Net(256, 384)
    from tests.quantizers.quanto_models import by_library

    first.up, first.down = by_library(first.up, "int4"), by_library(first.down, "float8")
    state = first.state_dict()
    rows = {"up": {"weights": "qint4", "activations": "none"}, "down": {"weights": "qfloat8_e4m3fn"}}
    second = Net(256, 384)
    load_packed(second, state, wp.QuantoConfig.from_file_beside(rows))
    second.norm, second.up.bias = first.norm, first.up.bias
    assert_equal_states(second.state_dict(), state)


@pytest.mark.parametrize("lost", ["_data", "_scale", "_shift"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_missing_component_is_named(weights, lost):
    first = Net()
    load(first, wp.QuantoConfig(weights))
    key = next((key for key in first.state_dict() if key.startswith(f"up.weight.{lost}")), None)
    if key is None:
        return
    state = {name: value for name, value in first.state_dict().items() if name != key}
    with pytest.raises(CheckpointError, match=f'"{key}" is missing: weight "up.weight" is packed as quanto:{weights}'):
        load_packed(Net(), state, wp.QuantoConfig(weights))


@pytest.mark.parametrize(("stored", "said"), [("int8", "float8"), ("int4", "int8"), ("int4", "int2")])
def test_components_of_another_type_are_refused(stored, said):
    first = Net()
    load(first, wp.QuantoConfig(stored))
    with pytest.raises(CheckpointError, match=r'tensor "up\.weight\._'):
        load_packed(Net(), first.state_dict(), wp.QuantoConfig(said))


def test_components_of_another_shape_are_refused():
    first = Net()
    load(first, wp.QuantoConfig("int8"))
    with pytest.raises(CheckpointError, match=r"int8 \[48, 80\], and quanto:int8 has shape \[64, 80\]"):
        load_packed(Net(80, 64), first.state_dict(), wp.QuantoConfig("int8"))


def test_a_weight_that_is_not_finite_is_named():
    model = Net()
    with torch.no_grad():
        model.down.weight[3, 4] = float("nan")
    with pytest.raises(FormatError, match=r"weight 148 is NaN.* \(tensor \"down.weight\""):
        load(model, wp.QuantoConfig())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_sizes_before_and_after(weights):
    model = Net(256, 384).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer = load(model, wp.QuantoConfig(weights), dtype=torch.bfloat16)
    state = model.state_dict()
    for name in ("up.weight", "down.weight"):
        assert quantizer.packed_bytes(model, name) == sum(
            value.nbytes for key, value in state.items() if key.startswith(name)
        )
    assert quantizer.packed_bytes(model, "norm.weight") is None


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_dequantize(weights, dtype):
    torch.manual_seed(0)
    model = Net(256, 384).bfloat16()
    plain = {name: value.detach().clone() for name, value in model.named_parameters()}
    quantizer = load(model, wp.QuantoConfig(weights), dtype=torch.bfloat16)
    assert quantizer.dequantize(model, dtype=dtype) is model
    assert type(model.up) is torch.nn.Linear
    assert not packed_layers(model)
    assert model.up.weight.dtype == (dtype or torch.bfloat16)
    for name in ("up.weight", "down.weight"):
        value = model.get_parameter(name).float()
        assert (value - plain[name].float()).norm() < ERROR[weights] * plain[name].float().norm()
    assert not quantizer.check_if_quantized_param(model, "up.weight")


@pytest.mark.parametrize("off", ["cpu", "disk"])
def test_offloaded_layers_are_not_packed(off):
    # Both hosts refuse the whole map.
    model = Tree()
    quantizer = wp.AutoQuantizer.from_config(wp.QuantoConfig(), pre_quantized=False)
    quantizer.device_map = {"": "cuda:0", "blocks.2": off}
    quantizer.validate_environment(device_map=quantizer.device_map)
    quantizer.preprocess_model(model)
    assert "blocks.2.up" not in packed_layers(model)
    assert {"blocks.1.up", "blocks.10.up", "proj"} <= packed_layers(model)
    quantizer.device_map = {"": "cpu", "blocks.2": "cpu"}
    quantizer.preprocess_model(everywhere := Tree())
    assert "blocks.2.up" in packed_layers(everywhere)


def test_packed_layers_are_not_offloaded():
    quantizer = wp.AutoQuantizer.from_config(wp.QuantoConfig())
    quantizer.device_map = {"": "cpu", "down": "disk"}
    quantizer.preprocess_model(Net(), packed={"up.weight"})
    assert set(quantizer.quantized) == {"up"}
    with pytest.raises(ConfigError, match='device_map offloads "down" to the CPU or disk'):
        quantizer.preprocess_model(Net(), packed={"up.weight", "down.weight"})


def test_what_it_can_do():
    quantizer = wp.AutoQuantizer.from_config(wp.QuantoConfig(), pre_quantized=False)
    assert quantizer.name == "quanto"
    assert quantizer.is_serializable
    assert quantizer.is_trainable
