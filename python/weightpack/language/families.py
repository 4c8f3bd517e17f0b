"""The kinds of language models that can be written for llama.cpp. One kind is one row of `FAMILIES`.

Source: the classes of llama.cpp's `conversion` folder and `gguf.constants` (gguf 0.19).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SILU = frozenset({"silu", "swish"})
GELU_TANH = frozenset({"gelu", "gelu_pytorch_tanh"})
"""Gemma's first configs say "gelu" and mean the approximation by tanh, as does llama.cpp."""

_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_SANDWICH = {
    **_BLOCK,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class Family:
    """One kind of language model.

    `name` is what a person asks for, `architecture` what the file says (`general.architecture`),
    `classes` and `model_types` what a `config.json` says. `block` gives the name of each module of
    a block. `biases` are modules that may have a bias, `activations` what
    `hidden_act` may be.

    `is_permuted`: the rows of query and key heads are reordered, because the reader rotates
    neighbouring values where transformers rotates the two halves. `norm_offset` is added to the
    weights of norms, which the model class adds when it runs. `is_tied`: the output layer is the
    embedding, and one of its own is left out. `head_size` is the default of `head_dim` where that
    is not the hidden size divided by the heads (0 where it is), `writes_head_size` whether it is
    told where the config does not mention it.
    """

    name: str
    architecture: str
    classes: tuple[str, ...]
    model_types: tuple[str, ...]
    block: Mapping[str, str]
    biases: frozenset[str] = frozenset()
    activations: frozenset[str] = SILU
    is_permuted: bool = False
    norm_offset: float = 0.0
    is_tied: bool = False
    head_size: int = 0
    writes_head_size: bool = False

    @property
    def top(self) -> Mapping[str, str]:
        """The name of each module that belongs to no block."""
        return _TOP


_PROJECTIONS = frozenset(name for name in _BLOCK if name.endswith("_proj"))
_QUERY_KEY_VALUE = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        "llama",
        ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"),
        ("llama",),
        _BLOCK,
        biases=_PROJECTIONS,
        is_permuted=True,
        writes_head_size=True,
    ),
    # For llama.cpp a Mistral is a llama.
    Family(
        "mistral",
        "llama",
        ("MistralForCausalLM", "MistralModel"),
        ("mistral",),
        _BLOCK,
        is_permuted=True,
        writes_head_size=True,
    ),
    Family(
        "qwen2",
        "qwen2",
        ("Qwen2ForCausalLM", "Qwen2Model"),
        ("qwen2",),
        _BLOCK,
        biases=_QUERY_KEY_VALUE,
    ),
    Family(
        "qwen3",
        "qwen3",
        ("Qwen3ForCausalLM", "Qwen3Model"),
        ("qwen3",),
        {**_BLOCK, **_HEAD_NORMS},
        head_size=128,
        writes_head_size=True,
    ),
    Family(
        "gemma",
        "gemma",
        ("GemmaForCausalLM", "GemmaModel"),
        ("gemma",),
        _BLOCK,
        activations=GELU_TANH,
        norm_offset=1.0,
        is_tied=True,
        head_size=256,
        writes_head_size=True,
    ),
    Family(
        "gemma2",
        "gemma2",
        ("Gemma2ForCausalLM", "Gemma2Model"),
        ("gemma2",),
        _SANDWICH,
        activations=GELU_TANH,
        norm_offset=1.0,
        is_tied=True,
        head_size=256,
        writes_head_size=True,
    ),
    Family(
        "gemma3",
        "gemma3",
        ("Gemma3ForCausalLM", "Gemma3TextModel"),
        ("gemma3_text",),
        {**_SANDWICH, **_HEAD_NORMS},
        activations=GELU_TANH,
        norm_offset=1.0,
        is_tied=True,
        head_size=256,
        writes_head_size=True,
    ),
)


def find_family(name: str) -> Family | None:
    """The family that a person calls `name`."""
    return next((family for family in FAMILIES if family.name == name), None)


def detect_family(config: Mapping[str, Any]) -> Family | None:
    """The family that a `config.json` belongs to: by its class, and by `model_type` where it names
    none."""
    classes = config.get("architectures")
    if isinstance(classes, list) and classes:
        return next((family for family in FAMILIES if classes[0] in family.classes), None)
    kind = config.get("model_type")
    return next((family for family in FAMILIES if kind in family.model_types), None)
