"""Recipes: the golden tables of llama.cpp, and the rules as such."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weightpack import recipes
from weightpack.errors import ConfigError, UnsupportedError
from weightpack.mapping import Facts
from weightpack.targets import FormatInfo

from .recipe_models import MODELS, shortened, types

GOLDEN = json.loads((Path(__file__).parent / "vectors" / "recipes" / "llama_cpp.json").read_text("utf-8"))["models"]
LLAMA = recipes.family(recipes.LLAMA)
IMAGE = recipes.family(recipes.IMAGE)
WITHOUT_FALLBACK = {("q1_0_mix", 288), ("q1_0_mix", 264)}
"""llama.cpp stops where the block of this type does not divide a row; weightpack takes f16."""


@pytest.mark.parametrize("recipe", sorted(LLAMA.recipes))
@pytest.mark.parametrize("name", sorted(MODELS))
def test_types_are_those_of_llama_cpp(name, recipe):
    rows = GOLDEN[name]
    for importance in (False, True):
        expected = rows.get(f"{recipe} with importance", rows[recipe]) if importance else rows[recipe]
        if (recipe, MODELS[name].columns) in WITHOUT_FALLBACK:
            assert expected is None
            assert types(MODELS[name], recipe, importance=importance)["blk.0.attn_q.weight"] == "f16"
        elif expected is None:
            with pytest.raises(UnsupportedError, match="with an importance vector only"):
                types(MODELS[name], recipe, importance=importance)
        else:
            assert shortened(types(MODELS[name], recipe, importance=importance)) == expected


def test_every_model_and_recipe_has_its_table():
    assert set(GOLDEN) == set(MODELS)
    for rows in GOLDEN.values():
        assert {name.removesuffix(" with importance") for name in rows} == set(LLAMA.recipes)


def test_the_well_known_mixture():
    found = types(MODELS["llama"], "q4_k_m", importance=False)
    larger = {name for name, kind in found.items() if kind == "q6_k"}
    layers = (0, 3, 6, 7)
    assert larger == {"output.weight"} | {f"blk.{i}.{kind}.weight" for i in layers for kind in ("attn_v", "ffn_down")}


def test_reasons_say_what_decided():
    tensor = recipes.Tensor("blk.0.attn_v.weight", "attn_v", 0, 0, 8)
    facts = Facts("llama", 8)
    assert LLAMA.recipes["q4_k_m"].choose(tensor, facts) == ("q6_k", "q4_k_m: attn_v, one of the layers with more bits")
    assert LLAMA.recipes["q4_k_s"].choose(tensor, facts) == ("q5_k", "q4_k_s: attn_v, first 4 layers")
    assert LLAMA.recipes["q6_k_mix"].choose(tensor, facts) == ("q6_k", "q6_k_mix: attn_v")


HOST_NAMES = {
    "lm_head.weight": "output",
    "model.embed_tokens.weight": "token_embd",
    "transformer.wte.weight": "token_embd",
    "model.layers.3.self_attn.q_proj.weight": "attn_q",
    "model.layers.3.self_attn.k_proj.weight": "attn_k",
    "model.layers.3.self_attn.v_proj.weight": "attn_v",
    "model.layers.3.self_attn.o_proj.weight": "attn_output",
    "model.layers.3.self_attn.qkv_proj.weight": "attn_qkv",
    "transformer.h.3.attn.c_attn.weight": "attn_qkv",
    "transformer.h.3.attn.c_proj.weight": "attn_output",
    "transformer.h.3.mlp.c_proj.weight": "ffn_down",
    "transformer.h.3.self_attention.query_key_value.weight": "attn_qkv",
    "transformer.h.3.self_attention.dense.weight": "attn_output",
    "model.layers.3.mlp.gate_proj.weight": "ffn_gate",
    "model.layers.3.mlp.up_proj.weight": "ffn_up",
    "model.layers.3.mlp.down_proj.weight": "ffn_down",
    "model.layers.3.mlp.experts.down_proj": "ffn_down",
    "encoder.block.3.layer.0.SelfAttention.v.weight": "attn_v",
    "encoder.block.3.layer.1.DenseReluDense.wo.weight": "ffn_down",
    "encoder.layer.3.attention.self.value.weight": "attn_v",
    "encoder.layer.3.attention.output.dense.weight": "attn_output",
    "encoder.layer.3.output.dense.weight": "ffn_down",
    "blk.3.attn_v.weight": "attn_v",
    "blk.3.ffn_down_exps.weight": "ffn_down",
    "model.layers.3.input_layernorm.weight": "other",
}


@pytest.mark.parametrize("name", HOST_NAMES)
def test_kinds_are_told_by_names_of_hosts_too(name):
    assert LLAMA.kinds.of(name) == HOST_NAMES[name]
    assert LLAMA.kinds.layer_of(name) == (3 if ".3." in name else None)


def test_kinds_of_diffusion_models():
    names = {
        "double_blocks.0.img_attn.qkv.weight": "attn_qkv",
        "joint_blocks.0.x_block.attn.qkv.weight": "attn_qkv",
        "blocks.0.self_attn.v.weight": "attn_v",
        "transformer_blocks.0.attn1.to_v.weight": "attn_v",
        "blocks.0.ffn.2.weight": "ffn_down",
        "transformer_blocks.0.ff.net.2.weight": "ffn_down",
        "double_blocks.0.img_mlp.2.weight": "other",
    }
    assert {name: IMAGE.kinds.of(name) for name in names} == names


IMAGE_TABLE = {
    "q2_k_mix": ("q2_k", "q3_k", "q2_k", "q2_k"),
    "q3_k_m": ("q3_k", "q5_k", "q4_k", "q4_k"),
    "q3_k_l": ("q3_k", "q5_k", "q4_k", "q5_k"),
    "q4_0_mix": ("q4_0", "q4_0", "q4_0", "q4_1"),
    "q4_k_s": ("q4_k", "q5_k", "q4_k", "q5_k"),
    "q4_k_m": ("q4_k", "q6_k", "q5_k", "q6_k"),
    "q5_0_mix": ("q5_0", "q5_0", "q5_0", "q5_1"),
    "q5_k_m": ("q5_k", "q6_k", "q6_k", "q6_k"),
    "q6_k_mix": ("q6_k", "q6_k", "q6_k", "q6_k"),
}
"""What ComfyUI-GGUF's patch gives other tensors, values, fused qkv and ffn_down of the first layer."""


@pytest.mark.parametrize("name", IMAGE_TABLE)
def test_recipes_of_diffusion_models(name):
    found = tuple(
        IMAGE.recipes[name].choose(recipes.Tensor("x", kind, 0, 0, 8), Facts())[0]
        for kind in ("other", "attn_v", "attn_qkv", "ffn_down")
    )
    assert found == IMAGE_TABLE[name]


def test_later_values_of_a_diffusion_model():
    def value(recipe: str, position: int) -> str:
        return IMAGE.recipes[recipe].choose(recipes.Tensor("x", "attn_v", 0, position, 8), Facts())[0]

    assert [value("q3_k_m", position) for position in (1, 2)] == ["q5_k", "q4_k"]
    assert [value("q4_k_s", position) for position in (3, 4)] == ["q5_k", "q4_k"]


def test_a_recipe_that_a_family_lacks():
    row = FormatInfo("gguf:iq3_m", "iq3_m", "gguf", "recipe", "", "", 4, "always")
    with pytest.raises(ConfigError, match="iq3_m is no recipe for image models"):
        recipes.find_recipe(row, recipes.IMAGE)
    assert recipes.find_recipe(row, recipes.LLAMA).type == "iq3_s"
    assert recipes.find_recipe(FormatInfo("gguf:q4_k", "q4_k", "gguf", "exact", "", "", 4.5, "always"), "image") is None
