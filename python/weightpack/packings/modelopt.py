"""ModelOpt's unified export, as vLLM, TensorRT-LLM and SGLang read it: one format for all packed layers.

The section of `config.json` and `hf_quant_config.json` have the keys and values that ModelOpt 0.47 writes
for weights alone. Where layers are copied that also have ranges of activations, they say so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from ..decision import Decision, Target
from .table import HostConfig, decoded, one_format, packed_of

__all__ = [
    "FORMATS",
    "METHODS",
    "describes",
    "host_config",
    "leaves",
    "leftovers",
    "one_kind",
    "settle",
    "shared_scales",
    "shortened",
    "together",
]

METHODS = ("modelopt",)
FORMATS = ("modelopt:",)
FILE = "hf_quant_config.json"
_ARRAYS = (".weight_scale", ".weight_scale_2", ".pre_quant_scale", ".weight_quantizer._scale")
_VERSION = "0.47.0"
"""The release whose layout this is."""
_NVFP4 = "modelopt:nvfp4"
_ALGORITHMS = {
    "modelopt:fp8": "FP8",
    "modelopt:fp8_row": "FP8_PER_CHANNEL_PER_TOKEN",
    "modelopt:fp8_block": "fp8_pb_wo",
    "modelopt:int4": "W4A16_AWQ",
    "modelopt:int8": "W8A16",
    "modelopt:mxfp4": "mxfp4",
    "modelopt:nvfp4": "W4A16_NVFP4",
}
_QUERIES = frozenset({"q_proj", "query", "to_q"})
_ATTENTION = (
    ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("to_added_q", "to_added_k", "to_added_v"),
)
_GATED = (("gate_proj", "up_proj"), ("w1", "w3"))
_CROSS_ATTENTION = frozenset({"attn2", "cross_attn", "crossattention", "encoder_attn"})
"""Attention whose keys and values are of another sequence than its queries."""
_LEFT = (
    "*block_sparse_moe.gate*", "*mlp.gate.*", "*mlp.shared_expert_gate.*", "*router*",
    "*linear_attn.conv1d*", "*self_attention.conv1d*", "*mixer.conv1d*",
    "*linear_attn.in_proj_a*", "*linear_attn.in_proj_b*",
    "*lm_head*", "*output_layer*", "output.*", "*proj_out.*", "mtp.*",
    "*embed_vision*", "*vision_tower*", "*visual*", "*vision_model*", "*multi_modal_projector*",
)  # fmt: skip
"""Layers that every preset of ModelOpt 0.47 leaves as they are (`_default_disabled_quantizer_cfg`)."""
_WITH_ACTIVATIONS = {
    "modelopt:int4": "W4A8_AWQ",
    "modelopt:int8": "W8A8_SQ_PER_CHANNEL",
    "modelopt:nvfp4": "NVFP4",
}


def one_kind(decisions: list[Decision], target: Target) -> list[Decision]:
    """All layers have one format, and NVFP4 also one layout: what a source has in blocks of 32 (W4A8), or with
    factors of its columns (NVFP4_AWQ), is packed anew where that is asked for, and decoded elsewhere."""
    decisions = one_format(decisions, target, "modelopt")
    if target.format.name == _NVFP4:
        return [replace(d, format=_NVFP4, why=f"{d.why} in another layout") if _is_other(d) else d for d in decisions]
    return decoded(decisions, target, _is_other)


def _is_other(decision: Decision) -> bool:
    """Whether the tensor is copied NVFP4, but not in blocks of 16 alone."""
    if not _copied(decision) or decision.result != _NVFP4:
        return False
    entry = decision.entry
    sizes = {part.name.rpartition(".")[2]: part.shape for part in entry.parts}
    return "pre_quant_scale" in sizes or sizes["weight_scale"][-1] * 16 != entry.shape[-1]


def settle(
    host: str | None,
    packed: Iterable[str],
    kept: Iterable[str],
    *,
    fixed: Sequence[str] = (),
    prefix: str = "",
) -> tuple[list[str], dict[str, str]]:
    """The layers left unpacked, shortened as ModelOpt does: `a.b*` where no packed layer begins with `a.b`,
    or `a.b.*` where none is below it. Readers take the entries for whole paths with wildcards, so that none
    hits another layer."""
    return shortened(kept, packed), {}


def leaves(path: str) -> bool:
    """Output layers, routers, what reads images and the like: as ModelOpt's presets.

    >>> leaves("model.visual.blocks.0.attn.qkv"), leaves("model.layers.0.self_attn.q_proj")
    (True, False)
    """
    return any(fnmatchcase(f"{path}.weight_quantizer", pattern) for pattern in _LEFT)


def shortened(kept: Iterable[str], packed: Iterable[str]) -> list[str]:
    """The paths of `kept`, each as the shortest pattern that hits none of `packed`.

    >>> shortened(["lm_head", "vision.layers.0.fc"], ["model.layers.0.fc"])
    ['lm_head', 'vision*']
    """
    packed = list(packed)
    # What begins a packed path, and what does so up to a dot or the end.
    begun = {path[:end] for path in packed for end in range(1, len(path) + 1)}
    whole = {path[:end] for path in packed for end in range(1, len(path) + 1) if path[end : end + 1] in ("", ".")}

    def pattern(path: str) -> str:
        for start in (path[:place] for place, letter in enumerate(path) if letter == "."):
            if start not in begun:
                return f"{start}*"
            if start not in whole:
                return f"{start}.*"
        return path

    return sorted({pattern(path) for path in kept})


def together(paths: Iterable[str], host: str | None = None) -> list[list[str]]:
    """The layers among `paths` that read the same input, so that engines run them as one product: query, key
    and value, gate and up, of one module each. In models of diffusers those of an attention alone.

    Sources: `requantize_resmooth_fused_llm_layers`, `is_qkv_projection` and `_GATE_UP_PAIRS` of ModelOpt 0.47,
    which runs a model to see which layers read one tensor; here names tell. Where attention and feed-forward
    run side by side (Phi, Cohere), or keys of all decoder layers read one encoder, ModelOpt's sets are larger.
    """
    kinds = _ATTENTION if host == "diffusers" else _ATTENTION + _GATED
    set_of = {leaf: number for number, leaves in enumerate(kinds) for leaf in leaves}
    found: dict[tuple[str, int], list[str]] = {}
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        if leaf in _QUERIES and not _CROSS_ATTENTION.isdisjoint(parent.split(".")):
            continue
        if leaf in set_of:
            found.setdefault((parent, set_of[leaf]), []).append(path)
    return [layers for layers in found.values() if len(layers) > 1]


def shared_scales(names: Iterable[str], format_name: str, host: str | None) -> dict[str, str]:
    """NVFP4 layers that run as one product have one `weight_scale_2`. Of the other formats ModelOpt leaves
    each layer its own scales, also those of FP8 with one scale."""
    if format_name != "modelopt:nvfp4":
        return {}
    paths = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    return {f"{path}.weight": f"{layers[0]}.weight" for layers in together(paths, host) for path in layers}


def host_config(decisions: Sequence[Decision], skip_list: Sequence[str], compute: str, host: str | None) -> HostConfig:
    """The section, and `hf_quant_config.json`."""
    packed = packed_of(decisions)
    kind = packed[0].result
    with_activations = any(part.name.endswith(".input_scale") for d in packed for part in d.entry.parts if _copied(d))
    algorithm = _WITH_ACTIVATIONS.get(kind, _ALGORITHMS[kind]) if with_activations else _ALGORITHMS[kind]
    quantization: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": None}
    if kind == "modelopt:nvfp4":
        quantization["group_size"] = 16
    elif kind == "modelopt:int4":
        quantization |= {"group_size": _group_size(packed), "has_zero_point": False, "pre_quant_scale": True}
    quantization["exclude_modules"] = list(skip_list)
    producer = {"name": "modelopt", "version": _VERSION}
    section: dict[str, Any] = {}
    groups = _groups(algorithm)
    if groups is not None:
        section["config_groups"] = {"group_0": groups}
    section |= {
        "ignore": list(skip_list),
        "quant_algo": algorithm,
        "producer": producer,
        "quant_method": "modelopt",
    }
    text = json.dumps({"producer": producer, "quantization": quantization}, indent=4)
    return HostConfig(section, texts={FILE: text})


def _groups(algorithm: str) -> dict[str, Any] | None:
    """What ModelOpt says of weights and activations; it does for some algorithms only."""
    eight: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
    four = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    if algorithm == "FP8":
        return {"input_activations": eight, "weights": eight, "targets": ["Linear"]}
    if algorithm == "NVFP4":
        return {"input_activations": four, "weights": four, "targets": ["Linear"]}
    if algorithm == "W4A16_NVFP4":
        return {"weights": four, "targets": ["Linear"]}
    return None


def _copied(decision: Decision) -> bool:
    return decision.format == "copy"


def _group_size(packed: Sequence[Decision]) -> int:
    """Weights that share a scale in INT4 layers: 128, but for copies that have others."""
    for decision in packed:
        scales = [part for part in decision.entry.parts if part.name.endswith(".weight_scale")]
        if _copied(decision) and scales:
            return int(decision.entry.shape[-1] // scales[0].shape[-1])
    return 128


def leftovers(names: Iterable[str]) -> list[str]:
    """Scales without a weight that is decoded."""
    return [name for name in names if name.endswith(_ARRAYS)]


def describes(key: str, value: str) -> bool:
    """Nothing is told by metadata."""
    return False
