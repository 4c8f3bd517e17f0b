"""What the loader asks about transformers' classes, and models loaded through it: the same as transformers' own."""

from __future__ import annotations

import pytest

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
