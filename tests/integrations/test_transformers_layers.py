"""What the transformers adapter says of a model, against what transformers itself does with it."""

from __future__ import annotations

import json

import pytest

from weightpack.entry import Entry, Part
from weightpack.errors import BackendError
from weightpack.layers import find_layers

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}

CONFIGS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SMALL},
    "llama tied": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SMALL, "tie_word_embeddings": True},
    "bare llama": {"architectures": ["LlamaModel"], "model_type": "llama", **SMALL},
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4,
             "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2},
    "t5": {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 64, "d_ff": 128, "d_kv": 16,
           "num_layers": 2, "num_heads": 4, "vocab_size": 128},
    "bert": {"architectures": ["BertModel"], "model_type": "bert", **SMALL},
    "classifier": {"architectures": ["BertForSequenceClassification"], "model_type": "bert", **SMALL},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **SMALL, "num_local_experts": 4},
    "no architecture": {"model_type": "bert", **SMALL},
}  # fmt: skip


def build(transformers, torch, config):
    model_config = transformers.AutoConfig.for_model(**config)
    name = config.get("architectures", [None])[0]
    with torch.device("meta"):
        return getattr(transformers, name)(model_config) if name else transformers.AutoModel.from_config(model_config)


def entries_of(state):
    return [
        Entry(name, tuple(t.shape), "BF16", "bf16", 2 * t.numel(), t.numel(), (Part(name, "BF16", tuple(t.shape), 0),))
        for name, t in state.items()
    ]


@pytest.fixture(scope="module")
def answers(peer):
    torch, transformers = peer("torch"), peer("transformers")
    models = {name: build(transformers, torch, config) for name, config in CONFIGS.items()}
    asked = [(CONFIGS[name], entries_of(model.state_dict())) for name, model in models.items()]
    return dict(zip(CONFIGS, zip(models.values(), find_layers(asked, "host"), strict=True), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_linear_is_what_transformers_replaces(peer, answers, name):
    """The layers told to be packable are those that `from_pretrained` replaces without a skip list."""
    bnb, transformers, torch = peer("bitsandbytes"), peer("transformers"), peer("torch")
    quantizer_base = peer("transformers.quantizers.base").HfQuantizer
    replace = peer("transformers.integrations.bitsandbytes").replace_with_bnb_linear
    _, layers = answers[name]
    assert layers.exact
    assert layers.source.startswith(f"transformers {transformers.__version__}, ")

    fresh = build(transformers, torch, CONFIGS[name])
    skipped = quantizer_base.get_modules_to_not_convert(fresh, None, fresh._keep_in_fp32_modules)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    replace(fresh, skipped, config, pre_quantized=True)
    replaced = {path for path, module in fresh.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    told = {layer.module for layer in layers.tensors.values() if layer.kind in ("linear", "conv1d")}
    assert told == replaced
    assert replaced <= layers.linears


def test_an_output_layer_is_kept(answers):
    _, layers = answers["llama"]
    assert layers.tensors["lm_head.weight"].why == "output layer"
    assert layers.prefix == "model"


def test_a_tied_output_layer_is_told_as_tied(answers):
    _, layers = answers["llama tied"]
    assert layers.tensors["lm_head.weight"].why == "tied to the embedding"
    assert "lm_head" in layers.linears


def test_conv1d_is_told_apart(answers):
    _, layers = answers["gpt2"]
    assert layers.tensors["transformer.h.0.attn.c_attn.weight"].kind == "conv1d"


def test_what_stays_in_float32_is_told(answers):
    _, layers = answers["t5"]
    assert layers.fixed == ("wo",)
    layer = layers.tensors["encoder.block.0.layer.1.DenseReluDense.wo.weight"]
    assert (layer.kind, layer.why) == ("skipped", "layer that transformers keeps in float32")


def test_experts_that_are_merged_when_loading_are_told(peer):
    peer("torch")
    names = [f"model.layers.0.block_sparse_moe.experts.{i}.w{j}.weight" for i in range(4) for j in (1, 2, 3)]
    names += [
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "nonsense.weight",
    ]
    entries = [Entry(name, (64, 64), "BF16", "bf16", 8192, 4096) for name in names]
    (layers,) = find_layers([(CONFIGS["mixtral"], entries)], "host")
    kinds = {name: layers.tensors[name].kind for name in names}
    assert {kinds[name] for name in names if "experts" in name} == {"merged"}
    assert kinds["model.layers.0.block_sparse_moe.gate.weight"] == "other"
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == "linear"
    assert kinds["nonsense.weight"] == "unknown"


def test_the_names_of_a_bare_model_are_found_in_a_task_model(peer):
    peer("torch")
    entries = [Entry("layers.0.self_attn.q_proj.weight", (64, 64), "BF16", "bf16", 8192, 4096)]
    (layers,) = find_layers([(CONFIGS["llama"], entries)], "host")
    assert layers.tensors["layers.0.self_attn.q_proj.weight"].module == "model.layers.0.self_attn.q_proj"


def test_a_class_that_does_not_exist_is_refused_and_names_decide(peer):
    peer("transformers")
    config = {"architectures": ["NoSuchModel"], "model_type": "no_such_type"}
    entries = [Entry("a.weight", (64, 64), "BF16", "bf16", 8192, 4096)]
    with pytest.raises(BackendError, match="transformers has no class NoSuchModel"):
        find_layers([(config, entries)], "host")
    (layers,) = find_layers([(config, entries)], "auto")
    assert layers.source == "names"
    assert "layers are told by name" in layers.warnings[0]


def test_code_that_comes_with_a_checkpoint_is_not_run(peer, tmp_path):
    peer("transformers")
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('executed')")
    config = {
        "architectures": ["EvilModel"],
        "model_type": "evil",
        "auto_map": {"AutoModel": "modeling_evil.EvilModel"},
    }
    (layers,) = find_layers([(config, [])], "auto")
    assert layers.source == "names"
    assert "executed" not in layers.warnings[0]


def test_the_child_reads_nothing_of_the_current_folder(peer, tmp_path, monkeypatch):
    peer("transformers")
    (tmp_path / "torch.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    entries = [Entry("encoder.layer.0.output.dense.weight", (64, 64), "BF16", "bf16", 8192, 4096)]
    (layers,) = find_layers([(CONFIGS["bert"], entries)], "host")
    assert layers.tensors[entries[0].name].kind == "linear"


def test_a_description_is_json(peer):
    peer("transformers")
    from weightpack.integrations.transformers.describe import describe_layers

    described = describe_layers(CONFIGS["bert"], {"encoder.layer.0.output.dense.weight": [64, 128]})
    assert json.loads(json.dumps(described))["class"] == "BertModel"
