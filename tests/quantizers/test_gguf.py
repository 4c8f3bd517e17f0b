"""The quantizer of GGUF: configs, hooks in their order, and models that hold blocks."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import weightpack
from weightpack.entry import Entry, Part
from weightpack.errors import CheckpointError, ConfigError, FormatError
from weightpack.quantizers.gguf import GGUFQuantizationConfig, GGUFQuantizer

torch = pytest.importorskip("torch")

from weightpack.quantizers.gguf_layers import (  # noqa: E402
    GGUFConv2d,
    GGUFEmbedding,
    GGUFLinear,
    GGUFParameter,
)

from .test_gguf_decode import BLOCKS, random_blocks  # noqa: E402


class Net(torch.nn.Module):
    """One of each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 256)
        self.proj = torch.nn.Linear(256, 64)
        self.conv = torch.nn.Conv2d(64, 32, 3, padding=1, padding_mode="reflect", bias=True)
        self.out = torch.nn.Linear(32, 5, bias=False)
        self.norm = torch.nn.LayerNorm(64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.proj(self.embed(ids)))
        image = hidden.transpose(1, 2).reshape(len(ids), 64, 4, -1)
        return self.out(self.conv(image).flatten(2).transpose(1, 2))


TYPES = {"embed.weight": "Q4_K", "proj.weight": "Q6_K", "conv.weight": "Q8_0", "out.weight": "Q5_1"}


def packed_bytes(model: torch.nn.Module) -> int:
    """Bytes of all packed weights, those that layers share counted once."""
    return sum(value.nbytes for value in model.parameters() if isinstance(value, GGUFParameter))


def entry(name: str, shape: tuple[int, ...], type: str, nbytes: int) -> Entry:
    weights = int(np.prod(shape))
    return Entry(name, shape, type, f"gguf:{type.lower()}", nbytes, weights, (Part(name, type, shape, nbytes),))


def packed_net(seed: int = 0, **options) -> tuple[Net, Net, GGUFQuantizer]:
    """A model on blocks, made by the hooks in their order, and the same one with decoded weights."""
    torch.manual_seed(seed)
    plain = Net().eval()
    stored = {}
    for name, type in TYPES.items():
        weight = plain.get_parameter(name).detach()
        # A kernel is stored as rows of whole blocks.
        rows = weight if weight.shape[-1] % 32 == 0 else weight.reshape(-1, 64)
        stored[name] = weightpack.gguf.quantize(rows, type)
        plain.get_parameter(name).data = weightpack.gguf.dequantize(stored[name], type).reshape(weight.shape)
    quantizer = GGUFQuantizer(GGUFQuantizationConfig(**options))
    quantizer.validate_environment()
    dtype = quantizer.update_torch_dtype(None)
    quantizer.torch_dtype = dtype
    model = copy.deepcopy(plain).to("meta")
    quantizer.entries = {
        name: entry(name, tuple(plain.get_parameter(name).shape), type, stored[name].numel())
        for name, type in TYPES.items()
    }
    quantizer.preprocess_model(model, packed=set(TYPES))
    for name, value in plain.state_dict().items():
        if quantizer.check_if_quantized_param(model, name):
            quantizer.create_quantized_param(model, name, {"": stored[name]}, device="cpu", dtype=dtype)
        else:
            module, _, leaf = name.rpartition(".")
            model.get_submodule(module)._parameters[leaf] = torch.nn.Parameter(value.to(dtype))
    quantizer.postprocess_model(model)
    return model, plain, quantizer


IDS = torch.tensor([[1, 2, 3, 9, 0, 1, 5, 5], [9, 8, 7, 6, 5, 4, 3, 2]])


# Configs.


def test_a_config_round_trips_through_json():
    config = GGUFQuantizationConfig(compute_dtype=torch.bfloat16, modules_to_not_convert=["proj"])
    assert config.compute_dtype == "bfloat16"
    again = GGUFQuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert weightpack.AutoQuantizer.from_dict(config.to_dict()) == config
    assert json.loads(config.to_json_string())["modules_to_not_convert"] == ["proj"]
    assert "compute_dtype" in repr(config)


def test_defaults():
    config = GGUFQuantizationConfig()
    assert config.compute_dtype == "float32"
    assert config.to_diff_dict() == {"quant_method": "gguf", "compute_dtype": "float32"}
    assert weightpack.AutoQuantizer.from_config(config).pre_quantized
    # There is no other way to have it, unless a type is named.
    assert weightpack.AutoQuantizer.from_config(config, pre_quantized=False).pre_quantized
    assert not weightpack.AutoQuantizer.from_config(GGUFQuantizationConfig(quant_type="q8_0")).pre_quantized


def test_what_diffusers_writes_is_read(peer):
    diffusers = peer("diffusers")
    peer("gguf")
    theirs = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float16)
    assert weightpack.AutoQuantizer.as_config(theirs) == GGUFQuantizationConfig("float16")
    assert GGUFQuantizationConfig.from_dict(theirs.to_dict()) == GGUFQuantizationConfig("float16")


def test_what_transformers_writes_is_read():
    theirs = {"quant_method": "gguf", "gguf_file": "model.gguf", "dequantize": False}
    assert weightpack.AutoQuantizer.from_dict(theirs) == GGUFQuantizationConfig()
    with pytest.raises(ConfigError, match="dequantize is true"):
        GGUFQuantizationConfig.from_dict({**theirs, "dequantize": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_dtype": "int8"}, "compute_dtype 'int8' is none of float32, bfloat16, float16"),
        ({"compute_dtype": "float33"}, "compute_dtype 'float33' is not an element type"),
        ({"quant_type": "q9_k"}, "quant_type 'Q9_K' is none of"),
        ({"quant_type": "f16"}, "quant_type 'F16' is none of"),
        ({"quant_type": "iq2_xs"}, "quant_type IQ2_XS is only written with an importance"),
        ({"modules_to_not_convert": [3]}, "does not hold names"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ConfigError, match=message):
        GGUFQuantizationConfig(**options)


def test_configs_and_registry_load_no_torch():
    code = (
        "import sys, weightpack\n"
        "weightpack.AutoQuantizer.from_dict({'quant_method': 'gguf', 'compute_dtype': 'bfloat16'})\n"
        "assert not {'torch', 'gguf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Models.


def test_blocks_are_kept_and_decoded_when_a_layer_runs():
    model, plain, quantizer = packed_net()
    assert [type(model.get_submodule(name.rpartition(".")[0])) for name in TYPES] == [
        GGUFEmbedding, GGUFLinear, GGUFConv2d, GGUFLinear,
    ]  # fmt: skip
    assert set(quantizer.quantized) == {"embed", "proj", "conv", "out"}
    assert quantizer.quantized["conv"] is torch.nn.Conv2d
    assert (model.proj.in_features, model.embed.num_embeddings, model.conv.kernel_size) == (256, 10, (3, 3))
    assert packed_bytes(model) == sum(item.nbytes for item in quantizer.entries.values())
    assert quantizer.packed_bytes(model, "proj.weight") == 64 * 210
    assert quantizer.packed_bytes(model, "proj.bias") is None
    with torch.no_grad():
        assert torch.equal(model(IDS), plain(IDS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compute_dtype(dtype):
    model, plain, _ = packed_net(compute_dtype=dtype)
    assert model.norm.weight.dtype == getattr(torch, dtype)
    with torch.no_grad():
        found, expected = model(IDS), plain(IDS)
        assert torch.equal(found, plain.to(getattr(torch, dtype))(IDS))
    assert found.dtype == getattr(torch, dtype)
    assert torch.linalg.vector_norm(found - expected) < 0.03 * torch.linalg.vector_norm(expected)


def test_large_weights_are_decoded_some_rows_at_a_time(monkeypatch):
    from weightpack.quantizers import gguf_layers

    model, plain, _ = packed_net(compute_dtype="bfloat16")
    monkeypatch.setattr(gguf_layers, "SCRATCH_BYTES", 5 * 256 * 2)
    monkeypatch.setattr(gguf_layers, "_scratch", threading.local())
    inputs = torch.randn(3, 7, 256, dtype=torch.bfloat16)
    with torch.inference_mode():
        found = model.proj(inputs)
    assert len(gguf_layers._scratch.held) == 5 * 256 * 2
    with torch.no_grad():
        assert torch.equal(model.proj(inputs), found)
        assert torch.allclose(found, plain.bfloat16().proj(inputs), rtol=0.01, atol=0.01)
        assert torch.equal(model(IDS), plain(IDS))


def test_threads_do_not_share_what_they_decode_into():
    model, plain, _ = packed_net()
    inputs = [torch.randn(64, 256) for _ in range(4)]
    with torch.no_grad():
        expected = [plain.proj(one) for one in inputs]

    def run(number):
        with torch.no_grad():
            return all(torch.equal(model.proj(inputs[number]), expected[number]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(4)))


def test_layers_give_the_type_they_are_given():
    model, _, _ = packed_net(compute_dtype="float32")
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        assert model.proj(torch.ones(2, 256, dtype=dtype)).dtype == dtype
        assert model.conv(torch.ones(1, 64, 4, 4, dtype=dtype)).dtype == dtype
    # An embedding goes by the type of the model, which may be changed.
    assert model.embed(IDS).dtype == torch.float32
    assert model.half().embed(IDS).dtype == torch.float16
    assert model.proj.weight.dtype == torch.uint8


@pytest.mark.parametrize("info", BLOCKS, ids=lambda info: info.name)
def test_a_linear_layer_on_every_type(info):
    width = 2 * info.block_weights
    blocks = torch.from_numpy(random_blocks(info, 6, 2))
    linear = torch.nn.Linear(width, 6, bias=False, device="meta")
    quantizer = GGUFQuantizer(GGUFQuantizationConfig())
    model = torch.nn.Sequential(linear)
    quantizer.entries = {"0.weight": entry("0.weight", (6, width), info.name, blocks.numel())}
    quantizer.preprocess_model(model, packed={"0.weight"})
    quantizer.create_quantized_param(model, "0.weight", {"": blocks}, device="cpu")
    inputs = torch.randn(3, width)
    expected = torch.nn.functional.linear(inputs, weightpack.gguf.dequantize(blocks, info.name))
    with torch.no_grad():
        assert torch.equal(model(inputs), expected)


def test_inputs_that_a_model_cast_to_the_type_of_packed_weights_are_refused():
    model, _, _ = packed_net()
    inputs = torch.randn(2, 256).to(model.proj.weight.dtype)
    with pytest.raises(FormatError, match=r"input is torch\.uint8"):
        model.proj(inputs)


def test_what_a_model_keeps_in_float32_is_decoded():
    model = Net().to("meta")
    model._keep_in_fp32_modules = ["out"]
    quantizer = GGUFQuantizer(GGUFQuantizationConfig())
    quantizer.entries = {
        name: entry(name, tuple(model.get_parameter(name).shape), type, 1) for name, type in TYPES.items()
    }
    quantizer.preprocess_model(model, packed=set(TYPES))
    assert set(quantizer.quantized) == {"embed", "proj", "conv"}


def test_kernels_of_all_dimensions():
    for dimensions in (1, 2, 3):
        plain = getattr(torch.nn, f"Conv{dimensions}d")(32, 16, 3, stride=2, groups=2)
        rows = weightpack.gguf.quantize(plain.weight.detach().reshape(-1, 16 * 2), "Q8_0")
        model = torch.nn.Sequential(copy.deepcopy(plain).to("meta"))
        quantizer = GGUFQuantizer(GGUFQuantizationConfig())
        quantizer.entries = {"0.weight": entry("0.weight", tuple(plain.weight.shape), "Q8_0", rows.numel())}
        quantizer.preprocess_model(model, packed={"0.weight"})
        quantizer.create_quantized_param(model, "0.weight", {"": rows}, device="cpu")
        model[0]._parameters["bias"] = plain.bias
        plain.weight.data = weightpack.gguf.dequantize(rows, "Q8_0").reshape(plain.weight.shape)
        inputs = torch.randn(2, 32, *[7] * dimensions)
        with torch.no_grad():
            assert torch.equal(model(inputs), plain(inputs))


def test_an_embedding_decodes_only_the_rows_that_are_asked_for(monkeypatch):
    from weightpack.quantizers import gguf_layers

    model, plain, _ = packed_net()
    seen = []
    decode = gguf_layers.decode
    monkeypatch.setattr(
        gguf_layers, "decode", lambda blocks, *rest: seen.append(blocks.numel()) or decode(blocks, *rest)
    )
    assert torch.equal(model.embed(torch.tensor([3])), plain.embed(torch.tensor([3])))
    assert seen == [144]


def test_an_embedding_whose_rows_are_no_blocks():
    plain = torch.nn.Embedding(16, 48)
    rows = weightpack.gguf.quantize(plain.weight.detach().reshape(-1, 256), "Q4_K")
    model = torch.nn.Sequential(copy.deepcopy(plain).to("meta"))
    quantizer = GGUFQuantizer(GGUFQuantizationConfig())
    quantizer.entries = {"0.weight": entry("0.weight", (16, 48), "Q4_K", rows.numel())}
    quantizer.preprocess_model(model, packed={"0.weight"})
    quantizer.create_quantized_param(model, "0.weight", {"": rows}, device="cpu")
    expected = weightpack.gguf.dequantize(rows, "Q4_K").reshape(16, 48)
    assert torch.equal(model(torch.tensor([[5, 0]])), expected[[5, 0]][None])


class Scaled(torch.nn.Embedding):
    """As Gemma's."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("scale", torch.tensor(11.3), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.scale.to(self.weight.dtype)


class Offset(torch.nn.Embedding):
    """As learned positions of OPT: the number of a row is not the number that is asked for."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids + 1)


def test_embedding_classes_that_work_by_row():
    blocks = weightpack.gguf.quantize(torch.randn(4, 32), "Q8_0")
    model = torch.nn.ModuleDict({"a": Scaled(4, 32, device="meta"), "b": Offset(4, 32, device="meta")})
    quantizer = GGUFQuantizer(GGUFQuantizationConfig())
    quantizer.entries = {name: entry(name, (4, 32), "Q8_0", blocks.numel()) for name in ("a.weight", "b.weight")}
    with pytest.warns(UserWarning, match=r"as no layer does it when it runs: b\.weight"):
        quantizer.preprocess_model(model, packed={"a.weight", "b.weight"})
    assert set(quantizer.quantized) == {"a"}
    for dtype in (torch.float32, torch.bfloat16):
        quantizer.create_quantized_param(model, "a.weight", {"": blocks}, device="cpu", dtype=dtype)
        rows = weightpack.gguf.dequantize(blocks, "Q8_0", dtype=dtype)
        found = model["a"](torch.tensor([[2, 0, 2]]))
        assert found.dtype == dtype
        assert torch.equal(found, (rows * model["a"].scale.to(dtype))[[2, 0, 2]][None])
    quantizer.dequantize(model)
    assert type(model["a"]) is Scaled


def test_modules_to_not_convert_are_decoded_while_loading():
    model = Net().to("meta")
    quantizer = GGUFQuantizer(GGUFQuantizationConfig(modules_to_not_convert=["proj"]))
    quantizer.entries = {
        name: entry(name, tuple(model.get_parameter(name).shape), type, 1) for name, type in TYPES.items()
    }
    # What a host protects is no reason to decode what a file has packed.
    quantizer.preprocess_model(model, packed=set(TYPES), skip=["embed"], keep_in_fp32=["out"])
    assert set(quantizer.quantized) == {"embed", "conv"}
    assert not quantizer.check_if_quantized_param(model, "proj.weight")


def test_a_tied_layer_decodes_the_same_blocks():
    model, _, quantizer = packed_net()
    model.head = torch.nn.Linear(256, 10, bias=False)
    model.head.weight = model.embed.weight
    quantizer.postprocess_model(model)
    assert isinstance(model.head, GGUFLinear)
    assert model.head.weight is model.embed.weight
    with torch.no_grad():
        decoded = model.embed.weight.dequantize()
        assert torch.equal(model.head(decoded), decoded @ decoded.T)
    before = packed_bytes(model)
    assert before == packed_bytes(packed_net()[0])
    quantizer.dequantize(model)
    assert model.head.weight is model.embed.weight
    assert model.head.out_features == 10


def test_wrong_sizes():
    model = torch.nn.Sequential(torch.nn.Linear(64, 2, device="meta"))
    quantizer = GGUFQuantizer(GGUFQuantizationConfig())
    quantizer.entries = {"0.weight": entry("0.weight", (2, 64), "Q8_0", 136)}
    quantizer.preprocess_model(model, packed={"0.weight"})
    with pytest.raises(CheckpointError, match=r"102 bytes of Q8_0, and a weight of shape \[2, 64\] takes 136"):
        quantizer.create_quantized_param(model, "0.weight", {"": torch.zeros((3, 34), dtype=torch.uint8)}, device="cpu")


# Packing a model of another kind.


def test_packing_on_the_way():
    torch.manual_seed(1)
    plain = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(64, 8), "odd": torch.nn.Linear(40, 8), "skipped": torch.nn.Linear(64, 8)}
    )
    model = copy.deepcopy(plain).to("meta")
    quantizer = GGUFQuantizer(GGUFQuantizationConfig(quant_type="gguf:Q5_0", modules_to_not_convert=["skipped"]))
    quantizer.preprocess_model(model)
    assert set(quantizer.quantized) == {"a"}
    chosen = quantizer.packing(model, "a.weight")
    assert chosen is not None
    assert chosen.format == "gguf:q5_0"
    assert quantizer.packed_bytes(model, "a.weight") == 8 * 44
    packed = weightpack.quantize(plain["a"].weight.detach(), chosen.format)
    quantizer.create_quantized_param(model, "a.weight", packed, device="cpu")
    by_engine = model["a"].weight
    quantizer.create_quantized_param(model, "a.weight", plain["a"].weight, device="cpu")
    assert torch.equal(by_engine, model["a"].weight)
    assert model["a"].weight.quant_type == "Q5_0"


# The parameter.


def test_a_parameter_survives_what_is_done_to_parameters():
    model, plain, _ = packed_net()
    weight = model.proj.weight
    with torch.no_grad():
        expected = plain(IDS)
    for again in (
        weight.to("cpu"),
        weight.detach(),
        weight.data,
        weight.clone(),
        copy.copy(weight),
        copy.deepcopy(weight),
        pickle.loads(pickle.dumps(weight)),
        GGUFParameter(weight),
        model.state_dict()["proj.weight"],
    ):
        assert isinstance(again, GGUFParameter)
        assert (again.quant_type, again.quant_shape) == ("Q6_K", (64, 256))
        assert torch.equal(again, weight)
        assert not again.requires_grad
    # Anything else sees bytes.
    assert type(weight + 1) is torch.Tensor
    assert type(weight[0]) is torch.Tensor
    assert weight.float().dtype == torch.float32
    assert "Q6_K" in repr(weight)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to("cpu"), model.float()):
        with torch.no_grad():
            assert torch.equal(again(IDS), expected)


def test_state_dicts_are_loaded(tmp_path):
    model, _, _ = packed_net()
    other, _, _ = packed_net(seed=1)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    with torch.serialization.safe_globals([GGUFParameter]):
        other.load_state_dict(torch.load(tmp_path / "state.pt"))
    with torch.no_grad():
        assert torch.equal(model(IDS), other(IDS))


# Training and the rest.


def test_gradients_reach_the_input_and_adapters():
    model, plain, quantizer = packed_net()
    assert quantizer.is_trainable
    for one in (model, plain):
        one.requires_grad_(False)
        torch.manual_seed(7)
        one.lora = torch.nn.Parameter(torch.randn(256, 4) * 0.1)
        hidden = one.embed(IDS) + (one.embed(IDS) @ one.lora) @ one.lora.T
        hidden = one.proj(hidden).transpose(1, 2).reshape(2, 64, 4, -1)
        one.out(one.conv(hidden).flatten(2).transpose(1, 2)).square().sum().backward()
    assert torch.equal(model.lora.grad, plain.lora.grad)
    assert model.lora.grad.abs().sum() > 0


def test_autograd_does_not_keep_decoded_weights():
    model, _, _ = packed_net()
    kept = []

    def remember(tensor):
        kept.append(tensor)
        return tensor

    inputs = torch.randn(1, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        found = model.proj(inputs)
    assert not [tensor for tensor in kept if tensor.numel() >= 64 * 256]
    (gradient,) = torch.autograd.grad(found.sum(), inputs)
    assert torch.allclose(gradient, model.proj.weight.dequantize().sum(0, keepdim=True))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_dequantize(dtype):
    model, plain, quantizer = packed_net()
    again = quantizer.dequantize(model, dtype=dtype)
    assert again is model
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    if dtype is None:
        with torch.no_grad():
            assert torch.equal(model(IDS), plain(IDS))
    assert model.proj.weight.dtype == getattr(torch, dtype or "float32")
    assert "quant_type" not in vars(model.proj)


@pytest.mark.parametrize("type", ["Q4_K", "IQ2_S", "IQ4_XS"])
def test_compiled_in_one_graph(type):
    linear = torch.nn.Linear(256, 8)
    model = torch.nn.Sequential(copy.deepcopy(linear).to("meta"))
    quantizer = GGUFQuantizer(GGUFQuantizationConfig())
    blocks = weightpack.gguf.quantize(linear.weight.detach(), type)
    quantizer.entries = {"0.weight": entry("0.weight", (8, 256), type, blocks.numel())}
    quantizer.preprocess_model(model, packed={"0.weight"})
    quantizer.create_quantized_param(model, "0.weight", {"": blocks}, device="cpu")
    model[0]._parameters["bias"] = linear.bias
    inputs = torch.randn(3, 256)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(inputs), model(inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
def test_on_cuda():
    model, plain, quantizer = packed_net()
    with torch.no_grad():
        found = model.cuda()(IDS.cuda())
        assert model.proj.weight.is_cuda
        assert model.proj.weight.quant_type == "Q6_K"
        assert torch.allclose(found.cpu(), plain(IDS), rtol=1e-3, atol=1e-4)
    assert torch.equal(quantizer.dequantize(model).proj.weight.cpu(), plain.proj.weight)
