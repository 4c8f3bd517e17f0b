"""Models packed for ModelOpt, in the form of its export: beside what ModelOpt itself writes."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import subprocess
import sys
import warnings

import pytest

from tests.conftest import find_peer

torch = find_peer("torch")
transformers = find_peer("transformers")
find_peer("modelopt")

with warnings.catch_warnings():
    # It warns of kernels that a machine without CUDA does not have, and of releases of transformers.
    warnings.simplefilter("ignore")
    mtq = find_peer("modelopt.torch.quantization")
    mte = find_peer("modelopt.torch.export")

from safetensors.torch import load_file  # noqa: E402

import weightpack as wp  # noqa: E402
from tests.quantizers.modelopt_models import Net, inputs, make, raw, save  # noqa: E402
from weightpack.errors import ConfigError  # noqa: E402
from weightpack.quantizers.base import quantizer_of  # noqa: E402
from weightpack.quantizers.modelopt_linear import PackedLinear  # noqa: E402
from weightpack.quantizers.modelopt_unified import by_row_pairs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.arange(24).reshape(2, 12)


def original(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def calibrate(model):
    with torch.no_grad():
        model(TOKENS)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request, tmp_path_factory):
    """The plain model, in a folder."""
    place = tmp_path_factory.mktemp(request.param) / "llama"
    original(getattr(torch, request.param)).save_pretrained(place)
    return place


def with_inputs(preset, kind):
    """A config of ModelOpt's own, with its ranges of inputs."""
    given = copy.deepcopy(preset)
    return wp.NVIDIAModelOptConfig(kind, modelopt_config=given, forward_loop=calibrate)


FORMS = {
    "FP8": ("FP8", lambda: wp.NVIDIAModelOptConfig("FP8_FP8", forward_loop=calibrate)),
    "FP8 weights": ("FP8", lambda: wp.NVIDIAModelOptConfig("FP8")),
    "FP8 rows": ("FP8_PER_CHANNEL_PER_TOKEN", lambda: with_inputs(mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, "FP8")),
    "FP8 blocks": ("fp8_pb_wo", lambda: with_inputs(mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG, "FP8")),
    "INT8 rows": ("W8A16", lambda: wp.NVIDIAModelOptConfig("INT8", channel_quantize=0)),
    "INT8": ("W8A8_SQ_PER_CHANNEL", lambda: with_inputs(mtq.INT8_DEFAULT_CFG, "INT8")),
    "INT4": ("W4A16_AWQ", lambda: wp.NVIDIAModelOptConfig("INT4")),
    "NVFP4 weights": ("W4A16_NVFP4", lambda: wp.NVIDIAModelOptConfig("NVFP4")),
    "NVFP4": ("NVFP4", lambda: with_inputs(mtq.NVFP4_DEFAULT_CFG, "NVFP4")),
    "NVFP4 mlp": ("NVFP4", lambda: with_inputs(mtq.NVFP4_MLP_ONLY_CFG, "NVFP4")),
}


def read(place):
    """Tensors, `hf_quant_config.json`, and the section of `config.json`."""
    config = json.loads((place / "config.json").read_text())
    beside = json.loads((place / "hf_quant_config.json").read_text())
    return load_file(place / "model.safetensors"), beside, config["quantization_config"]


def by_modelopt(place, config, dtype):
    """What ModelOpt exports of the same model with the same config."""
    from weightpack.quantizers.modelopt_entries import default_entries

    model = original(dtype)
    entries = config.entries()
    if config.modelopt_config is None:
        entries = [*entries, *default_entries()]
    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(model, {"quant_cfg": entries, "algorithm": "max"}, forward_loop=calibrate)
        mte.export_hf_checkpoint(model, export_dir=place)
    return read(place)


@pytest.mark.parametrize("name_of_form", FORMS)
def test_the_export_is_that_of_modelopt(folder, tmp_path, name_of_form):
    algorithm, config = FORMS[name_of_form]
    dtype = torch.float32 if "float32" in str(folder) else torch.bfloat16
    model = wp.from_pretrained(transformers.LlamaForCausalLM, folder, quantization_config=config(), torch_dtype=dtype)
    wp.save_pretrained(model, tmp_path / "ours", form="unified")
    found, beside, section = read(tmp_path / "ours")
    wanted, other_beside, other_section = by_modelopt(tmp_path / "theirs", config(), dtype)
    if algorithm == "W4A16_AWQ":
        # ModelOpt says so of every INT4 model; there are factors for inputs only after AWQ.
        assert other_beside["quantization"].pop("pre_quant_scale") is True
        assert beside["quantization"].pop("pre_quant_scale") is False
    assert beside == other_beside
    assert section == other_section
    assert section["quant_algo"] == algorithm
    shapes = {name: (value.dtype, tuple(value.shape)) for name, value in found.items()}
    assert shapes == {name: (value.dtype, tuple(value.shape)) for name, value in wanted.items()}
    layers = [name for name in wanted if name.endswith("proj.weight") and f"{name}_scale" in wanted]
    assert len(layers) == (3 if name_of_form == "NVFP4 mlp" else 7)
    for name, value in wanted.items():
        if name in layers:
            alike = (raw(found[name]) == raw(value)).float().mean().item()
            # Codes of those that share the larger scale of another layer were found with their own.
            shares = "NVFP4" in name_of_form and any(part in name for part in ("q_", "k_", "v_", "gate_", "up_"))
            assert alike > (0.99 if dtype == torch.float32 and not shares else 0.8), (name, alike)
        elif "scale" in name:
            # Rounded twice where layers share the other scale. Ranges of inputs are those of a model whose
            # weights are packed already, and ModelOpt's those of the one before.
            bound = 0.13 if value.dtype == torch.float8_e4m3fn else 0.3 if "input" in name else 0.007
            torch.testing.assert_close(found[name].float(), value.float(), rtol=bound, atol=0)
        else:
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", FORMS)
def test_it_is_read_back(tmp_path, name):
    _, config = FORMS[name]
    dtype = torch.bfloat16
    folder = tmp_path / "llama"
    original(dtype).save_pretrained(folder)
    model = wp.from_pretrained(transformers.LlamaForCausalLM, folder, quantization_config=config(), torch_dtype=dtype)
    packed = dict.fromkeys(quantizer_of(model).quantized)
    wp.save_pretrained(model, tmp_path / "saved", form="unified")
    again, info = wp.from_pretrained(
        transformers.LlamaForCausalLM, tmp_path / "saved", torch_dtype=dtype, output_loading_info=True
    )
    assert not info.missing
    assert not info.unexpected
    assert quantizer_of(again).quantized.keys() == packed.keys()
    plain = quantizer_of(model).dequantize(model, dtype=torch.float32)
    for path in packed:
        layer = again.get_submodule(path)
        assert isinstance(layer, PackedLinear)
        found, wanted = layer.decoded(torch.float32), plain.get_submodule(path).weight.float()
        # Scales of 8 bits are rounded anew where layers share the other one.
        bound = 0.04 if "NVFP4" in name and "down" not in path and "o_proj" not in path else 0.003
        assert (found - wanted).norm() <= bound * wanted.norm(), path
    # And written again, nothing changes.
    wp.save_pretrained(again, tmp_path / "twice")
    first, second = read(tmp_path / "saved"), read(tmp_path / "twice")
    assert first[1:] == second[1:]
    assert first[0].keys() == second[0].keys()
    assert all(torch.equal(raw(value), raw(second[0][name])) for name, value in first[0].items())
    # In the one form that it has, asked for by name.
    wp.save_pretrained(again, tmp_path / "third", form="unified")
    third = read(tmp_path / "third")
    assert third[1:] == first[1:]
    assert all(torch.equal(raw(value), raw(third[0][name])) for name, value in first[0].items())


@pytest.mark.parametrize("preset", ["INT4_AWQ_CFG", "MXFP4_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "W4A8_AWQ_BETA_CFG"])
def test_exports_of_modelopt_are_saved_as_they_are(tmp_path, preset):
    model = original(torch.bfloat16)
    given = copy.deepcopy(getattr(mtq, preset))
    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(model, given, forward_loop=calibrate)
        mte.export_hf_checkpoint(model, export_dir=tmp_path / "theirs")
    loaded = wp.from_pretrained(transformers.LlamaForCausalLM, tmp_path / "theirs")
    wp.save_pretrained(loaded, tmp_path / "ours")
    wanted, found = read(tmp_path / "theirs"), read(tmp_path / "ours")
    assert found[1:] == wanted[1:]
    assert found[0].keys() == wanted[0].keys()
    assert all(torch.equal(raw(value), raw(found[0][name])) for name, value in wanted[0].items())


@pytest.mark.parametrize("kind", ["FP8", "INT8", "INT4", "NVFP4"])
def test_layers_of_all_sizes_are_exported_as_by_modelopt(tmp_path, kind):
    export = find_peer("modelopt.torch.export.unified_export_hf")._export_quantized_weight
    config = wp.NVIDIAModelOptConfig(
        kind, disable_conv_quantization=True, channel_quantize=0 if kind == "INT8" else None
    )
    net = make()
    model = wp.from_pretrained(Net, save(tmp_path / "net", net), quantization_config=config)
    packed = list(quantizer_of(model).quantized)
    # Rows of 130 are no blocks of 16: such a layer stays as it is.
    assert ("odd" in packed) == (kind != "NVFP4")
    skipped = [{"quantizer_name": f"{name}.*", "enable": False} for name in ("lm_head", "conv", "odd", "up", "wide")]
    skipped = [entry for entry in skipped if entry["quantizer_name"][:-2] not in packed]
    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(net, {"quant_cfg": [*config.entries(), *skipped], "algorithm": "max"})
    if kind == "INT4":
        # Here blocks of 128 go on in the next row, and not in an export, of ModelOpt neither.
        with pytest.raises(ConfigError, match='"odd" has a weight of 64 rows in 130 columns'):
            wp.save_pretrained(model, tmp_path / "saved", form="unified")
        return
    wp.save_pretrained(model, tmp_path / "saved", form="unified")
    found, beside, _ = read(tmp_path / "saved")
    assert ("odd" in beside["quantization"]["exclude_modules"]) == ("odd" not in packed)
    for path in packed:
        layer = net.get_submodule(path)
        export(layer, torch.float32)
        for leaf in ("weight", "weight_scale", "weight_scale_2"):
            if hasattr(layer, leaf):
                wanted = getattr(layer, leaf).detach()
                assert found[f"{path}.{leaf}"].dtype == wanted.dtype
                assert found[f"{path}.{leaf}"].shape == wanted.shape
                assert torch.equal(raw(found[f"{path}.{leaf}"]), raw(wanted)), (path, leaf)


def test_codes_in_pairs_of_rows():
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (6, 10), dtype=torch.uint8)
    packed = codes[:, 0::2] << 4 | codes[:, 1::2]
    signed = codes.to(torch.int8) - 8
    expected = (signed[0::2] & 0x0F) | (signed[1::2] << 4)
    assert torch.equal(by_row_pairs(packed), expected.view(torch.uint8))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (wp.NVIDIAModelOptConfig("NF4"), "is packed as NF4"),
        (wp.NVIDIAModelOptConfig("FP8"), '"conv" is a convolution'),
        (wp.NVIDIAModelOptConfig("FP8", block_quantize=64, disable_conv_quantization=True), "in blocks of {-1: 64}"),
        (wp.NVIDIAModelOptConfig("FP8_INT8", disable_conv_quantization=True), "FP8 weights and inputs of 8 bits"),
        (wp.NVIDIAModelOptConfig("INT4", block_quantize=26, disable_conv_quantization=True), "of 130 rows in 256"),
    ],
    ids=str,
)
def test_what_has_no_such_form_is_refused(tmp_path, config, told):
    model = wp.from_pretrained(Net, save(tmp_path / "net", make()), quantization_config=config)
    with pytest.raises(ConfigError) as raised:
        wp.save_pretrained(model, tmp_path / "saved", form="unified")
    assert told in str(raised.value)
    with pytest.raises(ConfigError, match="form='gguf'"):
        wp.save_pretrained(model, tmp_path / "saved", form="gguf")
    with pytest.raises(ConfigError, match="safetensors"):
        wp.save_pretrained(model, tmp_path / "saved", form="unified", safe_serialization=False)
    with pytest.raises(ConfigError, match="the model is not packed"):
        wp.save_pretrained(make(), tmp_path / "saved", form="unified")
    assert not (tmp_path / "saved").exists()


def test_several_kinds_in_one_model(tmp_path):
    preset = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    rows = {"num_bits": 8, "axis": 0}
    preset["quant_cfg"] = [
        *preset["quant_cfg"],
        {"quantizer_name": "*up*weight_quantizer", "cfg": rows},
        {"quantizer_name": "*up*input_quantizer", "enable": False},
        {"quantizer_name": "*conv*", "enable": False},
    ]
    config = wp.NVIDIAModelOptConfig("FP8", modelopt_config=preset)
    net = make()
    model = wp.from_pretrained(Net, save(tmp_path / "net", net), quantization_config=config)
    wp.save_pretrained(model, tmp_path / "saved", form="unified")
    _, beside, section = read(tmp_path / "saved")
    assert beside["quantization"]["quant_algo"] == section["quant_algo"] == "MIXED_PRECISION"
    assert beside["quantization"]["quantized_layers"]["up"] == {"quant_algo": "W8A16"}
    again = wp.from_pretrained(Net, tmp_path / "saved")
    assert {path: again.get_submodule(path).kind for path in quantizer_of(again).quantized} == {
        "wide": "fp8",
        "odd": "fp8",
        "up": "int8",
    }
    wp.save_pretrained(again, tmp_path / "twice")
    assert read(tmp_path / "twice")[1:] == (beside, section)


def test_layers_that_run_as_one_share_a_scale(folder, tmp_path):
    model = wp.from_pretrained(
        transformers.LlamaForCausalLM, folder, quantization_config=wp.NVIDIAModelOptConfig("NVFP4")
    )
    wp.save_pretrained(model, tmp_path / "saved", form="unified")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    for parent, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
        scales = {stored[f"model.layers.0.{parent}.{name}_proj.weight_scale_2"].item() for name in names}
        assert len(scales) == 1
    for name, value in stored.items():
        if name.endswith("weight_scale"):
            assert value.float().min() > 0


def test_an_offloaded_model_is_exported_alike(folder, tmp_path):
    accelerate = find_peer("accelerate")
    model = wp.from_pretrained(
        transformers.LlamaForCausalLM, folder, quantization_config=wp.NVIDIAModelOptConfig("NVFP4")
    )
    wp.save_pretrained(model, tmp_path / "whole", form="unified")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    wp.save_pretrained(model, tmp_path / "saved", form="unified")
    for name in ("model.safetensors", "config.json", "hf_quant_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


RESTORE = """
import contextlib, io, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
import modelopt.torch.opt as mto

folder, dtype = sys.argv[1:]
torch.load(f"{folder}/modelopt_state.pth", weights_only=True)
with contextlib.redirect_stdout(io.StringIO()):
    mto.enable_huggingface_checkpointing()
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
assert type(model.model.layers[0].mlp.up_proj).__name__ == "RealQuantQuantLinear"
with torch.no_grad():
    torch.save(model(torch.arange(24).reshape(2, 12)).logits, f"{folder}/out.pt")
"""


@pytest.mark.parametrize("kind", ["FP8", "INT8 rows", "INT4", "NVFP4 weights"])
def test_modelopt_restores_it_in_transformers(tmp_path, kind):
    original(torch.bfloat16).save_pretrained(tmp_path / "llama")
    model = wp.from_pretrained(
        transformers.LlamaForCausalLM, tmp_path / "llama", quantization_config=FORMS[kind][1](), torch_dtype="bfloat16"
    )
    wp.save_pretrained(model, tmp_path / "saved", form="modelopt")
    done = subprocess.run(
        [sys.executable, "-c", RESTORE, str(tmp_path / "saved"), "bfloat16"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "saved" / "out.pt", weights_only=True)
    with torch.no_grad():
        expected = model(TOKENS).logits
    assert (found - expected).norm() <= 0.005 * expected.norm()
    # And weightpack reads the folder as any other of its own.
    again = wp.from_pretrained(transformers.LlamaForCausalLM, tmp_path / "saved", torch_dtype="bfloat16")
    for name, value in model.state_dict().items():
        assert torch.equal(raw(again.state_dict()[name]), raw(value)), name


@pytest.mark.parametrize("kind", ["FP8", "INT8", "INT4", "NVFP4"])
def test_modelopt_restores_ones_own_module(tmp_path, kind):
    mto = find_peer("modelopt.torch.opt")
    config = wp.NVIDIAModelOptConfig(kind, disable_conv_quantization=True, modules_to_not_convert=["odd"])
    model = wp.from_pretrained(Net, save(tmp_path / "net", make()), quantization_config=config)
    wp.save_pretrained(model, tmp_path / "saved", form="modelopt")
    state = torch.load(tmp_path / "saved" / "modelopt_state.pth", weights_only=True)
    with contextlib.redirect_stdout(io.StringIO()):
        restored = mto.restore_from_modelopt_state(Net(), state)
    restored.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
    x = inputs()
    with torch.no_grad():
        for found, expected in zip(restored(x), model(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_modelopt_does_not_restore_is_refused(tmp_path):
    for number, (config, told) in enumerate(
        (
            (wp.NVIDIAModelOptConfig("FP8"), '"conv" is a convolution'),
            (wp.NVIDIAModelOptConfig("NF4", disable_conv_quantization=True), "several blocks of scales"),
        )
    ):
        model = wp.from_pretrained(Net, save(tmp_path / f"{number}", make()), quantization_config=config)
        with pytest.raises(ConfigError) as raised:
            wp.save_pretrained(model, tmp_path / "saved", form="modelopt")
        assert told in str(raised.value)
    assert not (tmp_path / "saved").exists()
