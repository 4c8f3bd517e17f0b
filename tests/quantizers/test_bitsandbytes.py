"""What both widths of bitsandbytes share: packages, devices, which layers are taken."""

from __future__ import annotations

import pytest

import weightpack as wp
from tests.conftest import find_peer
from weightpack.errors import BackendError, ConfigError
from weightpack.quantizers.auto import AutoQuantizer

torch = find_peer("torch")
bnb = find_peer("bitsandbytes")

from tests.quantizers.bitsandbytes_models import Net, load  # noqa: E402

WIDTHS = ["load_in_4bit", "load_in_8bit"]


def quantizer_of(width, *, pre_quantized=False, **fields):
    return AutoQuantizer.from_config(wp.BitsAndBytesConfig(**{width: True}, **fields), pre_quantized=pre_quantized)


@pytest.mark.parametrize("width", WIDTHS)
def test_no_gpu_is_asked_for(width, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked for a GPU"))
    quantizer = quantizer_of(width)
    for device_map in (None, "auto", {"": "cpu"}, {"up": "cpu", "down": "cpu"}):
        quantizer.validate_environment(device_map=device_map)
        assert quantizer.update_device_map(device_map) == device_map
    assert quantizer.update_torch_dtype(None) == torch.float16
    assert quantizer.update_torch_dtype(torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize("width", WIDTHS)
def test_the_current_gpu_is_taken_where_there_is_one(width, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    quantizer = quantizer_of(width)
    assert quantizer.update_device_map(None) == {"": 1}
    assert quantizer.update_device_map({"": "cpu"}) == {"": "cpu"}


@pytest.mark.parametrize(("package", "version"), [("bitsandbytes", "0.45.0"), ("accelerate", "0.20.0")])
def test_old_packages_are_named(package, version, monkeypatch):
    monkeypatch.setattr(find_peer(package), "__version__", version)
    with pytest.raises(BackendError, match=f"{package} {version} is too old to .* expected .* or later"):
        quantizer_of("load_in_4bit").validate_environment()


def test_a_missing_package_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BackendError, match="bitsandbytes is needed to") as caught:
        quantizer_of("load_in_8bit").validate_environment()
    assert "weightpack[bitsandbytes]" in caught.value.hint


MIXED = [
    ({"up": "cuda:0", "down": "cpu"}, "down"),
    ({"up": "cuda:0", "down": "disk"}, "down"),
    ({"up": 0, "down": torch.device("cpu")}, "down"),
    ({"up": "cpu", "down": "disk"}, "down"),
    ({"": "disk"}, ""),
]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("device_map", "left"), MIXED, ids=str)
def test_offloading_wants_its_flag_by_the_right_name(width, device_map, left):
    message = f'device_map offloads "{left}" to the CPU or disk'
    with pytest.raises(ConfigError, match=message) as caught:
        quantizer_of(width).validate_environment(device_map=device_map)
    assert "llm_int8_enable_fp32_cpu_offload=True" in caught.value.hint
    with pytest.raises(ConfigError, match=message):
        quantizer_of(width).update_device_map(device_map)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("device_map", "left"), MIXED, ids=str)
def test_what_is_offloaded_stays_in_full_precision(width, device_map, left):
    quantizer = quantizer_of(width, llm_int8_enable_fp32_cpu_offload=True)
    quantizer.validate_environment(device_map=device_map)
    quantizer.update_device_map(device_map)
    model = Net()
    quantizer.preprocess_model(model)
    assert set(quantizer.quantized) == ({"up", "down"} - {left} if left else set())
    assert type(model.down) is torch.nn.Linear


def test_a_skipped_module_may_be_offloaded():
    quantizer = quantizer_of("load_in_4bit", llm_int8_skip_modules=["down"])
    quantizer.validate_environment(device_map={"up": "cuda:0", "down": "cpu"})


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("device_map", [{"up": "cuda:0", "down": "cpu"}, {"up": "cpu", "down": "disk"}], ids=str)
def test_packed_weights_are_not_offloaded(width, device_map):
    quantizer = quantizer_of(width, pre_quantized=True, llm_int8_enable_fp32_cpu_offload=True)
    quantizer.update_device_map(device_map)
    # What is not packed may be.
    quantizer.preprocess_model(Net(), packed={"up.weight"})
    assert set(quantizer.quantized) == {"up"}
    with pytest.raises(ConfigError, match=r'device_map offloads "down" .* the checkpoint holds it packed'):
        quantizer.preprocess_model(Net(), packed={"up.weight", "down.weight"})


@pytest.mark.parametrize("width", WIDTHS)
def test_only_linear_layers_are_taken(width):
    class Special(torch.nn.Linear):
        pass

    model = torch.nn.Sequential(
        torch.nn.Linear(8, 8), Special(8, 8), torch.nn.Embedding(4, 8), torch.nn.Conv1d(8, 8, 1)
    )
    quantizer = load(model, wp.BitsAndBytesConfig(**{width: True}))
    assert set(quantizer.quantized) == {"0"}
    # Both hosts ask a layer what it was.
    assert model[0].source_cls is torch.nn.Linear
    assert not any(parameter.requires_grad for parameter in model[0].parameters())


@pytest.mark.parametrize("width", WIDTHS)
def test_lists_of_the_caller_and_of_the_host(width):
    model = Net()
    quantizer = load(
        model, wp.BitsAndBytesConfig(**{width: True}, llm_int8_skip_modules=["down"]), keep_in_fp32=["norm"]
    )
    assert set(quantizer.quantized) == {"up"}
    assert quantizer.modules_to_not_convert == ["down", "norm"]
    assert quantizer.config.llm_int8_skip_modules == ("down",)


def test_importing_the_quantizer_loads_neither_torch_nor_numpy():
    import subprocess
    import sys

    code = (
        "import sys, weightpack as wp; from weightpack.quantizers.auto import AutoQuantizer\n"
        "q = AutoQuantizer.from_config(wp.BitsAndBytesConfig(load_in_4bit=True))\n"
        "print(sorted({'torch', 'numpy', 'bitsandbytes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_compiled_in_one_graph(width, double_quant, training):
    torch.manual_seed(0)
    model = Net()
    load(model, wp.BitsAndBytesConfig(**{width: True}, bnb_4bit_use_double_quant=double_quant))
    model.train(training)
    x = torch.randn(3, 80, requires_grad=training)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got = compiled(x)
    torch.testing.assert_close(got, expected)
    if training:
        (slope,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(torch.autograd.grad(got.square().sum(), x)[0], slope)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(width, dtype):
    torch.manual_seed(0)
    model = Net().eval()
    dense = Net()
    dense.load_state_dict(model.state_dict())
    load(model, wp.BitsAndBytesConfig(**{width: True}))
    x = torch.randn(3, 80)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32), torch.no_grad():
        got, expected = model(x).float(), dense(x).float()
    assert (got - expected).norm() / expected.norm() < 0.25
