"""Small transformers models for the tests of saving, and what tells two of them apart."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors import safe_open

import weightpack as wp
from tests.quantizers.test_contract import BACKENDS

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
BERT = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 32}
VISION = {key: value for key, value in SMALL.items() if key not in ("vocab_size", "num_key_value_heads")}
T5 = {"d_model": 128, "d_ff": 256, "d_kv": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 128, "dropout_rate": 0.0}
GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
QWEN = {**SMALL, "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128}
LLAVA = {
    "text_config": {"model_type": "llama", **SMALL},
    "vision_config": {"model_type": "clip_vision_model", **VISION, "image_size": 32, "patch_size": 16},
}
MODELS = {
    "llama": ("LlamaForCausalLM", "llama", SMALL),
    "llama tied": ("LlamaForCausalLM", "llama", {**SMALL, "tie_word_embeddings": True}),
    "bert": ("BertForSequenceClassification", "bert", BERT),
    "t5": ("T5ForConditionalGeneration", "t5", T5),
    "gpt2": ("GPT2LMHeadModel", "gpt2", GPT2),
    "mixtral": ("MixtralForCausalLM", "mixtral", {**SMALL, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "qwen2_moe", QWEN),
    "gpt_neox": ("GPTNeoXForCausalLM", "gpt_neox", SMALL),
    "llava": ("LlavaForConditionalGeneration", "llava", LLAVA),
}
"""Class, model type and config. GPT-NeoX is renamed, Llava too; the experts of two are merged when loaded."""
PACKED = {
    "plain": (None, lambda: None),
    **{name: made for name, made in BACKENDS.items() if not name.startswith("gguf")},
    "fp4": ("bitsandbytes", partial(wp.BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_quant_type="fp4")),
}
"""All that can be saved: the package that it needs, and a config."""


def make(name, dtype=torch.bfloat16, seed=3):
    """A model with random weights."""
    class_name, model_type, options = MODELS[name]
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **options)
    return getattr(transformers, class_name)(config).to(dtype).eval()


def inputs(model):
    """Two rows of tokens."""
    tokens = torch.arange(1, 13).reshape(2, 6)
    return {"input_ids": tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})}


def outputs(model):
    """Its logits."""
    with torch.no_grad():
        return model(**inputs(model)).logits


def stored(folder):
    """All tensors of a folder by name, and the number of files."""
    found = {}
    files = sorted(Path(folder).glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as opened:
            found.update({key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    return found, len(files)


def same_bits(one, other):
    """Whether two sets of tensors have the same names, types, shapes and bytes."""
    return one.keys() == other.keys() and all(_same(tensor, other[name]) for name, tensor in one.items())


def _same(one, other):
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def load_elsewhere(folders):
    """What transformers alone makes of saved models, in a process that has no weightpack: for each name of
    `folders` (class and folder) its report. Its state goes to `host_state.pt` in the folder, and where the report
    is empty its outputs to `host.pt`."""
    program = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
assert not any(name.startswith("weightpack") for name in sys.modules)
transformers.logging.set_verbosity_error()
found = {}
for name, (class_name, folder) in json.load(sys.stdin).items():
    try:
        model, told = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
        found[name] = {key: sorted(map(str, value)) for key, value in told.items() if value}
        torch.save(model.state_dict(), folder + "/host_state.pt")
        if found[name]:
            continue
        tokens = torch.arange(1, 13).reshape(2, 6)
        more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            # bitsandbytes packs weights of 4 bits anew for evaluation on some processors, and rounds otherwise then.
            model.train(getattr(model, "is_loaded_in_4bit", False))
            torch.save(model(input_ids=tokens, **more).logits, folder + "/host.pt")
    except Exception as error:
        found[name] = {"error": type(error).__name__ + ": " + str(error)}
assert not any(name.startswith("weightpack") for name in sys.modules)
print("\\n" + json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps({name: (class_name, str(folder)) for name, (class_name, folder) in folders.items()}),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
