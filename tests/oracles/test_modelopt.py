"""ModelOpt's own export of a layer on the CPU, byte for byte."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import warnings

import pytest

import weightpack as wp
from tests.conftest import find_peer
from weightpack.errors import FormatError

torch = pytest.importorskip("torch")

PRESETS = {
    "modelopt:fp8": "FP8_DEFAULT_CFG",
    "modelopt:fp8_row": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "modelopt:fp8_block": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "modelopt:int8": "INT8_WEIGHT_ONLY_CFG",
    "modelopt:int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "modelopt:nvfp4": "W4A16_NVFP4_CFG",
    "modelopt:mxfp4": "MXFP4_DEFAULT_CFG",
}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(130, 384), (6, 160), (4, 100), (200, 144), (129, 256)]


@pytest.fixture(scope="module")
def export():
    """The arrays that ModelOpt exports for one layer with a weight, by component; what it says where it
    cannot."""
    find_peer("modelopt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export.unified_export_hf import _export_quantized_weight

    def exported(name, weight):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
        layer.weight.data = weight.clone()
        model = torch.nn.Sequential(layer)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                mtq.quantize(model, copy.deepcopy(getattr(mtq, PRESETS[name])), forward_loop=lambda model: None)
                _export_quantized_weight(layer, weight.dtype)
            except (AssertionError, RuntimeError, NotImplementedError) as error:
                return str(error)
        state = {key: value for key, value in layer.state_dict().items() if "quantizer" not in key}
        return {"" if key == "weight" else key: value for key, value in state.items()}

    return exported


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def check(export, name, weight):
    expected, found = export(name, weight), wp.quantize(weight, name)
    assert isinstance(expected, dict), expected
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].shape == value.shape, key
        assert found[key].dtype == value.dtype, key
        same = raw(found[key]) == raw(value)
        assert same.all(), f"{key}: {(~same).sum()} bytes differ, first at {int((~same).nonzero()[0])}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_random_weights(export, name, dtype):
    torch.manual_seed(0)
    refused = 0
    for shape in SHAPES:
        for scale in (1.0, 1e-6):
            weight = (torch.randn(shape) * scale).to(dtype)
            try:
                wp.quantize(weight, name)
            except FormatError:
                # What ModelOpt refuses for its shape is refused here, and nothing else.
                assert isinstance(export(name, weight), str), shape
                refused += 1
            else:
                check(export, name, weight)
    assert refused < len(SHAPES) * 2


def adversarial(dtype):
    """Weights [128, 256] by name: ties, subnormals, huge ones, rows of zeros."""
    torch.manual_seed(1)
    info = torch.finfo(dtype)
    grid = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 448.0, 2.0**-9, 2.0**-10])
    ties = grid[torch.randint(0, len(grid), (128, 256))] * torch.where(torch.rand(128, 256) < 0.5, -1, 1)
    halves = torch.randint(-127, 128, (128, 256)) + 0.5
    halves[:, 0] = 127
    zeros = torch.randn(128, 256)
    zeros[3] = 0
    zeros[5:9, 64:128] = -0.0
    powers = torch.exp2(torch.randint(-12, 12, (128, 256)).float()) * 6
    yield "ties", ties.to(dtype)
    yield "halves", halves.to(dtype)
    yield "rows of zeros", zeros.to(dtype)
    yield "powers", powers.to(dtype)
    yield "just above powers", (powers * (1 + 2e-7)).to(dtype)
    yield "huge", (torch.randn(128, 256) * (info.max / 8)).to(dtype)
    yield "small", (torch.randn(128, 256) * info.tiny * 64).to(dtype)
    yield "spread", (torch.randn(128, 256) * torch.exp2(torch.randint(-20, 4, (128, 1)).float())).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_adversarial_weights(export, name, dtype):
    for what, weight in adversarial(dtype):
        assert torch.isfinite(weight).all(), what
        try:
            check(export, name, weight)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from error


@pytest.mark.parametrize("name", PRESETS)
def test_zeros_stay_zeros(name):
    for weight in (torch.zeros(128, 256), -torch.zeros(128, 256, dtype=torch.bfloat16), torch.full((128, 256), 1e-45)):
        parts = wp.quantize(weight, name)
        for key, value in parts.items():
            assert not torch.isnan(value.float()).any(), key
        decoded = wp.dequantize(parts, name)
        assert decoded.abs().max() <= 1e-44
    with pytest.raises(FormatError, match="inf"):
        wp.quantize(torch.full((128, 256), torch.inf), name)


def by_modelopt(name, parts, shape):
    """As ModelOpt's own tensor classes decode."""
    from modelopt.torch.quantization import qtensor

    shape, codes, scale = torch.Size(shape), parts[""], parts["weight_scale"]
    if name == "modelopt:nvfp4":
        scales = {"scale": scale, "double_scale": parts["weight_scale_2"]}
        return qtensor.NVFP4QTensor(shape, torch.float32, codes).dequantize(**scales, block_sizes={-1: 16})
    if name == "modelopt:mxfp4":
        return qtensor.MXFP4QTensor(shape, torch.float32, codes).dequantize(scale=scale, block_sizes={-1: 32})
    kind = qtensor.INT8QTensor if name == "modelopt:int8" else qtensor.FP8QTensor
    if scale.dim() == 4:
        scale, blocks = scale.reshape(scale.shape[0], scale.shape[2]), {0: 128, 1: 128}
        return kind(shape, torch.float32, codes).dequantize(scale=scale, block_sizes=blocks)
    return kind(shape, torch.float32, codes).dequantize(scale=scale.reshape(-1, 1))


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "modelopt:int4"])
def test_decoding(export, name):
    torch.manual_seed(2)
    for shape in ((256, 256), (130, 384)):
        weight = torch.randn(shape)
        parts = export(name, weight)
        found = wp.dequantize(parts, name)
        assert torch.equal(raw(found), raw(by_modelopt(name, parts, shape)))
        assert torch.equal(raw(wp.dequantize(parts, name, dtype=torch.bfloat16)), raw(found.bfloat16()))


def test_int4_is_decoded_as_it_is_loaded(export):
    from weightpack.quantizers.modelopt_decode import int4_rows

    torch.manual_seed(2)
    parts = export("modelopt:int4", torch.randn(130, 384))
    found = wp.dequantize(parts, "modelopt:int4")
    assert torch.equal(raw(found), raw(int4_rows(parts[""], parts["weight_scale"], torch.float32)))


@pytest.mark.parametrize("name", PRESETS)
def test_threads_change_nothing(name):
    torch.manual_seed(3)
    weight = torch.randn(1024, 2048).bfloat16()
    one, many = wp.quantize(weight, name, threads=1), wp.quantize(weight, name, threads=5)
    for key, value in one.items():
        assert torch.equal(raw(value), raw(many[key])), key


def test_mxfp4_goes_to_gguf_and_back_without_loss(tmp_path):
    torch.manual_seed(4)
    save = find_peer("safetensors.torch").save_file
    first = wp.dequantize(wp.quantize(torch.randn(64, 256).bfloat16(), "modelopt:mxfp4"), "modelopt:mxfp4")
    save({"layers.0.up_proj.weight": first}, tmp_path / "model.safetensors")
    wp.convert(tmp_path / "model.safetensors", tmp_path / "a.safetensors", "modelopt:mxfp4", layers="names")
    wp.convert(tmp_path / "a.safetensors", tmp_path / "b.gguf", "gguf:mxfp4")
    wp.convert(tmp_path / "b.gguf", tmp_path / "c.safetensors", "modelopt:mxfp4", layers="names")
    assert (tmp_path / "a.safetensors").read_bytes() != (tmp_path / "model.safetensors").read_bytes()
    for name in ("a.safetensors", "b.gguf", "c.safetensors"):
        with wp.open_checkpoint(tmp_path / name) as checkpoint:
            assert checkpoint["layers.0.up_proj.weight"].format.endswith("mxfp4")
            found = torch.from_numpy(checkpoint.read("layers.0.up_proj.weight", "float32"))
        assert torch.equal(found, first), name


LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}
ERRORS = {
    "modelopt:fp8": 0.0265,
    "modelopt:fp8_row": 0.0265,
    "modelopt:fp8_block": 0.0265,
    "modelopt:int8": 0.0072,
    "modelopt:int4": 0.1176,
    "modelopt:nvfp4": 0.0951,
    "modelopt:mxfp4": 0.1156,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a small Llama, and the model."""
    transformers = find_peer("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"])
    model = transformers.LlamaForCausalLM(config).bfloat16().eval()
    folder = tmp_path_factory.mktemp("llama")
    # Saving leaves names of types in a config, which ModelOpt does not take.
    copy.deepcopy(model).save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def converted(llama, tmp_path_factory):
    """The folder converted to a format, once."""
    done = {}

    def convert(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp("converted") / "out"
            # Asking the host takes seconds, and is the same for all.
            wp.convert(llama[0], done[name], name, layers="auto" if name in MODELS else "names")
        return done[name]

    return convert


def stored(folder, stem="model"):
    """The arrays of a folder by name."""
    return find_peer("safetensors.torch").load_file(folder / f"{stem}.safetensors")


def quantize_and_export(model, name, folder, run=lambda model: model(TOKENS)):
    """ModelOpt's own way from a model to a folder; `run` runs it once."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import modelopt.torch.export as mte
        import modelopt.torch.quantization as mtq

        mtq.quantize(model, copy.deepcopy(getattr(mtq, PRESETS[name])), forward_loop=run)
        mte.export_hf_checkpoint(model, export_dir=folder)


@pytest.fixture(scope="module")
def exports(llama, tmp_path_factory):
    """The folder that ModelOpt exports for a format."""
    find_peer("modelopt")
    done = {}

    def export(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp("exported")
            quantize_and_export(copy.deepcopy(llama[1]), name, done[name])
        return done[name]

    return export


TOKENS = torch.arange(24).reshape(2, 12)
MODELS = ("modelopt:fp8", "modelopt:int4", "modelopt:nvfp4")
"""Formats that whole models are run in; the others differ in their layers alone."""


def check_folder(ours, theirs):
    """Every array byte for byte, and what the two files say; but for ranges of activations, which take a
    calibration."""
    found, expected = stored(ours), stored(theirs)
    expected = {key: value for key, value in expected.items() if not key.endswith(".input_scale")}
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(raw(found[key]), raw(value)), key
    sections = [json.loads((place / "config.json").read_text())["quantization_config"] for place in (ours, theirs)]
    assert sections[0] == sections[1]
    files = [json.loads((place / "hf_quant_config.json").read_text()) for place in (ours, theirs)]
    assert files[0] == files[1]
    return found


@pytest.mark.parametrize("name", PRESETS)
def test_a_converted_model_is_that_of_modelopt(converted, exports, name):
    found = check_folder(converted(name), exports(name))
    if name == "modelopt:nvfp4":
        second = {key: float(value) for key, value in found.items() if key.endswith(".weight_scale_2")}
        assert len(second) == 14
        assert len(set(second.values())) < 9


OTHERS = {
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1},
    "DeepseekV3ForCausalLM": {
        "moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32, "v_head_dim": 64, "num_key_value_heads": 4,
    },
    "BertForSequenceClassification": {"num_hidden_layers": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_share_scales_and_list_layers_as_in_modelopt(tmp_path, kind):
    """Experts, whose gate and up share a scale; attention by way of small ranks; query, key and value."""
    transformers = find_peer("transformers")
    torch.manual_seed(3)
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**{**LLAMA, **OTHERS[kind]}, architectures=[kind])).bfloat16().eval()
    copy.deepcopy(model).save_pretrained(tmp_path / "model")
    quantize_and_export(model, "modelopt:nvfp4", tmp_path / "theirs")
    more = [r"\.experts\.=modelopt:nvfp4"] if "Bert" not in kind else ["^classifier.weight=modelopt:nvfp4"]
    wp.convert(tmp_path / "model", tmp_path / "ours", "modelopt:nvfp4", layers="names", assign=more)
    check_folder(tmp_path / "ours", tmp_path / "theirs")


def test_skip_lists_are_shortened_as_by_modelopt():
    import random

    from weightpack.packings.modelopt import shortened

    summarize = find_peer("modelopt.torch.export.quant_utils")._prefix_wildcard_summarize_exclude_modules
    chance = random.Random(0)
    for _ in range(300):
        words = ["a", "ab", "b", "a1", "a10", "head"]
        paths = {".".join(chance.choices(words, k=chance.randint(1, 4))) for _ in range(12)}
        packed = set(chance.sample(sorted(paths), chance.randint(1, len(paths) - 1)))
        kept = sorted(paths - packed)
        assert shortened(kept, packed) == sorted(summarize(kept, packed))


def test_the_layers_left_alone_are_those_of_modelopts_presets():
    from weightpack.packings.modelopt import _LEFT
    from weightpack.quantizers.modelopt_entries import default_entries

    find_peer("modelopt")
    assert set(_LEFT) == {entry["quantizer_name"] for entry in default_entries() if not entry.get("parent_class")}


@pytest.mark.parametrize("kind", ["flux", "unet"])
def test_models_of_diffusers_are_those_of_modelopt(tmp_path, kind):
    """Where the two have attention of their own and to another sequence, and gates that are not joined."""
    from tests.integrations import test_modelopt_models as models

    torch.manual_seed(0)
    model, run = getattr(models, kind)()
    model = model.bfloat16().eval()
    model.save_pretrained(tmp_path / "model")
    quantize_and_export(model, "modelopt:nvfp4", tmp_path / "theirs", run)
    wp.convert(tmp_path / "model", tmp_path / "ours", "modelopt:nvfp4")
    found, expected = (stored(place, "diffusion_pytorch_model") for place in (tmp_path / "ours", tmp_path / "theirs"))
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(raw(found[key]), raw(value)), key
    ours, theirs = (
        json.loads((place / "config.json").read_text())["quantization_config"]
        for place in (tmp_path / "ours", tmp_path / "theirs")
    )
    # Convolutions are not packed either, though ModelOpt counts them as such.
    assert set(theirs.pop("ignore")) <= set(ours.pop("ignore"))
    assert ours == theirs


def test_only_some_layers_of_a_product_are_packed(llama, converted, tmp_path):
    """What stays as it is has no part in the scale, and a layer alone has its own."""
    keep = [r"layers\.0.*k_proj", r"layers\.1.*(q|k)_proj"]
    wp.convert(llama[0], tmp_path / "out", "modelopt:nvfp4", keep=keep, layers="names")
    second = {key: value for key, value in stored(tmp_path / "out").items() if key.endswith(".weight_scale_2")}
    state = llama[1].state_dict()

    def largest(*names):
        return torch.stack([state[f"model.layers.{name}_proj.weight"].float().abs().max() for name in names]).max()

    for name, among in {"0.self_attn.q": ("q", "v"), "0.self_attn.v": ("q", "v"), "1.self_attn.v": ("v",)}.items():
        wanted = largest(*(f"{name[:-1]}{leaf}" for leaf in among)) / 2688
        assert torch.equal(second[f"model.layers.{name}_proj.weight_scale_2"], wanted)


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_loads_and_runs(llama, converted, name):
    model, info = wp.from_pretrained(type(llama[1]), converted(name), output_loading_info=True)
    assert not info.missing
    assert not info.unexpected
    before, after = llama[1].model.layers[0].mlp.up_proj.weight.float(), model.model.layers[0].mlp.up_proj
    error = (after.decoded(torch.float32) - before).norm() / before.norm()
    assert float(error) == pytest.approx(ERRORS[name], rel=0.1)
    with torch.no_grad():
        found, expected = model(TOKENS).logits, llama[1](TOKENS).logits
    assert (found - expected).norm() < 4 * ERRORS[name] * expected.norm()


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "modelopt:int4"])
def test_what_was_converted_runs_in_modelopts_own_layers(llama, converted, name):
    """ModelOpt 0.47 reads its own layers back, and no unified export, of which engines are the readers: the
    arrays are put into the model that it compressed, whose own weights were zeros. INT4 codes lie in another
    order there."""
    mtq = find_peer("modelopt.torch.quantization")
    model = copy.deepcopy(llama[1])
    config = copy.deepcopy(getattr(mtq, PRESETS[name]))
    config["quant_cfg"].append({"quantizer_name": "*input_quantizer", "enable": False})
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        for path, layer in model.named_modules():
            if "_proj" in path:
                layer.weight.zero_()
        mtq.quantize(model, config, forward_loop=None)
        mtq.compress(model)
        state = model.state_dict()
        arrays = {}
        for key, value in stored(converted(name)).items():
            module, _, leaf = key.rpartition(".")
            if leaf.startswith("weight_scale"):
                buffer = {"weight_scale": "_scale", "weight_scale_2": "_double_scale"}[leaf]
                module = f"{module}.weight_quantizer"
                # In the type of the weights there, in float32 here.
                model.get_submodule(module)._buffers[buffer] = state[f"{module}.{buffer}"].to(value.dtype)
                key, value = f"{module}.{buffer}", value.reshape(state[f"{module}.{buffer}"].shape)
            arrays[key] = value
        outcome = model.load_state_dict(arrays, strict=False)
        assert not outcome.unexpected_keys
        assert {key.rpartition(".")[2] for key in outcome.missing_keys} <= {"_amax"}
        found, expected = model(TOKENS).logits, llama[1](TOKENS).logits
        ours = wp.from_pretrained(type(llama[1]), converted(name))(TOKENS).logits
    assert (found - expected).norm() < 4 * ERRORS[name] * expected.norm()
    # Scales that were rounded once more, in products of 16-bit numbers.
    assert (found - ours).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("name", MODELS)
def test_exports_are_decoded(exports, tmp_path, name):
    folder = exports(name)
    wp.convert(folder, tmp_path / "out", "f32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    found, packed = stored(tmp_path / "out"), stored(folder)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert not any("scale" in key for key in found)
    key = "model.layers.0.mlp.down_proj.weight"
    parts = {k.removeprefix(key[:-6]): v for k, v in packed.items() if k.startswith(key)}
    parts[""] = parts.pop("weight")
    assert torch.equal(found[key], wp.dequantize(parts, name))


def test_the_file_beside_is_enough(exports, tmp_path):
    import shutil

    folder = shutil.copytree(exports("modelopt:fp8"), tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with wp.open_checkpoint(folder) as checkpoint:
        assert checkpoint["model.layers.0.mlp.up_proj.weight"].format == "modelopt:fp8"
    wp.convert(folder, tmp_path / "out", "bf16")
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def test_factors_of_columns_are_part_of_the_weight(tmp_path):
    torch.manual_seed(5)
    weight, factors = torch.randn(130, 256), torch.rand(256).bfloat16() + 0.5
    parts = wp.quantize(weight, "modelopt:int4")
    state = {"up_proj.weight": parts[""], "up_proj.weight_scale": parts["weight_scale"]}
    state |= {"up_proj.pre_quant_scale": factors, "up_proj.input_scale": torch.ones(())}
    find_peer("safetensors.torch").save_file(state, tmp_path / "model.safetensors")
    wp.convert(tmp_path / "model.safetensors", tmp_path / "out.safetensors", "f32")
    with wp.open_checkpoint(tmp_path / "out.safetensors") as checkpoint:
        assert list(checkpoint) == ["up_proj.weight"]
        found = torch.from_numpy(checkpoint.read("up_proj.weight"))
    assert torch.equal(found, wp.dequantize(parts, "modelopt:int4") * factors.float())
