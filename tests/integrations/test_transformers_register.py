"""weightpack behind transformers' own `from_pretrained`: the same bytes with and without it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import weightpack as wp
from weightpack.errors import BackendError, ConfigError

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
MODELS = {
    "llama": ("LlamaForCausalLM", "llama", SMALL),
    "gpt2": ("GPT2LMHeadModel", "gpt2", GPT2),
    "t5": ("T5ForConditionalGeneration", "t5", T5),
    "mixtral": ("MixtralForCausalLM", "mixtral", {**SMALL, "num_local_experts": 4}),
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BITSANDBYTES = {
    "nf4": NF4,
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "bfloat16"},
    "double quant": {**NF4, "bnb_4bit_use_double_quant": True},
    "storage": {**NF4, "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture
def registered(peer) -> Iterator[None]:
    """Registered while the test runs, and never beyond it."""
    peer("transformers")
    wp.integrations.transformers.register()
    yield
    wp.integrations.transformers.unregister()


def save(peer, folder: Path, name: str, **options: object):
    """A random model, saved by transformers; gives its class."""
    torch, transformers = peer("torch"), peer("transformers")
    class_name, model_type, config = MODELS[name]
    torch.manual_seed(3)
    cls = getattr(transformers, class_name)
    cls(transformers.AutoConfig.for_model(model_type, **config)).bfloat16().save_pretrained(folder, **options)
    return cls


def host_config(peer, backend: str, options: dict):
    """transformers' own config object."""
    transformers = peer("transformers")
    if backend == "bitsandbytes":
        return transformers.BitsAndBytesConfig(**options)
    if backend == "quanto":
        return transformers.QuantoConfig(**options)
    kind = getattr(peer("torchao.quantization"), options["quant_type"])
    return transformers.TorchAoConfig(kind())


def arrays(peer, model) -> dict:
    """The stored arrays of a model by name, tensors of a class of their own taken apart."""
    torch = peer("torch")
    found = {}

    def take(name, value):
        if hasattr(value, "__tensor_flatten__") and type(value) is not torch.nn.Parameter:
            for part in value.__tensor_flatten__()[0]:
                take(f"{name}.{part}", getattr(value, part))
        else:
            found[name] = value.detach().contiguous()

    for name, value in model.state_dict().items():
        take(name, value)
    return found


def assert_same(peer, ours, theirs) -> None:
    """The same bytes, types and shapes. The offset of double quantization may differ by four steps of
    float32 (its mean is taken in another order), and what is made from it then, by what that makes. The
    scales of quanto's activations, which are 1 and not used, are float32 from transformers alone."""
    torch = peer("torch")
    mine, other = arrays(peer, ours), arrays(peer, theirs)
    assert set(mine) == set(other)
    shifted = set()
    for name in other:
        if ".quant_state." in name and not torch.equal(mine[name], other[name]):
            a, b = (json.loads(bytes(state[name].tolist())) for state in (mine, other))
            steps = [struct.unpack("<i", struct.pack("<f", one.pop("nested_offset")))[0] for one in (a, b)]
            assert a == b
            assert abs(steps[0] - steps[1]) <= 4
            shifted.add(name.partition(".quant_state.")[0])
    for name, value in other.items():
        if name.endswith((".input_scale", ".output_scale")):
            assert mine[name] == value == 1
            continue
        assert mine[name].dtype == value.dtype, name
        assert mine[name].shape == value.shape, name
        if name.rpartition(".")[0] not in shifted and name.partition(".quant_state.")[0] not in shifted:
            assert mine[name].reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8)), name


def output(peer, model):
    torch = peer("torch")
    ids = torch.arange(24).reshape(2, 12) % 128
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits.float()


CASES = [
    *((name, "bitsandbytes", options) for name in MODELS for options in BITSANDBYTES.values()),
    *((name, "quanto", {"weights": "int8"}) for name in ("llama", "t5")),
    *((name, "torchao", {"quant_type": "Int8WeightOnlyConfig"}) for name in ("llama", "gpt2")),
]


@pytest.mark.parametrize(("name", "backend", "options"), CASES)
def test_the_bytes_are_the_same_with_and_without(peer, tmp_path, name, backend, options):
    peer({"quanto": "optimum.quanto"}.get(backend, backend))
    cls = save(peer, tmp_path / "m", name)
    theirs = cls.from_pretrained(tmp_path / "m", quantization_config=host_config(peer, backend, options))
    wp.integrations.transformers.register()
    try:
        ours = cls.from_pretrained(tmp_path / "m", quantization_config=host_config(peer, backend, options))
    finally:
        wp.integrations.transformers.unregister()
    assert type(ours.hf_quantizer).__module__.startswith("weightpack.")
    assert_same(peer, ours, theirs)
    for path, module in theirs.named_modules():
        assert isinstance(ours.get_submodule(path), type(module)), path
    assert ours.config.quantization_config.to_dict() == theirs.config.quantization_config.to_dict()
    assert type(ours.config.quantization_config) is type(theirs.config.quantization_config)
    assert ours.quantization_method == theirs.quantization_method
    assert ours.config._is_quantized
    assert all(not value.is_meta for value in [*ours.parameters(), *ours.buffers()])
    expected = output(peer, theirs)
    assert (output(peer, ours) - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("options", BITSANDBYTES.values(), ids=BITSANDBYTES)
def test_configs_of_weightpack_are_taken_too(peer, tmp_path, registered, options):
    transformers = peer("transformers")
    peer("bitsandbytes")
    save(peer, tmp_path / "m", "llama")
    load = transformers.AutoModelForCausalLM.from_pretrained
    by_ours = load(tmp_path / "m", quantization_config=wp.BitsAndBytesConfig(**options))
    by_theirs = load(tmp_path / "m", quantization_config=transformers.BitsAndBytesConfig(**options))
    by_dictionary = load(tmp_path / "m", quantization_config={**options, "quant_method": "bitsandbytes"})
    assert type(by_ours.config.quantization_config) is transformers.BitsAndBytesConfig
    for model in (by_theirs, by_dictionary):
        assert_same(peer, by_ours, model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("options", BITSANDBYTES.values(), ids=BITSANDBYTES)
def test_what_is_saved_loads_with_and_without(peer, tmp_path, name, options):
    peer("bitsandbytes")
    cls = save(peer, tmp_path / "m", name)
    wp.integrations.transformers.register()
    try:
        ours = cls.from_pretrained(tmp_path / "m", quantization_config=host_config(peer, "bitsandbytes", options))
        ours.save_pretrained(tmp_path / "packed", max_shard_size="40KB")
        assert (tmp_path / "packed" / "model.safetensors.index.json").is_file()
        again = cls.from_pretrained(tmp_path / "packed")
        # transformers alone cannot save what it loaded packed (huggingface/transformers#43096).
        again.save_pretrained(tmp_path / "resaved")
    finally:
        wp.integrations.transformers.unregister()
    assert again.hf_quantizer.pre_quantized
    for model in (again, *(cls.from_pretrained(tmp_path / folder) for folder in ("packed", "resaved"))):
        assert_same(peer, model, ours)
    assert_same(peer, wp.from_pretrained(cls, tmp_path / "packed"), ours)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_model_that_has_run_is_saved_as_it_was_loaded(peer, tmp_path, registered, double_quant):
    """bitsandbytes' own layers turn their weights round when they run on some CPUs, and are saved so."""
    peer("bitsandbytes")
    cls = save(peer, tmp_path / "m", "llama")
    config = wp.BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=double_quant, bnb_4bit_compute_dtype="bfloat16")
    fresh, run = (cls.from_pretrained(tmp_path / "m", quantization_config=config) for _ in range(2))
    output(peer, run)
    assert_same(peer, run, fresh)
    run.save_pretrained(tmp_path / "packed")
    wp.integrations.transformers.unregister()
    assert_same(peer, cls.from_pretrained(tmp_path / "packed"), fresh)


@pytest.mark.cuda
@pytest.mark.parametrize("options", BITSANDBYTES.values(), ids=BITSANDBYTES)
def test_a_gpu_gets_the_bytes_that_are_packed_on_the_cpu(peer, tmp_path, registered, options):
    torch = peer("torch")
    peer("bitsandbytes")
    cls = save(peer, tmp_path / "m", "llama")
    config = wp.BitsAndBytesConfig(**options)
    there = cls.from_pretrained(tmp_path / "m", quantization_config=config, device_map={"": 0})
    here = cls.from_pretrained(tmp_path / "m", quantization_config=config, device_map="cpu")
    assert {value.device.type for value in there.parameters()} == {"cuda"}
    expected = output(peer, here)
    ids = torch.arange(24, device=0).reshape(2, 12) % 128
    with torch.no_grad():
        found = there(input_ids=ids).logits.float().cpu()
    assert (found - expected).norm() <= 0.05 * expected.norm()
    there.save_pretrained(tmp_path / "there")
    assert_same(peer, cls.from_pretrained(tmp_path / "there", device_map="cpu"), here)


def test_what_transformers_saved_loads_through_weightpack(peer, tmp_path):
    peer("bitsandbytes")
    cls = save(peer, tmp_path / "m", "llama")
    config = host_config(peer, "bitsandbytes", {**NF4, "llm_int8_skip_modules": ["lm_head", "o_proj"]})
    theirs = cls.from_pretrained(tmp_path / "m", quantization_config=config)
    theirs.save_pretrained(tmp_path / "packed")
    wp.integrations.transformers.register()
    try:
        assert_same(peer, cls.from_pretrained(tmp_path / "packed"), theirs)
    finally:
        wp.integrations.transformers.unregister()


OTHERS = {
    "quanto int8": ("quanto", "int8"),
    "quanto float8": ("quanto", "float8"),
    "torchao int8": ("torchao", "Int8WeightOnlyConfig"),
    "torchao float8": ("torchao", "Float8WeightOnlyConfig"),
    "modelopt FP8": ("modelopt", "FP8"),
    "modelopt NVFP4": ("modelopt", "NVFP4"),
}


@pytest.mark.parametrize(("backend", "kind"), OTHERS.values(), ids=OTHERS)
def test_weights_of_every_backend_are_saved_and_read(peer, tmp_path, backend, kind):
    """By transformers' own `save_pretrained`: also those of quanto, which it refuses to save by itself."""
    peer({"quanto": "optimum.quanto"}.get(backend, backend))
    cls = save(peer, tmp_path / "m", "llama")
    config = {"quanto": wp.QuantoConfig, "modelopt": wp.NVIDIAModelOptConfig}.get(backend, lambda name: name)(kind)
    if backend == "torchao":
        config = wp.TorchAoConfig(getattr(peer("torchao.quantization"), kind)())
    alone = wp.from_pretrained(cls, tmp_path / "m", quantization_config=config)
    wp.integrations.transformers.register()
    try:
        ours = cls.from_pretrained(tmp_path / "m", quantization_config=config)
        ours.save_pretrained(tmp_path / "packed", max_shard_size="40KB")
        again = cls.from_pretrained(tmp_path / "packed")
    finally:
        wp.integrations.transformers.unregister()
    alone.save_pretrained(tmp_path / "alone")
    assert again.hf_quantizer.pre_quantized
    for model in (again, ours, *(wp.from_pretrained(cls, tmp_path / folder) for folder in ("packed", "alone"))):
        assert_same(peer, model, alone)
    if backend == "torchao":
        assert_same(peer, cls.from_pretrained(tmp_path / "packed"), alone)


def test_a_config_that_transformers_cannot_say_is_kept(peer, tmp_path):
    transformers = peer("transformers")
    peer("optimum.quanto")
    cls = save(peer, tmp_path / "m", "llama")
    mixed = wp.QuantoConfig("int8", quantization_map={"model.layers.0.mlp.up_proj": "int4"})
    for config, kind in ((mixed, wp.QuantoConfig), (wp.QuantoConfig("int8"), transformers.QuantoConfig)):
        model = wp.from_pretrained(cls, tmp_path / "m", quantization_config=config)
        assert type(model.config.quantization_config) is kind
    assert wp.from_pretrained(cls, tmp_path / "m", quantization_config=mixed).config.quantization_config == mixed


def test_modelopt_is_known_to_transformers_then(peer, tmp_path, registered):
    torch = peer("torch")
    peer("modelopt")
    cls = save(peer, tmp_path / "m", "llama")
    config = wp.NVIDIAModelOptConfig("FP8", modules_to_not_convert=("lm_head",))
    ours = cls.from_pretrained(tmp_path / "m", quantization_config=config)
    alone = wp.from_pretrained(cls, tmp_path / "m", quantization_config=config)
    full = cls.from_pretrained(tmp_path / "m")
    assert ours.config.quantization_config == config
    assert ours.get_memory_footprint() < 0.8 * full.get_memory_footprint()
    expected = output(peer, full)
    assert (output(peer, ours) - expected).norm() <= 0.15 * expected.norm()
    assert torch.equal(output(peer, ours), output(peer, alone))


def test_a_type_that_is_asked_for_is_that_of_what_is_not_packed(peer, tmp_path, registered):
    torch = peer("torch")
    peer("bitsandbytes")
    cls = save(peer, tmp_path / "m", "llama")
    config = wp.BitsAndBytesConfig(**NF4)
    packed = cls.from_pretrained(tmp_path / "m", quantization_config=config, dtype=torch.float16)
    packed.save_pretrained(tmp_path / "packed")
    again = cls.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    for model, dtype in ((packed, torch.float16), (again, torch.bfloat16)):
        floats = {value.dtype for value in model.parameters() if value.is_floating_point()}
        assert floats == {dtype}


@pytest.mark.parametrize("options", [NF4, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_dequantize_gives_ordinary_layers(peer, tmp_path, registered, options):
    torch = peer("torch")
    peer("bitsandbytes")
    cls = save(peer, tmp_path / "m", "llama")
    model = cls.from_pretrained(tmp_path / "m", quantization_config=wp.BitsAndBytesConfig(**options))
    packed = output(peer, model)
    plain = model.dequantize()
    assert not plain.is_quantized
    assert not hasattr(plain.config, "quantization_config")
    assert {type(module) for path, module in plain.named_modules() if path.endswith("_proj")} == {torch.nn.Linear}
    assert (output(peer, plain) - packed).norm() <= 0.02 * packed.norm()
    plain.save_pretrained(tmp_path / "plain")
    assert_same(peer, cls.from_pretrained(tmp_path / "plain"), plain)


@pytest.mark.parametrize("options", [NF4, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_a_packed_layer_that_the_checkpoint_lacks_is_made_anew(peer, tmp_path, registered, options):
    """transformers alone leaves it without values that could run."""
    torch, transformers = peer("torch"), peer("transformers")
    peer("bitsandbytes")
    torch.manual_seed(3)
    transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)).bfloat16().save_pretrained(tmp_path)
    load = transformers.BertModel.from_pretrained
    model, told = load(tmp_path, quantization_config=wp.BitsAndBytesConfig(**options), output_loading_info=True)
    assert told["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}
    assert model.pooler.dense.weight.dtype in (torch.uint8, torch.int8)
    assert not model.pooler.dense.bias.any()
    weight = model.dequantize().pooler.dense.weight.float()
    assert 0.015 < weight.std() < 0.025


def test_weights_that_are_not_finite_are_refused_by_name(peer, tmp_path, registered):
    torch = peer("torch")
    peer("bitsandbytes")
    cls = save(peer, tmp_path / "m", "llama")
    model = cls.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.inf
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(RuntimeError):
        cls.from_pretrained(tmp_path / "m", quantization_config=wp.BitsAndBytesConfig(**NF4))


def test_gguf_configs_are_sent_to_weightpack(peer, tmp_path, registered):
    cls = save(peer, tmp_path / "m", "llama")
    with pytest.raises(ConfigError, match="transformers reads GGUF files in its own way"):
        cls.from_pretrained(tmp_path / "m", quantization_config=wp.GGUFQuantizationConfig())


def test_unregister_leaves_transformers_as_it_was(peer):
    auto = peer("transformers.quantizers.auto")
    here = wp.integrations.transformers

    def state():
        chooser = {key: value for key, value in vars(auto.AutoHfQuantizer).items() if not key.startswith("__")}
        return dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), chooser

    before = state()
    here.unregister()
    here.register()
    here.register()
    assert here.is_registered()
    changed = {name for name, value in state()[0].items() if before[0].get(name) is not value}
    assert changed == {"bitsandbytes_4bit", "bitsandbytes_8bit", "quanto", "torchao", "modelopt"}
    assert {type(value) for value in (auto.AUTO_QUANTIZER_MAPPING["gguf"], auto.AUTO_QUANTIZER_MAPPING["gptq"])}
    here.unregister()
    here.unregister()
    assert not here.is_registered()
    for now, then in zip(state(), before, strict=True):
        assert list(now) == list(then)
        assert all(now[key] is value for key, value in then.items())


def test_an_older_transformers_is_refused_before_anything_is_changed(peer, tmp_path, monkeypatch):
    auto = peer("transformers.quantizers.auto")
    from weightpack.integrations.transformers import host, registration

    cls = save(peer, tmp_path, "llama")
    before = dict(auto.AUTO_QUANTIZER_MAPPING)
    for module in (host, registration):
        monkeypatch.setattr(module, "_NEEDED", replace(module._NEEDED, minimum="99.1"))
    with pytest.raises(BackendError, match=r"is too old to register with it, expected 99\.1"):
        wp.integrations.transformers.register()
    assert before == auto.AUTO_QUANTIZER_MAPPING
    assert not wp.integrations.transformers.is_registered()
    with pytest.raises(BackendError, match=r"is too old to load its models, expected 99\.1"):
        wp.from_pretrained(cls, tmp_path)


def test_other_peoples_backends_are_known_after_another_call(peer, registered):
    auto = peer("transformers.quantizers.auto")
    from dataclasses import dataclass

    from weightpack.quantizers.auto import quantizer_class, unregister_quantizer

    @dataclass(frozen=True)
    class Config(wp.QuantizationConfig):
        quant_method = "seventh"

    wp.register_quantizer("seventh", type("Seventh", (quantizer_class("bitsandbytes_8bit"),), {}), Config)
    try:
        wp.integrations.transformers.register()
        assert auto.AutoQuantizationConfig.from_dict({"quant_method": "seventh"}) == Config()
        assert auto.AUTO_QUANTIZER_MAPPING["seventh"] is auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
        wp.integrations.transformers.unregister()
        assert "seventh" not in auto.AUTO_QUANTIZER_MAPPING
        assert "seventh" not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    finally:
        unregister_quantizer("seventh")
