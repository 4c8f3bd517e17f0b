"""4-bit layers: the bytes of bitsandbytes, on the CPU, and nothing that running them changes."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest

import weightpack as wp
from tests.conftest import find_peer
from weightpack.errors import CheckpointError
from weightpack.quantizers.auto import AutoQuantizer

torch = find_peer("torch")
bnb = find_peer("bitsandbytes")

from tests.quantizers.bitsandbytes_models import Conv1D, Net, bits, load, parts_of  # noqa: E402


def config(**fields):
    return wp.BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", **fields})


def packed_by_peer(weight, **choices):
    """The state dict of bitsandbytes' own parameter, packed by its own code on the CPU."""
    theirs = bnb.nn.Params4bit(weight, **choices).to("cpu")
    return {"": theirs.data, **theirs.quant_state.as_dict(packed=True)}


def layer_of(rows, columns, *, dtype=torch.float32, seed=0, bias=True, **fields):
    """A packed layer [rows, columns], and the dense one it was made from."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=bias)).to(dtype)
    dense = copy.deepcopy(model[0])
    load(model, config(**fields), dtype=dtype)
    return model[0], dense


STATE = "quant_state.bitsandbytes__nf4"
STORAGES = ["uint8", "int8", "float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bytes_are_those_of_bitsandbytes(kind, dtype, storage):
    torch.manual_seed(0)
    model = Net(96).to(dtype)
    reference = copy.deepcopy(model)
    load(model, config(bnb_4bit_quant_type=kind, bnb_4bit_quant_storage=storage), dtype=dtype, skip=["down"])
    theirs = packed_by_peer(
        reference.up.weight.detach(),
        quant_type=kind,
        compress_statistics=False,
        quant_storage=getattr(torch, storage),
    )
    assert bits(parts_of(model, "up.weight")) == bits(theirs)
    assert isinstance(model.up, bnb.nn.Linear4bit)
    assert isinstance(model.up.weight, bnb.nn.Params4bit)
    assert type(model.up).__name__ == "Linear4bit"
    assert type(model.down) is torch.nn.Linear


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantization_given_the_same_offset(kind):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(320, 257, bias=False)).bfloat16()
    weight = model[0].weight.detach().clone()
    load(model, config(bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True), dtype=torch.bfloat16)
    ours = parts_of(model, "0.weight")
    theirs = packed_by_peer(weight, quant_type=kind, compress_statistics=True)
    assert list(ours) == list(theirs)
    exact = [key for key in ours if key in ("", "quant_map", "nested_quant_map")]
    assert bits({key: ours[key] for key in exact}) == bits({key: theirs[key] for key in exact})
    offset = bnb.nn.Params4bit(weight, quant_type=kind).to("cpu").quant_state.offset
    step = abs(float(torch.nextafter(offset, torch.tensor(torch.inf)) - offset))
    assert abs(float(model[0].weight.quant_state.offset) - float(offset)) <= 4 * step
    torch.testing.assert_close(ours["nested_absmax"], theirs["nested_absmax"], rtol=1e-5, atol=1e-7)
    assert (ours["absmax"].int() - theirs["absmax"].int()).abs().max() <= 1


# Rows that are not whole blocks, shorter than one, and numbers of rows that no kernel of bitsandbytes takes.
SHAPES = [(33, 48), (32, 80), (7, 1000), (32, 2736), (64, 4304), (5, 3), (128, 64), (600, 48)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_forward_is_right_and_leaves_every_byte(shape, double_quant):
    layer, dense = layer_of(*shape, bnb_4bit_use_double_quant=double_quant)
    before = bits(layer.state_dict())
    x = torch.randn(2, 3, shape[1])
    with torch.no_grad():
        got = layer.eval()(x)
        decoded = wp.dequantize(parts_of(layer, "weight"), "nf4")
        torch.testing.assert_close(got, torch.nn.functional.linear(x, decoded, dense.bias))
        rough = (got - dense(x)).norm() / dense(x).norm()
    assert rough < (0.3 if min(shape) < 8 else 0.15)
    layer(x.requires_grad_())
    layer.train()(x)
    assert bits(layer.state_dict()) == before


def test_slabs_of_rows_give_what_one_slab_gives(monkeypatch):
    from weightpack.quantizers import bitsandbytes_products

    layer, _ = layer_of(600, 48, bnb_4bit_use_double_quant=True)
    x = torch.randn(3, 48, requires_grad=True)
    whole = layer(x)
    (slope,) = torch.autograd.grad(whole.square().sum(), x)
    monkeypatch.setattr(bitsandbytes_products, "SLAB_BYTES", 48 * 4 * 50)
    parts = layer(x)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(parts.square().sum(), x)[0], slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_of_input_bias_and_product(compute, dtype):
    layer, dense = layer_of(64, 128, dtype=dtype, bnb_4bit_compute_dtype=compute)
    assert layer.compute_dtype == getattr(torch, compute)
    x = torch.randn(4, 128, dtype=dtype)
    got = layer(x)
    assert got.dtype == dtype
    # Upstream casts the bias of the layer itself.
    assert layer.bias.dtype == dtype
    exact = torch.nn.functional.linear(x.float(), layer.decoded(torch.float32), dense.bias.float())
    error = (got.float() - exact).norm() / exact.norm()
    assert error < (1e-6 if {dtype, layer.compute_dtype} == {torch.float32} else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_those_of_bitsandbytes(dtype):
    # A shape that its CPU kernels take.
    layer, _ = layer_of(96, 128, dtype=dtype, bnb_4bit_compute_dtype=dtype)
    theirs = bnb.nn.Linear4bit(128, 96, compute_dtype=dtype, compress_statistics=False, quant_type="nf4")
    theirs.weight = copy.deepcopy(layer.weight)
    theirs.bias = copy.deepcopy(layer.bias)
    x = torch.randn(5, 128, dtype=dtype)
    for training in (True, False):
        with torch.no_grad():
            expected = theirs.train(training)(x).float()
        assert (layer(x).float() - expected).norm() / expected.norm() < 1e-2


def test_gradients_are_those_of_the_decoded_weight():
    layer, dense = layer_of(70, 48)
    dense.weight.data = layer.decoded(torch.float32)
    x = torch.randn(2, 5, 48)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer.bias.requires_grad_(True)
    layer(ours).square().sum().backward()
    dense(theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-4)


def test_adapters_are_trained_on_top():
    layer, _ = layer_of(40, 48, dtype=torch.bfloat16)
    before = bits(layer.state_dict())
    first, second = torch.nn.Linear(48, 4, bias=False), torch.nn.Linear(4, 40, bias=False)
    torch.nn.init.zeros_(second.weight)
    inner = torch.nn.Linear(48, 48)
    optimizer = torch.optim.Adam([*first.parameters(), *second.parameters(), *inner.parameters()], lr=1e-2)
    x, target = torch.randn(16, 48), torch.randn(16, 40)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        hidden = inner(x)
        loss = (layer(hidden) + second(first(hidden)) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert inner.weight.grad.abs().sum() > 0
    assert layer.weight.grad is None
    assert bits(layer.state_dict()) == before


def test_an_empty_batch():
    layer, _ = layer_of(40, 48)
    assert layer(torch.empty(0, 48)).shape == (0, 40)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_layers_of_their_own(storage, double_quant, how):
    layer, _ = layer_of(64, 48, bnb_4bit_quant_storage=storage, bnb_4bit_use_double_quant=double_quant)
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
    assert type(copied.weight) is bnb.nn.Params4bit
    assert copied.weight.module is copied
    assert copied.quant_state is copied.weight.quant_state
    assert bits(copied.state_dict()) == bits(layer.state_dict())
    copied.weight.quant_state.absmax.zero_()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "cast", ["half", "float", "double", "bfloat16", "to dtype", "to cpu", "to both"], ids=lambda how: how
)
def test_casts_leave_the_packed_bytes(storage, cast):
    layer, _ = layer_of(64, 48, bnb_4bit_quant_storage=storage)
    before = bits(parts_of(layer, "weight"))
    if cast.startswith("to "):
        arguments = {"to dtype": (torch.float16,), "to cpu": ("cpu",), "to both": ("cpu", torch.bfloat16)}[cast]
        layer.to(*arguments)
    else:
        getattr(layer, cast)()
    assert bits(parts_of(layer, "weight")) == before
    assert layer(torch.randn(2, 48)).isfinite().all()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("target", ["layer", "meta"])
def test_a_saved_state_is_loaded_with_its_statistics(double_quant, target):
    # bitsandbytes-foundation/bitsandbytes#1946
    saved, _ = layer_of(64, 48, seed=1, bnb_4bit_use_double_quant=double_quant)
    layer, _ = layer_of(64, 48, seed=2, bnb_4bit_use_double_quant=not double_quant)
    if target == "meta":
        layer = layer.to_empty(device="meta")
    state = {name: value.clone() for name, value in saved.state_dict().items()}
    done = layer.load_state_dict(state, assign=target == "meta")
    assert not done.missing_keys
    assert not done.unexpected_keys
    assert bits(layer.state_dict()) == bits(saved.state_dict())
    x = torch.randn(2, 48)
    assert torch.equal(layer(x), saved(x))
    state["weight"].zero_()
    assert torch.equal(layer(x), saved(x))


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "quant_state.bitsandbytes__nf4"])
def test_a_state_that_lacks_a_component_is_refused(part):
    layer, _ = layer_of(64, 48, bnb_4bit_use_double_quant=True)
    before = bits(layer.state_dict())
    state = layer.state_dict()
    del state[f"weight.{part}"]
    with pytest.raises(RuntimeError, match=part.partition(".")[0]):
        layer.load_state_dict(state)
    assert bits(layer.state_dict()) == before


def test_a_state_without_the_layer_leaves_it():
    layer, _ = layer_of(64, 48)
    before = bits(parts_of(layer, "weight"))
    layer.load_state_dict({"bias": torch.ones(64)}, strict=False)
    assert bits(parts_of(layer, "weight")) == before


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_packed_checkpoint_comes_back_byte_for_byte(storage, double_quant):
    saved, _ = layer_of(64, 48, bnb_4bit_quant_storage=storage, bnb_4bit_use_double_quant=double_quant)
    model = torch.nn.Sequential(torch.nn.Linear(48, 64, device="meta"))
    quantizer = AutoQuantizer.from_config(config(bnb_4bit_quant_storage=storage))
    quantizer.preprocess_model(model, packed={"0.weight"})
    assert model.state_dict()["0.weight"].shape == saved.weight.shape
    parts = {part: value.clone() for part, value in parts_of(saved, "weight").items()}
    for part in parts:
        if part:
            assert quantizer.component_of(f"0.weight.{part}") == ("0.weight", part)
    assert quantizer.component_of("0.weight") is None
    quantizer.create_quantized_param(model, "0.weight", parts, device="cpu")
    assert bits(parts_of(model, "0.weight")) == bits(parts_of(saved, "weight"))


def restate(parts, **changes):
    """Other values in the description of a packed weight."""
    described = {**json.loads(bytes(parts[STATE].tolist())), **changes}
    parts[STATE] = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts.pop("absmax"), "packed weight has no absmax beside its quant_state"),
        (lambda parts: parts.pop("quant_map"), "has no quant_map"),
        (lambda parts: parts.pop("nested_absmax"), "has no nested_absmax"),
        (lambda parts: parts.pop("nested_quant_map"), "has no nested_quant_map"),
        (lambda parts: parts.pop(""), "has no weight"),
        (lambda parts: parts.pop(STATE), "has no quant_state"),
        (lambda parts: parts.update({"quant_state.bitsandbytes__fp4": parts[STATE]}), "expected one"),
        (lambda parts: parts.update({STATE: parts[STATE][:-3]}), "quant_state is not JSON"),
        (lambda parts: parts.update({STATE: torch.tensor([123, 125], dtype=torch.uint8)}), "not what bitsandbytes"),
        (lambda parts: restate(parts, blocksize=65), "blocksize is 65"),
        (lambda parts: restate(parts, quant_type="fp4"), "quant_type is 'fp4'"),
        (lambda parts: restate(parts, dtype="float99"), "dtype is 'float99'"),
        (lambda parts: restate(parts, shape="x"), "shape is 'x'"),
        (lambda parts: restate(parts, nested_blocksize=None), "nested_blocksize is None"),
        (lambda parts: parts.update({"absmax": parts["absmax"].float()}), "absmax is torch.float32"),
        (lambda parts: parts.update({"": parts[""][1:]}), "1535 bytes of codes for 3072 weights"),
        (lambda parts: parts.update({"absmax": parts["absmax"][1:]}), "absmax holds 47 numbers, expected 48"),
        (lambda parts: parts.update({"nested_absmax": parts["nested_absmax"][:0]}), "nested_absmax holds 0 numbers"),
    ],
)
def test_packed_weights_that_do_not_fit_are_refused(change, message):
    saved, _ = layer_of(64, 48, bnb_4bit_use_double_quant=True)
    parts = parts_of(saved, "weight")
    change(parts)
    model = torch.nn.Sequential(torch.nn.Linear(48, 64, device="meta"))
    quantizer = AutoQuantizer.from_config(config())
    quantizer.preprocess_model(model, packed={"0.weight"})
    with pytest.raises(CheckpointError) as caught:
        quantizer.create_quantized_param(model, "0.weight", parts, device="cpu")
    assert message in str(caught.value)
    assert '"0.weight"' in str(caught.value)


def test_a_packed_weight_of_another_shape_is_refused():
    saved, _ = layer_of(48, 64)
    model = torch.nn.Sequential(torch.nn.Linear(48, 64, device="meta"))
    quantizer = AutoQuantizer.from_config(config())
    quantizer.preprocess_model(model, packed={"0.weight"})
    with pytest.raises(CheckpointError, match=r"is of shape \[48, 64\], the model has \[64, 48\]"):
        quantizer.create_quantized_param(model, "0.weight", parts_of(saved, "weight"), device="cpu")


def test_weights_that_are_not_finite_are_refused_by_name():
    model = torch.nn.Sequential(torch.nn.Linear(48, 64))
    model[0].weight.data[3, 4] = torch.inf
    with pytest.raises(wp.FormatError, match=r'tensor "0\.weight"'):
        load(model, config())


def test_a_storage_type_that_the_bytes_do_not_fill_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(wp.ConfigError, match="0: 5 packed bytes are not a multiple of the 4 bytes"):
        load(model, config(bnb_4bit_quant_storage="float32"))


@pytest.mark.parametrize("casts", [True, False])
def test_weights_go_through_the_type_of_the_model(casts):
    torch.manual_seed(3)
    weight = torch.randn(64, 48)
    model = torch.nn.Sequential(torch.nn.Linear(48, 64, device="meta"))
    quantizer = AutoQuantizer.from_config(config(), pre_quantized=False)
    quantizer.casts_before_packing = casts
    quantizer.torch_dtype = torch.bfloat16
    quantizer.preprocess_model(model)
    packing = quantizer.packing(model, "0.weight")
    assert (packing.format, packing.through, packing.transpose) == (
        "bitsandbytes:nf4",
        "BF16" if casts else None,
        False,
    )
    assert packing.params == {"double_quant": False, **({"dtype": "BF16"} if casts else {})}
    quantizer.create_quantized_param(model, "0.weight", weight, device="cpu", dtype=torch.bfloat16)
    expected = weight.bfloat16() if casts else weight
    assert bits(parts_of(model, "0.weight")) == bits(
        packed_by_peer(expected, quant_type="nf4", compress_statistics=False)
    )
    # What the engine packs by that description is the same.
    parts = wp.quantize(expected, packing.format)
    quantizer.create_quantized_param(model, "0.weight", parts, device="cpu", dtype=torch.bfloat16)
    assert bits(parts_of(model, "0.weight")) == bits(parts)


def test_the_other_way_round_in_conv1d():
    torch.manual_seed(4)
    model = torch.nn.Sequential(Conv1D(48, 64), torch.nn.ReLU(), Conv1D(32, 48))
    dense = copy.deepcopy(model)
    quantizer = load(model, config(), dtype=torch.float32)
    assert quantizer.quantized == {"0": Conv1D, "2": Conv1D}
    assert quantizer.packing(model, "0.weight").transpose
    theirs = packed_by_peer(dense[0].weight.detach().T, quant_type="nf4", compress_statistics=False)
    assert bits(parts_of(model, "0.weight")) == bits(theirs)
    x = torch.randn(3, 64)
    expected = dense(x)
    assert (model(x) - expected).norm() / expected.norm() < 0.2
    output = model(x)
    quantizer.dequantize(model)
    assert type(model[0]) is Conv1D
    assert model[0].weight.shape == (64, 48)
    torch.testing.assert_close(model(x), output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
@pytest.mark.parametrize("double_quant", [False, True])
def test_back_to_ordinary_layers_on_the_cpu(dtype, double_quant):
    torch.manual_seed(5)
    model = Net().bfloat16()
    quantizer = load(
        model, config(bnb_4bit_use_double_quant=double_quant, bnb_4bit_quant_type="fp4"), dtype=torch.bfloat16
    )
    parts = parts_of(model, "up.weight")
    assert model.is_loaded_in_4bit
    assert quantizer.dequantize(model, dtype=dtype) is model
    assert not model.is_loaded_in_4bit
    assert [type(layer) for layer in (model.up, model.down)] == [torch.nn.Linear, torch.nn.Linear]
    # By default in the type that was packed.
    wanted = dtype or torch.bfloat16
    assert torch.equal(model.up.weight, wp.dequantize(parts, "fp4", dtype=wanted))
    assert model.up.bias.dtype == wanted


def test_bytes_of_a_packed_weight_are_counted():
    torch.manual_seed(6)
    model = Net()
    quantizer = AutoQuantizer.from_config(config(), pre_quantized=False)
    quantizer.preprocess_model(model)
    size = quantizer.packed_bytes(model, "up.weight")
    weight = model.up
    quantizer.create_quantized_param(model, "up.weight", torch.randn(48, 80), device="cpu")
    assert size == sum(value.nbytes for value in parts_of(model, "up.weight").values())
    assert weight is model.up


def test_what_the_result_can_do():
    quantizer = AutoQuantizer.from_config(config())
    assert quantizer.is_serializable
    assert quantizer.is_trainable
    assert not quantizer.is_compileable


def test_a_weight_that_lost_its_state_finds_it_in_the_layer():
    # Tools that shard or offload put a plain parameter in the place of the packed one.
    layer, _ = layer_of(64, 48)
    x = torch.randn(2, 48)
    expected = layer(x)
    layer.weight = torch.nn.Parameter(layer.weight.data.clone().as_subclass(torch.Tensor), requires_grad=False)
    assert torch.equal(layer(x), expected)
