"""Encoding of the IQ types that stand on grids, against ggml's own C: the same bytes over sources and
importance vectors of many kinds. The first use of a type takes ggml up to twelve seconds.

| difference | reason |
|---|---|
| IQ3_S: weights behind a run of 32 zeros | ggml forgets to step over the run: its block decodes to something else |
| sources whose squares leave the float32 range | ggml stops the process |
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import weightpack as wp
from weightpack.errors import UnsupportedError

from ..weighted import quantize
from .ggml import ENCODED_ON_GRIDS as TYPES
from .ggml import NEED_IMPORTANCE, Ggml
from .test_ggml_search import BLOCK, IMPORTANCE, SOURCES

OVERFLOWING = ("squares_overflow", "huge")


def stands_behind_zeros(blocks: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which blocks have weights behind a run of zeros."""
    runs = (blocks.reshape(-1, 8, 32) != 0).any(axis=2)
    gap_before = np.logical_or.accumulate(~runs, axis=1)
    found: NDArray[np.bool_] = (runs & gap_before).any(axis=1)
    return found


def compare(ggml: Ggml, name: str, source: str, importance: str, columns: int, rows: int) -> None:
    rng = np.random.default_rng([columns, rows])
    array = np.ascontiguousarray(SOURCES[source](rng, (rows, columns)), np.float32)
    counts = IMPORTANCE[importance](rng, columns)
    if counts is None and name in NEED_IMPORTANCE:
        return
    mine = quantize(f"gguf:{name.lower()}", array, counts)
    theirs = ggml.quantize(name, array, counts)
    block = ggml.traits(name).block_bytes
    different = (mine.reshape(-1, block) != theirs.reshape(-1, block)).any(axis=1)
    if name == "IQ3_S":
        different &= ~stands_behind_zeros(array)
    wrong = np.flatnonzero(different)
    assert not wrong.size, f"{wrong.size} of {mine.size // block} blocks differ, first {wrong[0]}"


@pytest.mark.llama
@pytest.mark.parametrize("importance", IMPORTANCE)
@pytest.mark.parametrize("source", [source for source in SOURCES if source not in OVERFLOWING])
@pytest.mark.parametrize("name", TYPES)
def test_bytes(ggml: Ggml, name: str, source: str, importance: str) -> None:
    compare(ggml, name, source, importance, 7 * BLOCK, 5)


@pytest.mark.llama
@pytest.mark.parametrize("name", TYPES)
def test_a_thousand_blocks(ggml: Ggml, name: str) -> None:
    for source in ("normal", "heavy", "ties"):
        compare(ggml, name, source, "none", 8 * BLOCK, 60)
        compare(ggml, name, source, "random", 8 * BLOCK, 60)


@pytest.mark.llama
def test_runs_of_zeros_in_iq3_s(ggml: Ggml) -> None:
    """Where the bytes differ, ours decode to the source and ggml's do not."""
    weights = np.random.default_rng(3).standard_normal((1, BLOCK)).astype(np.float32)
    weights[:, 32:64] = 0
    mine = wp.dequantize(quantize("gguf:iq3_s", weights, None), "gguf:iq3_s")
    theirs = ggml.dequantize("IQ3_S", ggml.quantize("IQ3_S", weights))
    assert np.abs(mine - weights).mean() < 0.25
    assert np.abs(theirs - weights).mean() > 0.7


@pytest.mark.parametrize("source", OVERFLOWING)
@pytest.mark.parametrize("name", TYPES)
def test_squares_beyond_float32_are_encoded_to_something(name: str, source: str) -> None:
    array = np.ascontiguousarray(SOURCES[source](np.random.default_rng(5), (20, BLOCK)), np.float32)
    for importance in ("ones", "skewed"):
        counts = IMPORTANCE[importance](np.random.default_rng(6), BLOCK)
        once = quantize(f"gguf:{name.lower()}", array, counts, threads=1)
        assert np.array_equal(once, quantize(f"gguf:{name.lower()}", array, counts, threads=3))
        assert wp.dequantize(once, f"gguf:{name.lower()}").shape == array.shape


@pytest.mark.parametrize("name", NEED_IMPORTANCE)
def test_types_that_need_importance_say_so(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"gguf:{name.lower()}: is encoded with an importance vector only"):
        wp.quantize(np.zeros((1, BLOCK), np.float32), f"gguf:{name.lower()}")
