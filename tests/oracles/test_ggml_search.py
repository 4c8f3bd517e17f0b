"""Encoding of the types whose encoder searches for scales, against ggml's own C: the same bytes over
sources and importance vectors of many kinds. No differences are tolerated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from ..weighted import quantize
from .ggml import ENCODED_BY_IMPORTANCE as TYPES
from .ggml import SEARCHED_BY_IMPORTANCE, Ggml

pytestmark = pytest.mark.llama

Floats = NDArray[np.float32]

BLOCK = 256


def normal(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    return rng.standard_normal(shape).astype(np.float32)


def ties(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Multiples of half a step of some code range, both extremes in each run of 16."""
    levels = rng.choice([3, 4, 7.5, 15, 16, 31, 32, 63], (shape[0], shape[1] // 16, 1))
    halves = np.round(rng.uniform(-2, 2, (shape[0], shape[1] // 16, 16)) * levels) / 2
    halves[..., 3:4], halves[..., 12:13] = levels, -levels
    return halves.reshape(shape).astype(np.float32)


def with_outliers(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """One weight in some forty is up to 10000 times as large as the others."""
    sizes = np.where(rng.random(shape) < 0.025, 10.0 ** rng.uniform(0, 4, shape), 1)
    return (rng.standard_normal(shape) * sizes).astype(np.float32)


def mixed(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Every run of 16 has a scale of its own, from 2^-40 to 2^20."""
    scales = 2.0 ** rng.integers(-40, 20, (shape[0], shape[1] // 16))
    return (rng.standard_normal(shape) * np.repeat(scales, 16, axis=1)).astype(np.float32)


def sparse(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Mostly zeros of both signs, whole runs of them too."""
    runs = np.repeat(rng.random((shape[0], shape[1] // 16)) < 0.4, 16, axis=1)
    zeros = np.where(rng.random(shape) < 0.5, np.float32(-0.0), np.float32(0))
    return np.where(runs & (rng.random(shape) < 0.3), normal(rng, shape), zeros).astype(np.float32)


def constant_runs(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    return np.repeat(normal(rng, (shape[0], shape[1] // 16)), 16, axis=1)


def rounded(dtype: str) -> Callable[[np.random.Generator, tuple[int, int]], Floats]:
    def make(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
        import ml_dtypes

        kind = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
        return (normal(rng, shape) * np.float32(0.03)).astype(kind).astype(np.float32)

    return make


SOURCES: dict[str, Callable[[np.random.Generator, tuple[int, int]], Floats]] = {
    "normal": lambda rng, shape: normal(rng, shape) * np.float32(0.02),
    "bf16": rounded("bf16"),
    "f16": rounded("f16"),
    "heavy": lambda rng, shape: rng.standard_t(2, shape).astype(np.float32),
    "very_heavy": lambda rng, shape: np.clip(rng.standard_cauchy(shape) ** 3, -1e15, 1e15).astype(np.float32),
    "ties": ties,
    "outliers": with_outliers,
    "mixed": mixed,
    "sparse": sparse,
    "zeros": lambda rng, shape: np.zeros(shape, np.float32),
    "minus_zeros": lambda rng, shape: np.full(shape, -0.0, np.float32),
    "constant": lambda rng, shape: np.full(shape, -0.3, np.float32),
    "constant_runs": constant_runs,
    "positive": lambda rng, shape: np.abs(normal(rng, shape)) + np.float32(0.5),
    "negative": lambda rng, shape: -np.abs(normal(rng, shape)) - np.float32(0.5),
    "few_values": lambda rng, shape: rng.choice(np.float32([-1, 0, 0.5, 1]), shape),
    "one_in_a_run": lambda rng, shape: np.where(rng.random(shape) < 1 / 24, normal(rng, shape), 0).astype(np.float32),
    "tiny": lambda rng, shape: normal(rng, shape) * np.float32(1e-14),
    "below_epsilon": lambda rng, shape: normal(rng, shape) * np.float32(3e-16),
    "subnormal": lambda rng, shape: normal(rng, shape) * np.float32(1e-40),
    "about_2^-126": lambda rng, shape: normal(rng, shape) * np.float32(1e-37),
    "large": lambda rng, shape: normal(rng, shape) * np.float32(1e6),
    "squares_overflow": lambda rng, shape: normal(rng, shape) * np.float32(1e19),
    "huge": lambda rng, shape: np.clip(normal(rng, shape), -3, 3) * np.float32(1e38),
}

IMPORTANCE: dict[str, Callable[[np.random.Generator, int], Floats | None]] = {
    "none": lambda rng, columns: None,
    "ones": lambda rng, columns: np.ones(columns, np.float32),
    "random": lambda rng, columns: rng.uniform(0, 2, columns).astype(np.float32),
    "skewed": lambda rng, columns: (10.0 ** rng.uniform(-6, 6, columns)).astype(np.float32),
    "some_zeros": lambda rng, columns: np.where(rng.random(columns) < 0.5, 0, rng.random(columns)).astype(np.float32),
    "few": lambda rng, columns: np.where(rng.random(columns) < 0.05, 1, 0).astype(np.float32),
    "zeros": lambda rng, columns: np.zeros(columns, np.float32),
}


def compare(ggml: Ggml, name: str, source: str, importance: str, columns: int, rows: int) -> None:
    rng = np.random.default_rng([columns, rows])
    array = np.ascontiguousarray(SOURCES[source](rng, (rows, columns)), np.float32)
    counts = IMPORTANCE[importance](rng, columns)
    mine = quantize(f"gguf:{name.lower()}", array, counts)
    theirs = ggml.quantize(name, array, counts)
    block = ggml.traits(name).block_bytes
    wrong = np.flatnonzero((mine.reshape(-1, block) != theirs.reshape(-1, block)).any(axis=1))
    assert not wrong.size, f"{wrong.size} of {mine.size // block} blocks differ, first {wrong[0]}"


CASES = [
    (name, importance)
    for name in TYPES
    for importance in IMPORTANCE
    if importance != "none" or name not in SEARCHED_BY_IMPORTANCE
]
"""Without importance, types that do not search then are in `test_ggml.py`, less what ggml leaves undefined."""


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("name", "importance"), CASES)
def test_bytes(ggml: Ggml, name: str, source: str, importance: str) -> None:
    """Rows of 7 blocks (tiles hold parts of several) and of 32."""
    compare(ggml, name, source, importance, 7 * BLOCK, 31)
    compare(ggml, name, source, importance, 32 * BLOCK, 4)


@pytest.mark.parametrize("name", TYPES)
def test_thousands_of_blocks(ggml: Ggml, name: str) -> None:
    for source in ("normal", "bf16", "heavy", "ties"):
        compare(ggml, name, source, "none", 8 * BLOCK, 500)
        compare(ggml, name, source, "random", 8 * BLOCK, 250)
