"""Small language models in the files that transformers writes, the same on every machine.

Weights come from numpy's legacy generator, whose numbers never change; tokenizers lie beside the
golden data in `tests/vectors/language`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..conftest import bf16, write_safetensors

VECTORS = Path(__file__).parent.parent / "vectors" / "language"
TOKENS = 512
HIDDEN, FEED_FORWARD, HEADS, KEY_HEADS, LAYERS = 256, 512, 8, 4, 2

_SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "max_position_embeddings": 512,
    "vocab_size": TOKENS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SILU = {**_SIZES, "hidden_act": "silu", "rms_norm_eps": 1e-5}
_GEMMA = {
    **_SIZES,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "head_dim": 32,
}

CONFIGS: dict[str, dict[str, Any]] = {
    # The three ways in which a config speaks of the rotation.
    "llama2": {
        **_SILU,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "tokenizer": "pieces",
    },
    "llama3": {
        **_SILU,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 128,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": True,
        "head_dim": 64,
        "eos_token_id": [2, 3],
        "tokenizer": "llama-bpe",
    },
    "mistral": {
        **_SILU,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "tokenizer": "pieces",
    },
    "qwen2": {
        **_SILU,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "yarn", "factor": 4.0,
                            "original_max_position_embeddings": 256, "beta_fast": 32.0},
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "tokenizer": "qwen2",
    },
    "qwen3": {
        **_SILU,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "rope_theta": 1000000,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "head_dim": 64,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "tokenizer": "qwen2",
    },
    "gemma": {
        **_GEMMA,
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "rope_theta": 10000.0,
        "tokenizer": "pieces",
    },
    "gemma2": {
        **_GEMMA,
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 32,
        "sliding_window": 256,
        "tokenizer": "pieces",
    },
    "gemma3": {
        **_GEMMA,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "query_pre_attn_scalar": 32,
        "sliding_window": 256,
        "sliding_window_pattern": 6,
        "tokenizer": "pieces",
    },
}  # fmt: skip
"""A `config.json` of each kind, and under "tokenizer" the folder of its tokenizer."""


def shapes(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of the tensors that transformers' class has."""
    kind = config["model_type"]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim", hidden // heads)
    is_gemma = kind.startswith("gemma")
    found = {"model.embed_tokens.weight": [config["vocab_size"], hidden]}
    for layer in range(config["num_hidden_layers"]):
        block = {
            "input_layernorm.weight": [hidden],
            "self_attn.q_proj.weight": [heads * size, hidden],
            "self_attn.k_proj.weight": [key_heads * size, hidden],
            "self_attn.v_proj.weight": [key_heads * size, hidden],
            "self_attn.o_proj.weight": [hidden, heads * size],
            "post_attention_layernorm.weight": [hidden],
            "mlp.gate_proj.weight": [inner, hidden],
            "mlp.up_proj.weight": [inner, hidden],
            "mlp.down_proj.weight": [hidden, inner],
        }
        if kind == "qwen2":
            block |= {f"self_attn.{n}_proj.bias": [(heads if n == "q" else key_heads) * size] for n in "qkv"}
        if kind in ("qwen3", "gemma3_text"):
            block |= {f"self_attn.{n}_norm.weight": [size] for n in "qk"}
        if kind in ("gemma2", "gemma3_text"):
            block |= {f"{n}_feedforward_layernorm.weight": [hidden] for n in ("pre", "post")}
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    found["model.norm.weight"] = [hidden]
    if not config.get("tie_word_embeddings", is_gemma):
        found["lm_head.weight"] = [config["vocab_size"], hidden]
    return found


def make_model(folder: Path, name: str, *, with_tokenizer: bool = True, **changes: Any) -> Path:
    """Writes the model `name` of `CONFIGS` into `folder`, with `changes` to its config."""
    config = {**CONFIGS[name], **changes}
    tokens = VECTORS / config.pop("tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    random = np.random.RandomState(sum(name.encode()))
    tensors = {}
    for tensor, shape in shapes(config).items():
        values = random.standard_normal(shape) * 0.05
        if tensor.endswith("norm.weight") and not config["model_type"].startswith("gemma"):
            values += 1
        tensors[tensor] = ("BF16", shape, bf16(values.astype(np.float32)))
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    if with_tokenizer:
        for file in tokens.iterdir():
            shutil.copy(file, folder / file.name)
    return folder
