"""Names and order of rows, there and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from weightpack.errors import CheckpointError, UnsupportedError
from weightpack.language.host_names import host_names
from weightpack.mapping import Interleave

from .models import CONFIGS, HEADS, KEY_HEADS, shapes
from .test_names import entry, family_of, mapped


def metadata(name: str) -> dict[str, Any]:
    architecture = family_of(name).architecture
    return {
        "general.architecture": architecture,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KEY_HEADS,
    }


def reorder(array: np.ndarray, order: Interleave | None) -> np.ndarray:
    if order is None:
        return array
    return array.reshape(order.groups, order.parts, -1).swapaxes(1, 2).reshape(-1)


@pytest.mark.parametrize("name", CONFIGS)
def test_back_to_where_it_came_from(name: str) -> None:
    there = mapped(name).tensors
    sizes = shapes(CONFIGS[name])
    stored = [entry(tensor.name, sizes[tensor.sources[0].name]) for tensor in there]
    back = host_names(stored, metadata(name)).tensors
    assert [tensor.name for tensor in back] == [tensor.sources[0].name for tensor in there]
    for first, second in zip(there, back, strict=True):
        rows = np.arange(sizes[second.name][0])
        moved = reorder(rows, first.sources[0].interleave)
        assert np.array_equal(reorder(moved, second.sources[0].interleave), rows)
        assert (first.add or 0.0) + (second.add or 0.0) == 0.0


def test_what_a_host_does_not_store() -> None:
    found = host_names([entry("rope_freqs.weight", [16]), entry("output_norm.weight", [64])], metadata("llama2"))
    assert found.left_out == {"rope_freqs.weight": "computed by the host"}
    assert [tensor.name for tensor in found.tensors] == ["model.norm.weight"]


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(UnsupportedError, match='architecture "mamba" are not known'):
        host_names([], {"general.architecture": "mamba"})
    with pytest.raises(UnsupportedError, match=r'for tensor "blk\.0\.ffn_gate_exps\.weight"'):
        host_names([entry("blk.0.ffn_gate_exps.weight", [4, 4, 4])], metadata("llama2"))
    with pytest.raises(UnsupportedError, match=r"head_count is \[8, 8\]"):
        host_names([], {**metadata("llama2"), "llama.attention.head_count": [8, 8]})
    wrong = replace(entry("blk.0.attn_q.weight", [24, 4]))
    with pytest.raises(CheckpointError, match="24 rows are not 8 heads"):
        host_names([wrong], metadata("llama2"))
