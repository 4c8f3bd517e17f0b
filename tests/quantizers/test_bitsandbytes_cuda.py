"""bitsandbytes on a GPU: packed on the CPU, moved as packed bytes, run by its own kernels. Needs CUDA."""

from __future__ import annotations

import copy

import pytest

import weightpack as wp
from tests.conftest import find_peer

torch = find_peer("torch")
bnb = find_peer("bitsandbytes")

from tests.loading import nets  # noqa: E402
from tests.quantizers.bitsandbytes_models import bits, load  # noqa: E402

pytestmark = pytest.mark.cuda

CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4 double": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "nf4 as bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}
NAMES = list(CONFIGS)


def pair(name, rows=96, columns=128, dtype=torch.float16):
    """The same packed layer on the CPU and on the GPU; no bias, for upstream casts that of a GPU layer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(columns, rows, bias=False)).to(dtype)
    on_gpu = copy.deepcopy(model)
    config = wp.BitsAndBytesConfig(**CONFIGS[name])
    load(model, config, dtype=dtype)
    load(on_gpu, config, dtype=dtype, device="cuda")
    return model[0].eval(), on_gpu[0].eval()


@pytest.mark.parametrize("name", NAMES)
def test_the_gpu_holds_the_bytes_that_the_cpu_packed(name):
    on_cpu, on_gpu = pair(name)
    assert on_gpu.weight.device.type == "cuda"
    assert bits(on_gpu.state_dict()) == bits(on_cpu.state_dict())
    assert all(value.device.type == "cuda" for key, value in on_gpu.state_dict().items() if key != "weight_format")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 40])
def test_a_forward_is_right_and_leaves_every_byte(name, batch):
    on_cpu, on_gpu = pair(name)
    before = bits(on_gpu.state_dict())
    x = torch.randn(batch, 128, dtype=torch.float16)
    with torch.no_grad():
        expected = torch.nn.functional.linear(x.float(), on_cpu.decoded(torch.float32))
        got = on_gpu(x.cuda())
    assert got.device.type == "cuda"
    assert ((got.cpu().float() - expected).norm() / expected.norm()).item() < 0.03
    assert bits(on_gpu.state_dict()) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ran", [False, True])
def test_there_and_back(name, ran):
    layer, _ = pair(name)
    before = bits(layer.state_dict())
    x = torch.randn(3, 128, dtype=torch.float16)
    model = torch.nn.Sequential(layer)
    with torch.no_grad():
        expected = model(x)
        for _ in range(2):
            model.to("cuda")
            if ran:
                got = model(x.cuda()).cpu()
                assert ((got - expected).float().norm() / expected.float().norm()).item() < 0.03
            model.cpu()
            assert torch.equal(model(x), expected)
    assert bits(layer.state_dict()) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ran", [False, True])
def test_a_saved_state_is_loaded_on_the_gpu(name, ran):
    saved, layer = pair(name)
    for value in saved.state_dict().values():
        if value.dtype in (torch.uint8, torch.int8) and value.dim() == 2:
            value.bitwise_xor_(1)
    if ran:
        layer(torch.randn(2, 128, dtype=torch.float16).cuda())
    layer.load_state_dict(saved.state_dict())
    assert layer.weight.device.type == "cuda"
    assert bits(layer.state_dict()) == bits(saved.state_dict())
    x = torch.randn(2, 128, dtype=torch.float16)
    got, expected = layer(x.cuda()).cpu().float(), saved(x).float()
    assert ((got - expected).norm() / expected.norm()).item() < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_decoded_on_the_gpu_as_on_the_cpu(name):
    on_cpu, on_gpu = pair(name)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        decoded = on_gpu.decoded(dtype)
        assert decoded.device.type == "cuda"
        torch.testing.assert_close(decoded.cpu(), on_cpu.decoded(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_what_stands_before_the_layer(name):
    on_cpu, on_gpu = pair(name)
    x = torch.randn(8, 128, dtype=torch.float16)
    there = x.cuda().requires_grad_()
    on_gpu.train()(there).float().sum().backward()
    here = x.detach().clone().requires_grad_()
    on_cpu.train()(here).float().sum().backward()
    assert ((there.grad.cpu() - here.grad).float().norm() / here.grad.float().norm()).item() < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_a_model_goes_to_the_gpu_unless_told_otherwise(name, tmp_path):
    folder = nets.save(tmp_path / "net", nets.make(), shards=2)
    config = wp.BitsAndBytesConfig(**CONFIGS[name])
    options = {"quantization_config": config, "torch_dtype": "float16"}
    model = wp.from_pretrained(nets.Net, folder, **options)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    on_cpu = wp.from_pretrained(nets.Net, folder, device_map="cpu", **options)
    assert {parameter.device.type for parameter in on_cpu.parameters()} == {"cpu"}
    assert bits(model.state_dict()) == bits(on_cpu.state_dict())
    with torch.no_grad():
        got, expected = model(nets.TOKENS.cuda()).cpu().float(), on_cpu(nets.TOKENS).float()
    assert ((got - expected).norm() / expected.norm()).item() < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_offloaded_modules_are_not_packed(name, tmp_path):
    folder = nets.save(tmp_path / "net", nets.make())
    config = wp.BitsAndBytesConfig(**CONFIGS[name], llm_int8_enable_fp32_cpu_offload=True)
    device_map = {"": 0, "blocks.1": "cpu"}
    model = wp.from_pretrained(
        nets.Net, folder, quantization_config=config, torch_dtype="float16", device_map=device_map
    )
    assert isinstance(model.blocks[0].up, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    assert type(model.blocks[1].up) is torch.nn.Linear
    reference = nets.make()(nets.TOKENS)
    with torch.no_grad():
        got = model(nets.TOKENS.cuda()).cpu().float()
    assert ((got - reference).norm() / reference.norm()).item() < 0.2
