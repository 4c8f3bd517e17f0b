"""int8 layers: the bytes of bitsandbytes, on the CPU, and nothing that running them changes."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest

import weightpack as wp
from tests.conftest import find_peer
from weightpack.errors import CheckpointError
from weightpack.quantizers.auto import AutoQuantizer

torch = find_peer("torch")
bnb = find_peer("bitsandbytes")

from tests.quantizers.bitsandbytes_models import Conv1D, Net, bits, load  # noqa: E402


def config(**fields):
    return wp.BitsAndBytesConfig(load_in_8bit=True, **fields)


def layer_of(rows, columns, *, dtype=torch.float32, seed=0, bias=True, **fields):
    """A packed layer [rows, columns], and the dense one it was made from."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=bias)).to(dtype)
    dense = copy.deepcopy(model[0])
    load(model, config(**fields), dtype=dtype)
    return model[0], dense


def peer_of(dense, threshold=6.0):
    """bitsandbytes' own layer, packed by its own code on the CPU."""
    layer = bnb.nn.Linear8bitLt(
        dense.in_features, dense.out_features, dense.bias is not None, has_fp16_weights=False, threshold=threshold
    )
    layer.to(dense.weight.dtype).load_state_dict(dense.state_dict())
    return layer.to("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_are_those_of_bitsandbytes(dtype):
    torch.manual_seed(0)
    model = Net().to(dtype)
    theirs = copy.deepcopy(model)
    theirs.up, theirs.down = peer_of(theirs.up), peer_of(theirs.down)
    load(model, config(), dtype=dtype)
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert bits(model.state_dict()) == bits(theirs.state_dict())
    assert isinstance(model.up, bnb.nn.Linear8bitLt)
    assert type(model.up).__name__ == "Linear8bitLt"
    assert isinstance(model.up.weight, bnb.nn.Int8Params)
    assert not model.up.weight.requires_grad


@pytest.mark.parametrize("shape", [(33, 48), (7, 1000), (64, 128), (5, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [0, 6.0])
def test_a_forward_is_that_of_bitsandbytes_and_leaves_every_byte(shape, dtype, threshold):
    layer, dense = layer_of(*shape, dtype=dtype, llm_int8_threshold=threshold)
    before = bits(layer.state_dict())
    x = torch.randn(2, 3, shape[1], dtype=dtype)
    x[..., 1] *= 10
    theirs = peer_of(dense, float(threshold))
    with torch.no_grad():
        got = layer.eval()(x)
        assert got.dtype == dtype
        assert torch.equal(got, theirs.eval()(x))
        exact = torch.nn.functional.linear(x.float(), dense.weight.float(), dense.bias.float())
        assert (got.float() - exact).norm() / exact.norm() < (0.03 if threshold else 0.1)
        trained = layer.train()(x)
        assert (trained.float() - exact).norm() / exact.norm() < 0.02
    assert bits(layer.state_dict()) == before
    assert torch.equal(layer.eval()(x), got)


def test_a_bias_of_another_type_is_not_changed():
    layer, _ = layer_of(32, 64)
    layer(torch.randn(2, 64).bfloat16())
    assert layer.bias.dtype == torch.float32


def test_nothing_is_logged_for_each_call(caplog):
    layer, _ = layer_of(32, 64)
    with caplog.at_level(logging.DEBUG):
        layer.eval()(torch.randn(2, 64))
    assert not caplog.records


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_the_decoded_weight(training):
    layer, dense = layer_of(70, 48)
    dense.weight.data = layer.decoded(torch.float32)
    x = torch.randn(2, 5, 48)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer.bias.requires_grad_(True)
    weights = torch.randn(2, 5, 70)
    (layer.train(training)(ours) * weights).sum().backward()
    (dense(theirs) * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-4)


def test_an_empty_batch():
    layer, _ = layer_of(40, 48)
    assert layer(torch.empty(0, 48)).shape == (0, 40)
    assert layer.eval()(torch.empty(2, 0, 48)).shape == (2, 0, 40)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_layers_of_their_own(how):
    layer, _ = layer_of(64, 48)
    layer.eval()
    x = torch.randn(2, 48)
    expected = layer(x)
    if how == "deepcopy":
        copied = copy.deepcopy(layer)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert type(copied.weight) is bnb.nn.Int8Params
    assert copied.weight.CB.data_ptr() == copied.weight.data_ptr()
    assert bits(copied.state_dict()) == bits(layer.state_dict())
    copied.weight.data.zero_()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("cast", ["half", "float", "double", "bfloat16", "cpu"])
def test_casts_leave_the_packed_bytes(cast):
    layer, _ = layer_of(64, 48)
    before = bits({name: value for name, value in layer.state_dict().items() if name != "bias"})
    getattr(layer, cast)()
    assert bits({name: value for name, value in layer.state_dict().items() if name != "bias"}) == before
    assert layer.eval()(torch.randn(2, 48)).isfinite().all()


@pytest.mark.parametrize("ran", [False, True])
def test_a_saved_state_is_loaded(ran):
    saved, _ = layer_of(64, 48, seed=1)
    layer, _ = layer_of(64, 48, seed=2)
    x = torch.randn(2, 48)
    if ran:
        layer.eval()(x)
    done = layer.load_state_dict(saved.state_dict())
    assert not done.missing_keys
    assert not done.unexpected_keys
    assert bits(layer.state_dict()) == bits(saved.state_dict())
    assert torch.equal(layer.eval()(x), saved.eval()(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("SCB"), "packed weight has no SCB"),
        (lambda state: state.update({"SCB": state["SCB"][1:]}), "SCB holds 63 numbers, expected 64"),
        (lambda state: state.update({"weight": state["weight"].float()}), "expected int8"),
        (lambda state: state.update({"weight": state["weight"][1:]}), r"int8 \[63, 48\], expected int8 \[64, 48\]"),
        (lambda state: state.update({"weight_format": torch.tensor(2, dtype=torch.uint8)}), "weight_format"),
    ],
)
@pytest.mark.parametrize("path", ["load_state_dict", "create_quantized_param"])
def test_packed_weights_that_do_not_fit_are_refused(change, message, path):
    saved, _ = layer_of(64, 48)
    state = saved.state_dict()
    change(state)
    if path == "load_state_dict":
        layer, _ = layer_of(64, 48, seed=1)
        with pytest.raises((RuntimeError, ValueError), match=message):
            layer.load_state_dict(state)
        return
    model = torch.nn.Sequential(torch.nn.Linear(48, 64, device="meta"))
    quantizer = AutoQuantizer.from_config(config())
    quantizer.preprocess_model(model, packed={"0.weight"})
    parts = {("" if name == "weight" else name): value for name, value in state.items() if name != "bias"}
    with pytest.raises(CheckpointError, match=message) as caught:
        quantizer.create_quantized_param(model, "0.weight", parts, device="cpu")
    assert '"0.weight"' in str(caught.value)


def test_a_packed_checkpoint_comes_back_byte_for_byte():
    saved, _ = layer_of(64, 48)
    model = torch.nn.Sequential(torch.nn.Linear(48, 64, device="meta", bias=False))
    quantizer = AutoQuantizer.from_config(config())
    quantizer.preprocess_model(model, packed={"0.weight"})
    assert model.state_dict()["0.weight"].dtype == torch.int8
    assert quantizer.component_of("0.SCB") == ("0.weight", "SCB")
    assert quantizer.component_of("0.weight_format") == ("0.weight", "weight_format")
    assert quantizer.component_of("0.weight") is None
    # Files of old releases hold no weight_format.
    parts = {"": saved.weight.data.clone(), "SCB": saved.weight.SCB.clone()}
    quantizer.create_quantized_param(model, "0.weight", parts, device="cpu")
    expected = {f"0.{name}": value for name, value in saved.state_dict().items() if name != "bias"}
    assert bits(model.state_dict()) == bits(expected)


def test_weights_that_float16_cannot_hold_are_refused_by_name():
    model = torch.nn.Sequential(torch.nn.Linear(48, 64).bfloat16())
    model[0].weight.data[3, 4] = 1e5
    with pytest.raises(wp.FormatError, match=r'tensor "0\.weight"'):
        load(model, config())


def test_weights_that_stay_in_16_bits():
    layer, dense = layer_of(64, 48, dtype=torch.float16, llm_int8_has_fp16_weight=True)
    assert layer.weight.dtype == torch.float16
    assert torch.equal(layer.weight, dense.weight)
    x = torch.randn(2, 48, dtype=torch.float16)
    with torch.no_grad():
        expected = dense(x).float()
        assert (layer.eval()(x).float() - expected).norm() / expected.norm() < 0.03
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_the_other_way_round_in_conv1d():
    torch.manual_seed(4)
    model = torch.nn.Sequential(Conv1D(48, 64), torch.nn.ReLU(), Conv1D(32, 48))
    dense = copy.deepcopy(model)
    quantizer = load(model, config(), dtype=torch.float32)
    assert quantizer.packing(model, "0.weight").transpose
    x = torch.randn(3, 64)
    expected = dense(x)
    assert (model.eval()(x) - expected).norm() / expected.norm() < 0.05
    quantizer.dequantize(model)
    assert type(model[0]) is Conv1D
    assert (model[0].weight - dense[0].weight).norm() / dense[0].weight.norm() < 0.02


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_back_to_ordinary_layers_on_the_cpu(dtype):
    torch.manual_seed(5)
    model = Net().bfloat16()
    quantizer = load(model, config(), dtype=torch.bfloat16)
    state = model.state_dict()
    assert model.is_loaded_in_8bit
    quantizer.dequantize(model, dtype=dtype)
    assert not model.is_loaded_in_8bit
    # By default in the type that the model was loaded in.
    wanted = dtype or torch.bfloat16
    parts = {"": state["up.weight"], "SCB": state["up.SCB"]}
    assert type(model.up) is torch.nn.Linear
    assert torch.equal(model.up.weight, wp.dequantize(parts, "bitsandbytes:int8", dtype=wanted))
    assert model.up.bias.dtype == wanted


def test_what_the_result_can_do():
    quantizer = AutoQuantizer.from_config(config())
    assert quantizer.is_serializable
    assert quantizer.is_trainable
