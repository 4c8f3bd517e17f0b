"""The key-value pairs that every converted GGUF file has."""

from __future__ import annotations

import pytest

from weightpack import gguf_metadata
from weightpack.decision import Decision

from .test_model_config import packed, weight

NEWER = {39, 40, 41}
"""llama.cpp's NVFP4, Q1_0 and Q2_0, which the gguf package has no names for."""


def test_gguf_pairs():
    decisions = [packed("gguf:q8_0"), Decision(weight(name="n", shape=(64,)), "f32", "norm")]
    pairs = gguf_metadata.gguf_metadata(decisions, {"model_type": "llama"}, "small")
    assert pairs == [
        ("general.architecture", "str", "llama"),
        ("general.name", "str", "small"),
        ("general.file_type", "u32", 7),
        ("general.quantization_version", "u32", 2),
        ("weightpack.source_dtype", "str", "bf16"),
    ]


def test_file_types_are_those_of_gguf(peer):
    enum = peer("gguf").LlamaFileType
    names = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "gguf:mxfp4": "MOSTLY_MXFP4_MOE"}
    for name, number in gguf_metadata.FILE_TYPES.items():
        if number in NEWER:
            continue
        theirs = names.get(name) or f"MOSTLY_{name.partition(':')[2].upper()}"
        match = [member for member in enum if member.name in (theirs, f"{theirs}_M")]
        assert [member.value for member in match] == [number], name


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "qwen2_moe"}, "qwen2_moe"),
        ({"model_type": "gpt-neo"}, "gpt_neo"),
        ({"_class_name": "FluxTransformer2DModel"}, "flux_transformer_2d_model"),
        ({"_class_name": "UNet2DConditionModel"}, "u_net_2d_condition_model"),
        ({}, "unknown"),
        (None, "unknown"),
    ],
)
def test_architecture(config, name):
    assert gguf_metadata.architecture(config) == name
