"""Names of tensors: against the maps of the `gguf` package, and what has no place."""

from __future__ import annotations

from typing import Any

import pytest

from weightpack.entry import Entry
from weightpack.errors import CheckpointError, UnsupportedError
from weightpack.language.families import FAMILIES, Family, detect_family, find_family
from weightpack.language.names import map_names
from weightpack.mapping import Interleave

from .models import CONFIGS, HEADS, KEY_HEADS, LAYERS, shapes


def entry(name: str, shape: Any) -> Entry:
    weights = 1
    for size in shape:
        weights *= size
    return Entry(name, tuple(shape), "BF16", "bf16", 2 * weights, weights)


def entries(config: dict[str, Any]) -> list[Entry]:
    return [entry(name, shape) for name, shape in shapes(config).items()]


def family_of(name: str) -> Family:
    family = detect_family(CONFIGS[name])
    assert family is not None
    return family


def mapped(name: str, *more: Entry, without: str = "") -> Any:
    config = CONFIGS[name]
    tensors = [one for one in entries(config) if one.name != without] + list(more)
    layers = config["num_hidden_layers"]
    return map_names(tensors, family_of(name), layers, HEADS, KEY_HEADS)


@pytest.mark.parametrize("name", CONFIGS)
def test_against_the_maps_of_gguf(peer: Any, name: str) -> None:
    gguf = peer("gguf")
    config = CONFIGS[name]
    architecture = {arch: key for key, arch in gguf.MODEL_ARCH_NAMES.items()}[family_of(name).architecture]
    theirs = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for tensor in mapped(name).tensors:
        (rows,) = tensor.sources
        assert tensor.name == theirs.get_name(rows.name, try_suffixes=(".weight", ".bias"))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_name_is_one_that_the_architecture_has(peer: Any, family: Family) -> None:
    gguf = peer("gguf")
    architecture = {arch: key for key, arch in gguf.MODEL_ARCH_NAMES.items()}[family.architecture]
    known = {gguf.TENSOR_NAMES[key].removeprefix("blk.{bid}.") for key in gguf.MODEL_TENSORS[architecture]}
    assert {*family.block.values(), *family.top.values()} - known <= ({"output"} if family.is_tied else set())


def test_only_the_heads_of_llamas_are_reordered() -> None:
    for name in CONFIGS:
        orders = {t.kind: t.sources[0].interleave for t in mapped(name).tensors if t.sources[0].interleave}
        expected = {"attn_q": Interleave(HEADS), "attn_k": Interleave(KEY_HEADS)}
        assert orders == (expected if family_of(name).architecture == "llama" else {})


def test_norms_of_gemma_are_shifted_and_nothing_else() -> None:
    for name in CONFIGS:
        shifted = {t.name for t in mapped(name).tensors if t.add is not None}
        norms = {t.name for t in mapped(name).tensors if t.name.endswith("norm.weight")}
        assert shifted == (norms if name.startswith("gemma") else set())
        assert all(t.plain == "f32" and t.keep for t in mapped(name).tensors if t.name in norms)


def test_what_is_not_in_the_result_is_named() -> None:
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert mapped("llama2", entry(frequencies, [16])).left_out == {frequencies: "computed by the reader"}
    head = entry("lm_head.weight", shapes(CONFIGS["gemma"])["model.embed_tokens.weight"])
    assert mapped("gemma", head).left_out == {"lm_head.weight": "the reader takes the embedding as output layer"}
    assert "output.weight" in {t.name for t in mapped("llama2").tensors}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama2", "model.layers.0.self_attn.q_norm.weight"),
        ("llama2", "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
        ("llama2", "model.layers.0.self_attn.q_proj.qweight"),
        ("mistral", "model.layers.0.self_attn.q_proj.bias"),
        ("qwen2", "model.layers.0.self_attn.o_proj.bias"),
        ("gemma", "vision_tower.patch.weight"),
        ("llama2", "model.norm.bias"),
    ],
)
def test_a_name_without_a_place_is_refused(model: str, name: str) -> None:
    with pytest.raises(UnsupportedError, match="has no place for tensor"):
        mapped(model, entry(name, [4, 4]))


def test_contradictions_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=f"says {LAYERS} layers"):
        mapped("llama2", entry(f"model.layers.{LAYERS}.mlp.up_proj.weight", [4, 4]))
    with pytest.raises(CheckpointError, match=r'"blk\.1\.ffn_up\.weight"'):
        mapped("llama2", without="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match="two tensors would be called"):
        mapped("llama2", entry("norm.weight", [4]))
    config = CONFIGS["llama2"]
    with pytest.raises(CheckpointError, match="256 rows are not 7 heads"):
        map_names(entries(config), family_of("llama2"), LAYERS, 7, 7)


def test_families_are_found_by_class_and_by_type() -> None:
    assert detect_family({"architectures": ["LlamaForCausalLM"], "model_type": "smollm"}) is find_family("llama")
    assert detect_family({"model_type": "qwen3"}) is find_family("qwen3")
    assert detect_family({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}) is None
    assert detect_family({"model_type": "mixtral"}) is None
    assert find_family("bert") is None
