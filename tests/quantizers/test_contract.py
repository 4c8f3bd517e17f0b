"""What every backend's layers do alike: the contract that CONTRIBUTING states, for one config of each kind."""

from __future__ import annotations

import copy

import pytest

from tests.conftest import find_peer

torch = find_peer("torch")

import weightpack as wp  # noqa: E402
from tests.loading import nets  # noqa: E402

BACKENDS = {
    "nf4": ("bitsandbytes", lambda: wp.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "double quant": (
        "bitsandbytes",
        lambda: wp.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    ),
    "int8": ("bitsandbytes", lambda: wp.BitsAndBytesConfig(load_in_8bit=True)),
    "gguf q8_0": (None, lambda: wp.GGUFQuantizationConfig(quant_type="q8_0")),
    "gguf q4_k": (None, lambda: wp.GGUFQuantizationConfig(quant_type="q4_k", compute_dtype="bfloat16")),
    "quanto int8": ("optimum.quanto", lambda: wp.QuantoConfig("int8")),
    "quanto int4": ("optimum.quanto", lambda: wp.QuantoConfig("int4")),
    "quanto float8": ("optimum.quanto", lambda: wp.QuantoConfig("float8")),
    "torchao int8": ("torchao", lambda: wp.TorchAoConfig("int8")),
    "torchao float8": ("torchao", lambda: wp.TorchAoConfig("float8")),
    "torchao nvfp4": ("torchao", lambda: wp.TorchAoConfig("nvfp4")),
    "modelopt FP8": ("modelopt", lambda: wp.NVIDIAModelOptConfig("FP8")),
    "modelopt INT8": ("modelopt", lambda: wp.NVIDIAModelOptConfig("INT8")),
    "modelopt NVFP4": ("modelopt", lambda: wp.NVIDIAModelOptConfig("NVFP4")),
}
IN_ONE_PIECE = {"torchao nvfp4": "torchao's own tensors of this kind do not take other inputs"}
"""Backends whose inputs must be contiguous, and why."""
WIDTH = 256
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    net = nets.make(dtype=torch.bfloat16, width=WIDTH)
    return net, nets.save(tmp_path_factory.mktemp("net") / "net", net, width=WIDTH)


@pytest.fixture(params=[(name, dtype) for name in BACKENDS for dtype in ("bfloat16", "float32")], ids=str)
def packed(request, source):
    """A packed net and the plain one."""
    name, dtype = request.param
    needs, make = BACKENDS[name]
    if needs is not None:
        find_peer(needs)
    net, folder = source
    model = wp.from_pretrained(nets.Net, folder, quantization_config=make(), torch_dtype=dtype)
    return model, copy.deepcopy(net).to(getattr(torch, dtype))


def storage(model):
    """All bytes of a model's state, by name."""
    found = {}

    def put(name, value):
        if hasattr(value, "__tensor_flatten__"):
            for part in value.__tensor_flatten__()[0]:
                put(f"{name}.{part}", getattr(value, part))
        else:
            found[name] = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()

    for name, value in model.state_dict().items():
        put(name, value)
    return found


def inputs(dtype):
    """Inputs of all kinds of shapes and layouts for a layer of WIDTH."""
    torch.manual_seed(1)
    x = torch.randn(6, 4, WIDTH).to(dtype)
    wide = torch.randn(5, 2 * WIDTH).to(dtype)
    return [x, x[0], x[0, 0], x.transpose(0, 1), wide[:, ::2], x[:1].expand(3, 4, WIDTH), x[:0]]


def test_layers_of_every_backend(packed, request):
    model, net = packed
    quantizer = wp.quantizer_of(model)
    assert {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"} <= set(quantizer.quantized)
    before = storage(model)
    layer, plain = model.blocks[0].up, net.blocks[0].up
    name = request.node.callspec.params["packed"][0]
    for x in inputs(plain.weight.dtype):
        x = x.contiguous() if name in IN_ONE_PIECE else x
        with torch.no_grad():
            found, wanted, again = layer(x), plain(x), layer(x.contiguous())
        assert found.shape == wanted.shape
        assert found.dtype == wanted.dtype
        # Products may be summed in another order where inputs lie differently.
        torch.testing.assert_close(found, again, rtol=0.02, atol=0.02)
        if wanted.numel():
            assert ((found - wanted).float().norm() / wanted.float().norm()).item() < 0.2
    assert storage(model) == before

    twin = copy.deepcopy(model)
    assert storage(twin) == before
    assert torch.equal(twin(nets.TOKENS), model(nets.TOKENS))
    assert storage(model.to("cpu")) == before


def test_gradients_reach_the_input(packed):
    model, net = packed
    if not wp.quantizer_of(model).is_trainable:
        pytest.skip("says that it is not trainable")
    x = inputs(net.scale.dtype)[0].requires_grad_()
    model.blocks[0].up(x).float().square().sum().backward()
    found, x.grad = x.grad, None
    net.blocks[0].up(x).float().square().sum().backward()
    assert ((found - x.grad).float().norm() / x.grad.float().norm()).item() < 0.3


def test_back_to_ordinary_layers(packed):
    model, _ = packed
    with torch.no_grad():
        before = model(nets.TOKENS).float()
        plain = model.dequantize()
        after = plain(nets.TOKENS).float()
    assert type(plain.blocks[0].up) is torch.nn.Linear
    assert wp.quantizer_of(plain) is None
    assert ((before - after).norm() / after.norm()).item() < 0.05
