"""Checkpoints that ModelOpt exported: a small Llama in every form, loaded without ModelOpt's layers."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
import subprocess
import sys
import warnings

import pytest

import weightpack as wp
from tests.conftest import find_peer
from weightpack.errors import CheckpointError, ConfigError
from weightpack.quantizers.auto import AutoQuantizer

torch = find_peer("torch")
transformers = find_peer("transformers")
find_peer("modelopt")

with warnings.catch_warnings():
    # It warns of kernels that a machine without CUDA does not have, and of releases of transformers.
    warnings.simplefilter("ignore")
    mtq = find_peer("modelopt.torch.quantization")
    mte = find_peer("modelopt.torch.export")
    qtensor = find_peer("modelopt.torch.quantization.qtensor")

from safetensors.torch import load_file  # noqa: E402

from tests.quantizers.modelopt_models import Net, inputs, make, raw, save  # noqa: E402
from weightpack.quantizers.base import quantizer_of  # noqa: E402
from weightpack.quantizers.modelopt_export import ModelOptExportConfig  # noqa: E402
from weightpack.quantizers.modelopt_linear import PackedLinear, kind_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

FORMS = {
    "FP8_DEFAULT_CFG": ("fp8", "FP8", 0.15),
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": ("fp8", "FP8_PER_CHANNEL_PER_TOKEN", 0.15),
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": ("fp8", "fp8_pb_wo", 0.15),
    "NVFP4_DEFAULT_CFG": ("nvfp4", "NVFP4", 0.4),
    "W4A16_NVFP4_CFG": ("nvfp4", "W4A16_NVFP4", 0.4),
    "W4A8_NVFP4_FP8_CFG": ("nvfp4", "W4A8_NVFP4_FP8", 0.4),
    "INT4_AWQ_CFG": ("int4", "W4A16_AWQ", 0.4),
    "W4A8_AWQ_BETA_CFG": ("int4", "W4A8_AWQ", 0.4),
    "INT8_SMOOTHQUANT_CFG": ("int8", "W8A8_SQ_PER_CHANNEL", 0.1),
    "INT8_WEIGHT_ONLY_CFG": ("int8", "W8A16", 0.1),
    "MXFP4_DEFAULT_CFG": ("mxfp4", "mxfp4", 0.5),
    "MXFP8_DEFAULT_CFG": ("mxfp8", "MXFP8", 0.15),
    "NVFP4_MLP_ONLY_CFG": ("nvfp4", "NVFP4", 0.4),
}
TOKENS = torch.arange(24).reshape(2, 12)


def original():
    """The model that is exported."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    return transformers.LlamaForCausalLM(config).bfloat16().eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a form, exported once, and ModelOpt's own weights after quantization by name."""
    done = {}

    def export(form):
        if form not in done:
            folder = tmp_path_factory.mktemp(form)
            model = original()
            preset = copy.deepcopy(getattr(mtq, form)) if form != "KV" else _with_cache()
            with contextlib.redirect_stdout(io.StringIO()):
                mtq.quantize(model, preset, forward_loop=lambda one: one(TOKENS))
                mte.export_hf_checkpoint(model, export_dir=folder)
            done[form] = folder
        return done[form]

    return export


def _with_cache():
    return {**mtq.FP8_DEFAULT_CFG, "quant_cfg": [*mtq.FP8_DEFAULT_CFG["quant_cfg"], *mtq.FP8_KV_CFG["quant_cfg"]]}


def load(folder, **options):
    return wp.from_pretrained(transformers.LlamaForCausalLM, folder, output_loading_info=True, **options)


def by_modelopt(layer, dtype):
    """The weight of a layer as ModelOpt's own tensor classes decode it."""
    shape = torch.Size((layer.out_features, layer.in_features))
    codes, scale = layer.weight.data, layer.weight_scale
    if layer.kind == "nvfp4":
        parts = {"scale": scale, "double_scale": layer.weight_scale_2}
        size = layer.in_features // scale.shape[-1]
        return qtensor.NVFP4QTensor(shape, dtype, codes).dequantize(**parts, block_sizes={-1: size})
    if layer.kind == "mxfp4":
        return qtensor.MXFP4QTensor(shape, dtype, codes).dequantize(scale=scale, block_sizes={-1: 32})
    if layer.kind == "mxfp8":
        return qtensor.MXFP8QTensor(shape, dtype, codes).dequantize(scale=scale, block_sizes={-1: 32})
    if layer.kind == "int4":
        # No class of ModelOpt reads what it exports so.
        return None
    blocks = None
    if scale.dim() == 4:
        scale = scale.reshape(scale.shape[0], scale.shape[2])
        blocks = {0: 128, 1: 128}
    elif scale.dim() == 1:
        scale = scale.reshape(-1, 1)
    kind = qtensor.FP8QTensor if layer.kind == "fp8" else qtensor.INT8QTensor
    return kind(shape, dtype, codes).dequantize(scale=scale, block_sizes=blocks)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_and_runs(exported, form):
    kind, algorithm, error = FORMS[form]
    folder = exported(form)
    model, info = load(folder)
    assert not info.missing
    assert not info.unexpected
    layers = {path: one for path, one in model.named_modules() if isinstance(one, PackedLinear)}
    assert {one.kind for one in layers.values()} == {kind}
    assert len(layers) == (3 if form == "NVFP4_MLP_ONLY_CFG" else 7)
    assert quantizer_of(model).config.quant_algo == algorithm
    assert set(quantizer_of(model).quantized) == set(layers)
    for layer in layers.values():
        found = layer.decoded(torch.float32)
        expected = by_modelopt(layer, torch.float32)
        assert expected is None or torch.equal(found, expected)
    with torch.no_grad():
        expected = original()(TOKENS).logits
        found = model(TOKENS).logits
    assert (found - expected).norm() < error * expected.norm()


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_close_to_those_before(exported, form):
    # Smoothing moves factors between norms and weights; what no norm stands before keeps its own.
    model, _ = load(exported(form))
    quantizer_of(model).dequantize(model, dtype=torch.float32)
    found = model.model.layers[0].mlp.down_proj.weight
    expected = original().model.layers[0].mlp.down_proj.weight.float()
    assert (found - expected).norm() < FORMS[form][2] * 0.4 * expected.norm()


@pytest.mark.parametrize("form", [*FORMS, "KV"])
def test_the_state_is_that_of_the_file(exported, form):
    folder = exported(form)
    stored = load_file(folder / "model.safetensors")
    model, info = load(folder)
    state = model.state_dict()
    assert not info.unexpected
    assert set(state) == set(stored)
    for name, value in stored.items():
        assert state[name].dtype == value.dtype, name
        assert torch.equal(raw(state[name]), raw(value)), name
    assert quantizer_of(model).is_serializable
    assert quantizer_of(model).is_trainable


@pytest.mark.parametrize("form", ["FP8_DEFAULT_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "NVFP4_DEFAULT_CFG"])
def test_a_model_that_is_cast_keeps_its_bytes(exported, form):
    model, _ = load(exported(form))
    layer = model.model.layers[0].mlp.down_proj
    before = {name: raw(value).clone() for name, value in layer.state_dict().items()}
    assert not layer.weight.is_floating_point()
    model.to(torch.float32)
    assert {name: True for name in before} == {
        name: torch.equal(raw(value), before[name]) for name, value in layer.state_dict().items()
    }
    assert model(TOKENS).logits.dtype == torch.float32


@pytest.mark.parametrize("form", ["FP8_DEFAULT_CFG", "INT4_AWQ_CFG", "NVFP4_DEFAULT_CFG"])
def test_turned_back_the_outputs_stay(exported, form):
    model, _ = load(exported(form))
    with torch.no_grad():
        expected = model(TOKENS).logits
        quantizer_of(model).dequantize(model)
        found = model(TOKENS).logits
    assert not any(isinstance(one, PackedLinear) for one in model.modules())
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_older_exports_keep_their_config_beside(exported, tmp_path):
    folder = shutil.copytree(exported("NVFP4_DEFAULT_CFG"), tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    section = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    model, info = load(folder)
    assert not info.unexpected
    assert quantizer_of(model).config.ignore == tuple(section["ignore"])
    assert AutoQuantizer.from_pretrained(folder).quant_algo == "NVFP4"
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ConfigError, match='no section "quantization"'):
        load(folder)


@pytest.mark.parametrize("form", FORMS)
def test_configs_come_back(exported, form):
    folder = exported(form)
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = AutoQuantizer.from_dict(section)
    assert isinstance(config, ModelOptExportConfig)
    assert config.to_dict() == section
    assert AutoQuantizer.from_dict(json.loads(config.to_json_string())) == config
    beside = json.loads((folder / "hf_quant_config.json").read_text())
    assert ModelOptExportConfig.from_file_beside(beside).quant_algo == config.quant_algo


def test_what_a_section_may_not_say():
    for section, told in (
        ({"quant_algo": "NVFP5"}, "NVFP5"),
        ({"quant_algo": "NVFP4_SVDQUANT"}, "NVFP4_SVDQUANT"),
        ({"quant_algo": "W4A16_AWQ", "has_zero_point": True}, "zero points"),
        ({"quant_algo": "FP8", "ignore": [3]}, "names of modules"),
    ):
        with pytest.raises(ConfigError, match=told):
            AutoQuantizer.from_dict({"quant_method": "modelopt", **section})
    kept = AutoQuantizer.from_dict({"quant_method": "modelopt", "quant_algo": "FP8", "new": {"a": 1}})
    assert kept.to_dict() == {"quant_method": "modelopt", "quant_algo": "FP8", "new": {"a": 1}}
    quantizer = AutoQuantizer.from_config(kept, pre_quantized=False)
    with pytest.raises(ConfigError, match="packed already"):
        quantizer.validate_environment()


def test_sizes_are_those_of_the_file(exported):
    folder = exported("NVFP4_DEFAULT_CFG")
    model, _ = load(folder, device_map="auto", max_memory={"cpu": "1GB"})
    quantizer = quantizer_of(model)
    stored = load_file(folder / "model.safetensors")
    for path in quantizer.quantized:
        parts = [value for name, value in stored.items() if name.startswith(f"{path}.")]
        assert quantizer.packed_bytes(model, f"{path}.weight") == sum(value.nbytes for value in parts)


# Arrays made by hand: no host, and no ModelOpt to run.


def nvfp4_net():
    """A small model whose layer `wide` is NVFP4, as it would be exported."""
    net = make()
    packed, scale, second = qtensor.NVFP4QTensor.quantize(net.wide.weight.detach(), 16)
    state = {**net.state_dict(), "wide.weight": packed._quantized_data}
    state |= {"wide.weight_scale": scale, "wide.weight_scale_2": second}
    return net, state, {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["odd", "up", "lm_head"]}


def test_modelopt_is_not_needed(tmp_path):
    net, state, section = nvfp4_net()
    folder = save(tmp_path / "net", state, section)
    code = (
        "import sys\n"
        "sys.modules['modelopt'] = None\n"
        "import weightpack as wp, torch\n"
        "from tests.quantizers.modelopt_models import Net, inputs\n"
        f"model = wp.from_pretrained(Net, {str(folder)!r})\n"
        f"torch.save(model(inputs())[0], {str(tmp_path / 'out.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path.parent, env=_environment())
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    expected = net(inputs())[0]
    assert (found - expected).norm() < 0.12 * expected.norm()
    assert torch.equal(found, wp.from_pretrained(Net, folder)(inputs())[0])


def _environment():
    import os
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(root)])}


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    _, state, section = nvfp4_net()
    for number, (change, told) in enumerate(
        (
            ({"wide.weight_scale": torch.ones(130, 15)}, r"uint8 \[130, 128\] with weight_scale torch.float32"),
            ({"wide.weight": state["wide.weight"][:-1]}, r"no packed form of \[130, 256\]"),
            ({"wide.weight_scale": None}, "has no weight_scale"),
            ({"wide.weight": None}, "scales and no codes"),
        )
    ):
        changed = {name: value for name, value in {**state, **change}.items() if value is not None}
        with pytest.raises(CheckpointError, match=told):
            wp.from_pretrained(Net, save(tmp_path / str(number), changed, section))
    codes = {**state, "up.weight": state["up.weight"].to(torch.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match=r'"up\.weight" is stored as F8_E4M3'):
        wp.from_pretrained(Net, save(tmp_path / "bare", codes, section))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (130,), (130, 1), (2, 1, 2, 1), (2, 2), (1, 2), (130, 2)], ids=str)
def test_scales_of_every_shape(shape, dtype):
    from weightpack.quantizers.modelopt_decode import exported as decode

    torch.manual_seed(0)
    codes = torch.randn(130, 256).to(torch.float8_e4m3fn)
    scale = torch.rand(shape) + 0.5
    assert kind_of({"": codes, "weight_scale": scale}, (130, 256), "x") == "fp8"
    grid = scale.reshape(2, 2) if len(shape) == 4 else scale.reshape(-1, 1) if len(shape) == 1 else scale
    if grid.dim() == 2 and grid.numel() > 1:
        rows = 1 if grid.shape[0] == 130 else 130 if grid.shape[0] == 1 else 128
        columns = 256 // grid.shape[1]
        grid = grid.repeat_interleave(rows, 0)[:130].repeat_interleave(columns, 1)
    assert torch.equal(decode(codes, scale, dtype), (codes.float() * grid).to(dtype))


def test_slabs_change_nothing(monkeypatch):
    from weightpack.quantizers import modelopt_decode

    torch.manual_seed(0)
    codes = torch.randn(300, 256).to(torch.float8_e4m3fn)
    scales = [torch.rand(3, 1, 2, 1), torch.rand(300), torch.rand(())]
    expected = [modelopt_decode.exported(codes, scale, torch.float32) for scale in scales]
    monkeypatch.setattr(modelopt_decode, "SLAB_WEIGHTS", 256 * 7)
    for scale, whole in zip(scales, expected, strict=True):
        assert torch.equal(modelopt_decode.exported(codes, scale, torch.float32), whole)


@pytest.mark.parametrize("form", ["FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG"])
def test_copies_and_offloaded_models_run_alike(exported, form):
    accelerate = find_peer("accelerate")
    model, _ = load(exported(form))
    with torch.no_grad():
        expected = model(TOKENS).logits
        again = copy.deepcopy(model)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        for other in (again, model):
            assert torch.equal(other(TOKENS).logits, expected)


def test_adapters_can_be_trained_on_top(tmp_path):
    _, state, section = nvfp4_net()
    model = wp.from_pretrained(Net, save(tmp_path / "net", state, section))
    x = inputs().requires_grad_()
    model(x)[0].sum().backward()
    assert x.grad.abs().sum() > 0
    assert not model.wide.weight.requires_grad


@pytest.mark.cuda
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu(exported, form):
    folder = exported(form)
    on_cpu, _ = load(folder)
    model, _ = load(folder, device_map="cuda")
    with torch.no_grad():
        expected = on_cpu(TOKENS).logits
        found = model(TOKENS.cuda()).logits.cpu()
    for path, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            assert torch.equal(layer.decoded(torch.float32).cpu(), on_cpu.get_submodule(path).decoded(torch.float32))
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.cuda
def test_products_in_fp8(exported):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a CUDA device of capability 8.9 or later")
    model, _ = load(exported("FP8_DEFAULT_CFG"), device_map="cuda")
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 5, layer.in_features, dtype=torch.bfloat16, device="cuda") * layer.input_scale * 100
    assert layer._runs_in_fp8(x)
    expected = torch.nn.functional.linear(x, layer.decoded(torch.bfloat16))
    found = layer(x)
    assert found.shape == expected.shape
    assert (found - expected).norm() < 0.06 * expected.norm()
