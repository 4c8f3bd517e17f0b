"""Which tensor gets which format: by name, by layer, by pattern."""

from __future__ import annotations

import pytest

from weightpack import overrides, rules
from weightpack.decision import Target
from weightpack.entry import Entry, Part
from weightpack.errors import ConfigError, UnsupportedError
from weightpack.layers import Layer, Layers, by_name
from weightpack.skip_list import skipped_by_transformers
from weightpack.targets import FormatInfo, choose

SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
TABLE = [
    FormatInfo("f32", "f32", "any", "exact", "", "", 32, "always"),
    FormatInfo("f16", "f16", "any", "exact", "", "", 16, "always"),
    FormatInfo("bf16", "bf16", "any", "exact", "", "", 16, "always"),
    FormatInfo("bitsandbytes:nf4", "nf4", "safetensors", "exact", "", "", 4.5, "always"),
    FormatInfo("bitsandbytes:fp4", "fp4", "safetensors", "exact", "", "", 4.5, "always"),
    FormatInfo("bitsandbytes:int8", None, "safetensors", "exact", "", "", 8, "always"),
    FormatInfo("gguf:q8_0", "q8_0", "gguf", "exact", "", "", 8.5, "always"),
    FormatInfo("gguf:q4_0", "q4_0", "gguf", "exact", "", "", 4.5, "always"),
]


def find(name: str) -> str:
    return choose(name, TABLE).name


def entry(name: str, *shape: int, dtype: str = "BF16", format: str | None = None) -> Entry:
    weights = 1
    for size in shape:
        weights *= size
    plain = {"BF16": "bf16", "F16": "f16", "F32": "f32", "F64": "f64"}.get(dtype)
    if format is None:
        nbytes = weights * SIZES[dtype]
        return Entry(name, shape, dtype, plain, nbytes, weights, (Part(name, dtype, shape, nbytes),))
    parts = (Part(name, "U8", (weights // 2, 1), weights // 2), Part(f"{name}.absmax", "F32", (weights // 64,), 4))
    if format.startswith("gguf:"):
        parts = parts[:1]
    return Entry(name, shape, dtype, format, weights // 2, weights, parts)


def fits(name: str, shape: tuple[int, ...], params: object) -> str | None:
    if name.startswith("gguf:") and (not shape or shape[-1] % 32):
        return f"row of {shape[-1] if shape else 1} weights is not a multiple of block_size 32"
    return None


def decide(entries, to, *, container=None, layers=None, for_host=True, **patterns):
    row = choose(to, TABLE)
    container = container or ("gguf" if row.container == "gguf" else "safetensors")
    target = Target(row, container, fits, for_host=for_host)
    chosen = overrides.build(find, **patterns)
    return rules.decide(
        entries, target, chosen, layers if layers is not None else by_name(entries, {"model_type": "x"})
    )


def formats(decisions) -> dict[str, str]:
    return {d.entry.name: d.format for d in decisions.tensors}


LLAMA = [
    entry("model.embed_tokens.weight", 128, 64),
    entry("model.layers.0.self_attn.q_proj.weight", 64, 64),
    entry("model.layers.0.mlp.gate_proj.weight", 128, 64),
    entry("model.layers.0.input_layernorm.weight", 64),
    entry("model.norm.weight", 64),
    entry("lm_head.weight", 128, 64),
]


def test_bitsandbytes_packs_linear_layers_and_copies_the_rest():
    decided = decide(LLAMA, "nf4")
    assert formats(decided) == {
        "model.embed_tokens.weight": "copy",
        "model.layers.0.self_attn.q_proj.weight": "bitsandbytes:nf4",
        "model.layers.0.mlp.gate_proj.weight": "bitsandbytes:nf4",
        "model.layers.0.input_layernorm.weight": "copy",
        "model.norm.weight": "copy",
        "lm_head.weight": "copy",
    }
    assert {d.entry.name: d.why for d in decided.tensors}["lm_head.weight"] == "output layer"
    # The list names every matrix that might be a linear layer and is not packed.
    assert set(decided.skip_list) == {"lm_head", "model.embed_tokens"}
    assert not skipped_by_transformers(decided.skip_list, "model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("transformer.wte.weight", (64, 64), "embedding"),
        ("encoder.embeddings.position_embeddings.weight", (64, 64), "embedding"),
        ("embed_tokens.0.weight", (64, 64), "embedding"),
        ("shared.weight", (64, 64), "embedding"),
        ("mask_decoder.mask_tokens.weight", (4, 64), "embedding"),
        ("block.0.SelfAttention.relative_attention_bias.weight", (64, 64), "embedding"),
        ("h.0.ln_1.weight", (64,), "norm, bias or other vector"),
        ("visual.conv1.weight", (64, 64), "convolution"),
        ("visual.patch_embed.proj.weight", (64, 3, 16, 16), "not two-dimensional"),
        ("layers.0.mlp.gate.weight", (8, 64), "router of experts"),
        ("layers.0.block_sparse_moe.experts.3.w1.weight", (64, 64), "one of many experts"),
        ("score.weight", (2, 64), "output layer"),
        ("cls.predictions.decoder.weight", (64, 64), "output layer"),
        ("scale_shift_table", (6, 64), "not the weight of a layer"),
        ("h.0.attn.c_attn.bias", (192,), "norm, bias or other vector"),
    ],
)
def test_what_is_kept_by_name(name, shape, why):
    (only,) = [d for d in decide([entry(name, *shape)], "nf4").tensors]
    assert only.format == "copy"
    assert why in only.why


@pytest.mark.parametrize(
    "name",
    [
        "time_text_embed.timestep_embedder.linear_1.weight",
        "time_embedding.linear_1.weight",
        "transformer_blocks.0.norm1.linear.weight",
        "decoder.layers.0.fc1.weight",
        "encoder.layer.0.attention.self.query.weight",
        "proj_out.weight",
    ],
)
def test_what_is_packed_by_name(name):
    assert formats(decide([entry(name, 64, 64)], "nf4")) == {name: "bitsandbytes:nf4"}


def test_conv1d_is_kept_in_the_gpt2_family_and_where_the_family_is_unknown():
    weight = [entry("h.0.attn.c_attn.weight", 64, 192)]
    assert by_name(weight, {"model_type": "gpt2"}).tensors[weight[0].name].kind == "conv1d"
    assert by_name(weight, None).tensors[weight[0].name].kind == "conv1d"
    assert by_name(weight, {"model_type": "gpt_bigcode"}).tensors[weight[0].name].kind == "linear"


def test_the_output_of_an_attention_of_torch_is_kept():
    weights = [entry(f"head.attention.{leaf}", 64, 64) for leaf in ("in_proj_weight", "out_proj.weight")]
    weights += [entry("block.attention.out_proj.weight", 64, 64)]
    assert [d.format for d in decide(weights, "nf4").tensors] == ["copy", "copy", "bitsandbytes:nf4"]


def test_t5_output_projections_stay_because_the_host_keeps_them_in_float32():
    weights = [entry(f"encoder.block.0.layer.1.DenseReluDense.{leaf}.weight", 64, 64) for leaf in ("wi", "wo")]
    decided = decide(weights, "nf4", layers=by_name(weights, {"model_type": "t5"}))
    assert [d.format for d in decided.tensors] == ["bitsandbytes:nf4", "copy"]


def test_what_the_host_says_counts_more_than_the_name():
    weights = [entry("x_embedder.weight", 64, 64), entry("looks_linear.weight", 64, 64)]
    told = {
        "x_embedder.weight": Layer("linear", "x_embedder", "linear layer"),
        "looks_linear.weight": Layer("other", "looks_linear", "not a linear layer"),
    }
    layers = Layers("a host", "diffusers", True, told, frozenset({"x_embedder"}))
    decided = decide(weights, "nf4", layers=layers)
    assert [d.format for d in decided.tensors] == ["bitsandbytes:nf4", "copy"]
    assert decided.skip_list == ()


def test_a_linear_layer_without_a_tensor_is_listed():
    told = {"a.weight": Layer("linear", "a", "linear layer")}
    layers = Layers("a host", "transformers", True, told, frozenset({"a", "lm_head"}))
    assert decide([entry("a.weight", 64, 64)], "nf4", layers=layers).skip_list == ("lm_head",)


def test_gguf_rules():
    weights = [
        *LLAMA,
        entry("h.0.conv.weight", 64, 3, 32),
        entry("odd.weight", 64, 33),
        entry("vision.patch_embed.weight", 64, 3, 32, 32),
        entry("layers.0.mlp.experts.gate_up_proj", 4, 64, 32),
        entry("layers.0.mlp.gate.weight", 4, 64),
        entry("wpe.weight", 64, 64),
        entry("table", 6, 64),
        entry("position_ids", 1, 64, dtype="I64"),
    ]
    assert formats(decide(weights, "q8_0")) == {
        "model.embed_tokens.weight": "gguf:q8_0",
        "model.layers.0.self_attn.q_proj.weight": "gguf:q8_0",
        "model.layers.0.mlp.gate_proj.weight": "gguf:q8_0",
        "model.layers.0.input_layernorm.weight": "f32",
        "model.norm.weight": "f32",
        "lm_head.weight": "gguf:q8_0",
        "h.0.conv.weight": "copy",
        "odd.weight": "f16",
        "vision.patch_embed.weight": "copy",
        "layers.0.mlp.experts.gate_up_proj": "gguf:q8_0",
        "layers.0.mlp.gate.weight": "copy",
        "wpe.weight": "copy",
        "table": "copy",
        "position_ids": "copy",
    }
    why = {d.entry.name: d.why for d in decide(weights, "q8_0").tensors}
    assert why["odd.weight"] == "row of 33 weights is not a multiple of block_size 32: f16 instead of q8_0"


def test_gguf_refuses_what_it_cannot_hold():
    with pytest.raises(UnsupportedError, match=r'at most 4 dimensions, got 5 \(tensor "video.weight"'):
        decide([entry("video.weight", 2, 2, 2, 2, 32)], "q8_0")
    with pytest.raises(UnsupportedError, match=r'no type for BOOL \(tensor "mask"\)'):
        decide([entry("mask", 4, 4, dtype="BOOL")], "q8_0")


def test_gguf_warns_of_names_that_llama_cpp_does_not_read():
    (warning,) = decide([entry("x" * 60 + ".weight", 64, 64)], "q8_0").warnings
    assert "longer than 63 bytes" in warning


def test_casts_change_every_float_and_no_integer():
    weights = [entry("a", 4, dtype="F32"), entry("b", 4, 4), entry("ids", 4, dtype="I64")]
    assert formats(decide(weights, "bf16")) == {"a": "bf16", "b": "copy", "ids": "copy"}
    with pytest.raises(UnsupportedError, match="F8_E4M3 is not decoded"):
        decide([entry("a.weight", 4, 4, dtype="F8_E4M3")], "bf16")


def test_packed_tensors_are_decoded_by_casts_and_copied_by_their_own_format():
    packed = [entry("a.weight", 64, 64, format="bitsandbytes:nf4")]
    assert formats(decide(packed, "bf16")) == {"a.weight": "bf16"}
    assert formats(decide(packed, "nf4")) == {"a.weight": "copy"}
    again = decide(packed, "int8".replace("int8", "bitsandbytes:int8"))
    assert formats(again) == {"a.weight": "bitsandbytes:int8"}
    assert any("a second time" in warning for warning in again.warnings)


def test_gguf_blocks_that_are_kept_are_decoded_for_safetensors():
    weights = [entry("embed.weight", 64, 64, dtype="F32", format="gguf:q8_0"), entry("a.weight", 64, 64)]
    assert formats(decide(weights, "nf4"))["embed.weight"] == "bf16"


def test_keep_goes_before_assign_and_assign_before_the_rules():
    decided = decide(LLAMA, "nf4", keep=["q_proj"], assign=["q_proj=f32", "gate_proj=f32"])
    assert formats(decided)["model.layers.0.self_attn.q_proj.weight"] == "copy"
    assert formats(decided)["model.layers.0.mlp.gate_proj.weight"] == "f32"


def test_first_assignment_wins():
    decided = decide(LLAMA, "q8_0", assign=["q_proj=q4_0", "proj=f16"])
    assert formats(decided)["model.layers.0.self_attn.q_proj.weight"] == "gguf:q4_0"
    assert formats(decided)["model.layers.0.mlp.gate_proj.weight"] == "f16"


def test_only_leaves_everything_else():
    decided = decide(LLAMA, "nf4", only=["gate_proj"])
    packed = [name for name, format in formats(decided).items() if format != "copy"]
    assert packed == ["model.layers.0.mlp.gate_proj.weight"]
    assert set(decided.skip_list) == {"lm_head", "model.embed_tokens", "model.layers.0.self_attn.q_proj"}


def test_patterns_that_match_nothing_are_told():
    decided = decide(LLAMA, "nf4", keep=["nothing"], assign=["neither=f16"], only=["q_proj", "nor this"])
    assert [w for w in decided.warnings if "matches no tensor" in w] == [
        "--keep nothing matches no tensor",
        "--assign neither=f16 matches no tensor",
        "--only nor this matches no tensor",
    ]


def test_an_assignment_that_cannot_be_carried_out_is_refused():
    with pytest.raises(ConfigError, match="not a multiple"):
        decide([entry("odd.weight", 4, 33)], "q8_0", assign=["odd=q4_0"])
    with pytest.raises(ConfigError, match="a gguf file cannot hold bitsandbytes:nf4"):
        decide(LLAMA, "q8_0", assign=["q_proj=nf4"])
    with pytest.raises(ConfigError, match="holds I64"):
        decide([entry("ids", 4, dtype="I64")], "nf4", assign=["ids=nf4"])
    with pytest.raises(ConfigError, match="either 4-bit or int8"):
        decide(LLAMA, "nf4", assign=["q_proj=bitsandbytes:int8"])


def test_an_assignment_that_the_host_could_not_load_is_refused():
    told = {"emb.weight": Layer("embedding", "emb", "embedding")}
    layers = Layers("a host", "transformers", True, told, frozenset())
    with pytest.raises(ConfigError, match="transformers cannot load tensor"):
        decide([entry("emb.weight", 64, 64)], "nf4", layers=layers, assign=["emb=nf4"])
    decided = decide([entry("emb.weight", 64, 64)], "nf4", layers=layers, for_host=False, assign=["emb=nf4"])
    assert formats(decided) == {"emb.weight": "bitsandbytes:nf4"}


def test_a_layer_that_the_host_takes_for_a_kept_one_is_kept():
    weights = [entry("proj_out.weight", 64, 64), entry("single.0.proj_out.weight", 64, 64), entry("a.weight", 64, 64)]
    decided = decide(weights, "nf4", layers=by_name(weights, {"_class_name": "X"}), keep=["^proj_out"])
    assert formats(decided) == {
        "proj_out.weight": "copy",
        "single.0.proj_out.weight": "copy",
        "a.weight": "bitsandbytes:nf4",
    }
    assert 'reads "proj_out" in the skip list' in decided.tensors[1].why
    assert any("1 more layer is left unpacked" in warning for warning in decided.warnings)


def test_empty_and_scalar_tensors_pass_through():
    weights = [entry("empty.weight", 0, 64), entry("scale"), *LLAMA]
    assert formats(decide(weights, "nf4"))["empty.weight"] == "copy"
    assert formats(decide(weights, "nf4"))["scale"] == "copy"
    assert formats(decide(weights, "q8_0"))["scale"] == "f32"


def test_format_names():
    assert find("NF4") == "bitsandbytes:nf4"
    assert find("gguf:q8_0") == "gguf:q8_0"
    with pytest.raises(ConfigError) as caught:
        find("int8")
    assert caught.value.hint == "write bitsandbytes:int8"
    with pytest.raises(ConfigError) as caught:
        find("nf5")
    assert "did you mean nf4" in str(caught.value.hint)
