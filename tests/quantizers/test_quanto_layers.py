"""quanto's layers: the library's results, on the CPU and without a compiler."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest

from tests.conftest import find_peer

torch = find_peer("torch")
quanto = find_peer("optimum.quanto")

import weightpack as wp  # noqa: E402
from tests.quantizers.quanto_models import (  # noqa: E402
    DTYPES,
    ERROR,
    WEIGHTS,
    Net,
    assert_equal_states,
    by_library,
    load,
    with_library_unpack,
)
from weightpack.quantizers import quanto_layers  # noqa: E402
from weightpack.quantizers import quanto_packing as packing  # noqa: E402

WIDTHS = [(48, 80), (80, 1008), (256, 384), (128, 2736)]
"""Input and inner features; all are taken by the library's kernels."""


def packed_both(weights, dtype, width, inner, seed=0):
    """The same net packed by us and by the library."""
    torch.manual_seed(seed)
    ours = Net(width, inner).to(dtype)
    theirs = copy.deepcopy(ours)
    load(ours, wp.QuantoConfig(weights), dtype=dtype)
    for name in ("up", "down"):
        setattr(theirs, name, by_library(getattr(theirs, name), weights))
    return ours, theirs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_states_and_outputs_are_those_of_the_library(weights, dtype, monkeypatch):
    with_library_unpack(monkeypatch)
    for width, inner in WIDTHS:
        ours, theirs = packed_both(weights, dtype, width, inner)
        assert isinstance(ours.up, quanto.QLinear)
        assert type(ours.up.weight) is type(theirs.up.weight)
        assert quanto.quantization_map(ours) == quanto.quantization_map(theirs)
        assert_equal_states(ours.state_dict(), theirs.state_dict())
        for shape in ((width,), (1, width), (7, width), (2, 3, width)):
            x = torch.randn(shape, dtype=dtype)
            assert torch.equal(ours(x), theirs(x)), (width, inner, shape)


def test_int4_in_bfloat16_is_kept_for_the_kernel():
    torch.manual_seed(0)
    net = Net(256, 384).bfloat16()
    with torch.no_grad():
        net.up.weight += 0.1
    raw = packing.encode(net.up.weight, "int4")["_shift"]
    load(net, wp.QuantoConfig("int4"), dtype=torch.bfloat16)
    assert type(net.up.weight).__name__ == "TinyGemmWeightQBitsTensor"
    stored = net.state_dict()["up.weight._shift"]
    # What is saved went through the kernel's bfloat16, and back.
    assert not torch.equal(stored, raw)
    assert torch.allclose(stored, raw, atol=2e-3)


@pytest.mark.parametrize("features", [(256, 24), (384, 1), (128, 17)])
def test_shapes_that_the_kernel_refuses_are_packed_all_the_same(features):
    width, inner = features
    torch.manual_seed(0)
    layer = torch.nn.Linear(width, inner, dtype=torch.bfloat16)
    if width > 128:
        with pytest.raises(RuntimeError, match="dividable by 16"):
            by_library(copy.deepcopy(layer), "int4")
    net = torch.nn.Sequential(layer)
    weight = layer.weight.detach().float()
    load(net, wp.QuantoConfig("int4"), dtype=torch.bfloat16)
    x = torch.randn(5, width, dtype=torch.bfloat16)
    expected = x.float() @ weight.t() + net[0].bias.float()
    assert (net(x).float() - expected).norm() < 0.25 * expected.norm()


ODD_WIDTHS = """
import torch
import weightpack as wp
from tests.quantizers.quanto_models import load
for columns in (4, 8, 12, 20, 28, 1000, 1004):
    torch.manual_seed(0)
    layer = torch.nn.Linear(columns, 64, dtype=torch.bfloat16)
    x = torch.randn(64, columns, dtype=torch.bfloat16)
    expected = torch.nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())
    net = torch.nn.Sequential(layer)
    load(net, wp.QuantoConfig("int8"), dtype=torch.bfloat16)
    for rows in (1, 5, 64):
        out = net(x[:rows]).float()
        assert (out - expected[:rows]).norm() < 0.05 * expected[:rows].norm(), (columns, rows)
"""


def test_int8_in_bfloat16_does_not_read_past_its_operands():
    """The library's path ends in a segmentation fault, or in numbers without meaning, on CPUs whose kernel
    takes 16 columns at a time: hence a process of its own."""
    done = subprocess.run([sys.executable, "-c", ODD_WIDTHS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


MISPLACED = """
import torch
from weightpack.quantizers.quanto_layers import assemble
torch.manual_seed(0)
scale = torch.rand(64, 1).to(torch.bfloat16)
x = torch.randn(32, 64).to(torch.bfloat16)
buffer = torch.empty(64 * 64 + 64, dtype=torch.int8)
start = -buffer.data_ptr() % 64
found = []
for offset in (0, 1, 8):
    data = buffer[start + offset :][: 64 * 64].view(64, 64)
    data.copy_(torch.arange(64 * 64).view(64, 64) % 251 - 125)
    weight = assemble({"_data": data, "_scale": scale}, "int8", (64, 64))
    found.append(torch.nn.functional.linear(x, weight))
assert found[0].isfinite().all()
assert all(torch.equal(one, found[0]) for one in found)
"""


def test_int8_in_bfloat16_wherever_a_file_holds_it():
    """Tensors of a mapped file begin at any byte, and torch's kernel crashes there."""
    done = subprocess.run([sys.executable, "-c", MISPLACED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


NO_COMPILER = """
import torch, torch.utils.cpp_extension as extension
def refuse(*args, **options):
    raise AssertionError("C++ is compiled")
extension.load = refuse
import optimum.quanto.library.extensions.extension as theirs
theirs.load = refuse
import weightpack as wp
from tests.quantizers.quanto_models import Net, load, load_packed
for weights in ("int4", "int2"):
    for dtype in (torch.float32, torch.bfloat16):
        for width, inner in ((48, 80), (256, 384)):
            net = Net(width, inner).to(dtype)
            quantizer = load(net, wp.QuantoConfig(weights), dtype=dtype)
            x = torch.randn(3, width, dtype=dtype, requires_grad=True)
            net(x).float().sum().backward()
            state = net.state_dict()
            again = Net(width, inner).to(dtype)
            load_packed(again, state, quantizer.config, dtype)
            again.load_state_dict(state)
            quantizer.dequantize(net)(x)
"""


def test_no_compiler_is_needed(tmp_path):
    environment = {"PATH": str(tmp_path), **paths()}
    done = subprocess.run([sys.executable, "-c", NO_COMPILER], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def paths():
    return {"PYTHONPATH": ":".join(path for path in sys.path if path), "HF_HUB_OFFLINE": "1", "HOME": "/nonexistent"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_of_the_input(weights, dtype):
    for width, inner in ((20, 36), (48, 80), (256, 384)):
        torch.manual_seed(0)
        layer = torch.nn.Linear(width, inner, dtype=dtype)
        net = torch.nn.Sequential(layer)
        quantizer = load(net, wp.QuantoConfig(weights), dtype=dtype)
        net[0].bias.requires_grad_(True)
        x = torch.randn(2, 5, width, dtype=dtype, requires_grad=True)
        weight = torch.randn(2, 5, inner, dtype=dtype)
        (net(x) * weight).sum().backward()
        decoded = quantizer.dequantize(copy.deepcopy(net))[0].weight
        expected = weight @ decoded
        assert (x.grad - expected).float().norm() < 0.02 * expected.float().norm()
        assert torch.allclose(net[0].bias.grad.float(), weight.float().sum((0, 1)), rtol=0.1, atol=0.1)
        assert net[0].weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_copies_and_casts(weights, dtype):
    """The library's tensors cannot be copied, and a cast leaves a model half done."""
    torch.manual_seed(0)
    net = Net(256, 384).to(dtype)
    load(net, wp.QuantoConfig(weights), dtype=dtype)
    copied = copy.deepcopy(net)
    x = torch.randn(3, 256, dtype=dtype)
    assert_equal_states(copied.state_dict(), net.state_dict())
    assert copied.up.weight._data is not net.up.weight._data
    assert list(dict(copied.named_parameters())) == list(dict(net.named_parameters()))
    assert torch.equal(copied(x), net(x))
    weight = net.up.weight
    assert net.to("cpu").up.weight is weight
    copied.to(torch.float16)
    assert {value.dtype for value in copied.parameters()} == {torch.float16}
    out = copied(x.half()).float()
    assert (out - net(x).float()).norm() < 0.03 * out.norm()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_compiled_models(weights):
    torch.manual_seed(0)
    net = Net(256, 384).bfloat16()
    load(net, wp.QuantoConfig(weights), dtype=torch.bfloat16)
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(torch.compile(net, backend="aot_eager")(x), net(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_load_state_dict(weights, dtype):
    for width, inner in ((48, 80), (256, 384)):
        first, _ = packed_both(weights, dtype, width, inner)
        second, _ = packed_both(weights, dtype, width, inner, seed=1)
        state = first.state_dict()
        missing = second.load_state_dict(state)
        assert not missing.missing_keys
        assert not missing.unexpected_keys
        x = torch.randn(3, width, dtype=dtype)
        if weights == "int4" and dtype == torch.bfloat16:
            # The shift goes through the kernel's form once more, which may round it once more.
            assert torch.allclose(first(x), second(x), atol=0.05)
        else:
            assert torch.equal(first(x), second(x))
            assert_equal_states(second.state_dict(), state)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_convolutions_of_a_packed_checkpoint(weights, monkeypatch):
    with_library_unpack(monkeypatch)
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(32, 24, 3, padding=1, stride=2, groups=2)
    weight = layer.weight.detach().clone()
    theirs = by_library(layer, weights)
    ours = quanto_layers.layer_for(torch.nn.Conv2d(32, 24, 3, padding=1, stride=2, groups=2), weights)
    parts = quanto_layers.components_of(theirs.weight)
    ours.weight = torch.nn.Parameter(quanto_layers.assemble(parts, weights, weight.shape), requires_grad=False)
    ours.bias = theirs.bias
    x = torch.randn(2, 32, 8, 8)
    assert torch.equal(ours(x), theirs(x))
    assert_equal_states(ours.state_dict(), theirs.state_dict())
    plain = quanto_layers.plain_layer(ours, torch.float32)
    assert type(plain) is torch.nn.Conv2d
    assert (plain.weight - weight).norm() < ERROR[weights] * weight.norm()
    assert torch.allclose(plain(x), ours(x), atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_cuda(weights, dtype):
    """Packed on the CPU, run on the GPU, in the forms that run there without a compiler."""
    for width, inner in ((80, 48), (256, 384), (256, 24)):
        torch.manual_seed(0)
        net = Net(width, inner).to(dtype)
        weight = net.up.weight.detach().clone()
        quantizer = wp.AutoQuantizer.from_config(wp.QuantoConfig(weights), pre_quantized=False)
        values = {name: value.detach().clone() for name, value in net.named_parameters()}
        quantizer.preprocess_model(net)
        for name, value in values.items():
            if quantizer.check_if_quantized_param(net, name):
                quantizer.create_quantized_param(net, name, value, device="cuda", dtype=dtype)
            else:
                wp.quantizers.modules.set_parameter(net, name, torch.nn.Parameter(value.cuda()))
        assert net.up.weight.device.type == "cuda"
        x = torch.randn(5, width, dtype=dtype, device="cuda", requires_grad=True)
        out = net.up(x)
        expected = x.float() @ weight.cuda().float().t() + net.up.bias.float()
        assert (out.float() - expected).norm() < 2 * ERROR[weights] * expected.norm()
        net(x).float().sum().backward()
        assert x.grad.isfinite().all()
        state = net.state_dict()
        on_cpu = Net(width, inner).to(dtype)
        load(on_cpu, wp.QuantoConfig(weights), dtype=dtype)
        assert list(state) == list(on_cpu.state_dict())
        quantizer.dequantize(net)(x)
