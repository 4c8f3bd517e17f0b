"""Every model of `models.py` against what llama.cpp's own script makes of it (golden data)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightpack as wp
from weightpack import open_checkpoint
from weightpack.language.architecture import find
from weightpack.mapping import ArchitecturePlan

from ..vectors.language.make import shortened
from .models import CONFIGS, VECTORS, make_model

EXPECTED = json.loads((VECTORS / "expected.json").read_text("utf-8"))["models"]

OF_THE_SCRIPT = {
    # What it makes of the folder's name and the number of weights.
    "general.basename", "general.name", "general.size_label", "general.finetune", "general.version",
    # Written by every conversion, from what it converts to.
    "general.file_type", "general.quantization_version",
}  # fmt: skip
"""Keys that are not this package's to write."""

OF_CODE_GEMMA = {"prefix", "suffix", "middle", "fsep", "eot"}
"""Tokens of one Gemma that the script gives every Gemma, under keys that no reader has any more."""


def plan(folder: Path) -> ArchitecturePlan:
    with open_checkpoint(folder) as checkpoint:
        found = find(None, checkpoint.config, checkpoint.keys())
        assert found is not None
        return found.plan(list(checkpoint.values()), checkpoint.config, folder)


def kinds(pairs: Any) -> dict[str, Any]:
    """The pairs of a plan in the words of the golden data."""
    names = {"u32": "uint32", "i32": "int32", "f32": "float32", "bool": "bool", "str": "string"}
    found = {}
    for key, kind, value in pairs:
        inner = kind.strip("[]")
        if inner == "f32":
            value = np.asarray(value, np.float32).tolist()
        found[key] = [(["array"] if kind != inner else []) + [names[inner]], shortened(value)]
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_metadata(tmp_path: Path, name: str) -> None:
    expected = {k: v for k, v in EXPECTED[name]["metadata"].items() if k not in OF_THE_SCRIPT}
    if name == "gemma":
        expected = {
            k: v for k, v in expected.items() if k.split(".")[-1].removesuffix("_token_id") not in OF_CODE_GEMMA
        }
    assert kinds(plan(make_model(tmp_path / name, name)).metadata) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors(tmp_path: Path, name: str) -> None:
    target = tmp_path / "out.gguf"
    wp.convert(make_model(tmp_path / name, name), target, to="f32")
    with open_checkpoint(target) as checkpoint:
        found = {
            tensor: [entry.dtype, list(entry.shape), hashlib.sha256(checkpoint.read(tensor).tobytes()).hexdigest()]
            for tensor, entry in checkpoint.items()
        }
    assert found == EXPECTED[name]["tensors"]


@pytest.mark.parametrize("name", CONFIGS)
def test_all_keys_of_a_file(tmp_path: Path, name: str) -> None:
    target = tmp_path / "out.gguf"
    wp.convert(make_model(tmp_path / name, name), target, to="f32")
    with open_checkpoint(target) as checkpoint:
        keys = set(checkpoint.metadata)
    left_out = {"general.size_label", "general.quantization_version"}
    if name == "gemma":
        left_out |= {f"tokenizer.ggml.{kind}_token_id" for kind in OF_CODE_GEMMA}
    assert keys == {*EXPECTED[name]["metadata"], "weightpack.source_dtype"} - left_out
