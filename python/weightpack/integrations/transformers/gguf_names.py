"""Names of GGUF files that are only read: text encoders of the T5 kind, as image and video models use them.

Rows stand in the order of transformers, so that a name is all that changes. Source: gguf 0.19,
`tensor_mapping.py`. Files of the families that weightpack writes are read by `weightpack.language`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...mapping import MappedTensor, Rows

_T5 = frozenset({"t5", "umt5", "mt5"})
_TOP = {
    "token_embd": "shared",
    "output": "lm_head",
    "enc.output_norm": "encoder.final_layer_norm",
    "dec.output_norm": "decoder.final_layer_norm",
}
_STACKS = {"enc": "encoder", "dec": "decoder"}
_ATTENTION = {"q": "q", "k": "k", "v": "v", "o": "o", "rel_b": "relative_attention_bias"}
_BLOCK = re.compile(r"(enc|dec)\.blk\.(\d+)\.(\w+)\.weight")


def gguf_names(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[MappedTensor] | None:
    """The tensors of `model`, a T5 of any kind, in a file whose tensors have these shapes; `None` for other
    models, and for a file with a tensor that is not known."""
    if getattr(getattr(model, "config", None), "model_type", None) not in _T5:
        return None
    gated = any(name.endswith(".ffn_gate.weight") for name in shapes)
    found = []
    for name in shapes:
        own = _t5_name(name, gated=gated)
        if own is None:
            return None
        found.append(MappedTensor(own, (Rows(name),)))
    return found


def _t5_name(name: str, *, gated: bool) -> str | None:
    top = _TOP.get(name.removesuffix(".weight"))
    if top is not None:
        return f"{top}.weight"
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    stack, number, kind = match.groups()
    block = f"{_STACKS[stack]}.block.{number}.layer"
    last = 2 if stack == "dec" else 1
    feed_forward = {"ffn_gate": "wi_0", "ffn_up": "wi_1" if gated else "wi", "ffn_down": "wo"}
    if kind in feed_forward:
        return f"{block}.{last}.DenseReluDense.{feed_forward[kind]}.weight"
    norms = {"attn_norm": 0, "cross_attn_norm": 1, "ffn_norm": last}
    if kind in norms:
        return f"{block}.{norms[kind]}.layer_norm.weight"
    for prefix, layer, module in (("cross_attn_", 1, "EncDecAttention"), ("attn_", 0, "SelfAttention")):
        part = _ATTENTION.get(kind.removeprefix(prefix))
        if kind.startswith(prefix) and part is not None:
            return f"{block}.{layer}.{module}.{part}.weight"
    return None
