"""Every model of `models.py` against what llama.cpp's own script makes of it (golden data)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weightpack import open_checkpoint
from weightpack.language.architecture import find
from weightpack.mapping import ArchitecturePlan, MappedTensor

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


def build(tensor: MappedTensor, folder: Path) -> np.ndarray:
    """The tensor in f32, by the rules of the plan."""
    if tensor.values is not None:
        return np.asarray(tensor.values, np.float32)
    (rows,) = tensor.sources
    with open_checkpoint(folder) as checkpoint:
        array = checkpoint.read(rows.name, "float32")
    if rows.interleave is not None:
        groups, parts = rows.interleave.groups, rows.interleave.parts
        size = array.shape[0] // groups // parts
        array = array.reshape(groups, parts, size, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return array if tensor.add is None else array + np.float32(tensor.add)


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
    folder = make_model(tmp_path / name, name)
    found = {}
    for tensor in plan(folder).tensors:
        array = build(tensor, folder)
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        found[tensor.name] = ["F32", list(array.shape), digest]
    assert found == EXPECTED[name]["tensors"]
