"""Encoders without a search, against ggml's own C and, where it has the type, gguf-py: the ternary types
and the microscaling ones.

Left out of the comparison: TQ1_0, TQ2_0 and Q2_0 blocks whose scale is so small that its inverse is
infinite. ggml then converts an infinite number to an integer, which C does not define; here they
decode to zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import weightpack as wp

from .ggml import ENCODED_SIMPLY, Ggml, block_of
from .test_gguf import KINDS, weights

SHAPES = ((1, 256), (3, 768), (37, 2816), (5, 8192))


def near_powers_of_two() -> NDArray[np.float32]:
    """A block of 32 for each number next to a power of two, that number being its largest."""
    powers = np.float32(2) ** np.arange(-149, 128, dtype=np.float32)
    steps = np.arange(-64, 3, dtype=np.int64)
    bits = (powers.view(np.int32).astype(np.int64)[:, None] + steps).clip(1, 0x7F7F_FFFF)
    most = bits.astype(np.int32).view(np.float32).reshape(-1)
    blocks = np.random.default_rng(3).uniform(-1, 1, (most.size, 32)).astype(np.float32) * most[:, None]
    blocks[:, 5] = -most
    return blocks[: most.size // 8 * 8].reshape(-1, 256)


def near_scales() -> NDArray[np.float32]:
    """Blocks whose NVFP4 scale is next to a tie or to the end of its range, and weights next to ties."""
    rng = np.random.default_rng(4)
    scales = np.concatenate([np.arange(0, 64) / 1024, np.arange(8, 17) / 512, np.arange(14, 480) / 16])
    most = np.concatenate([scales, np.nextafter(scales.astype(np.float32), 0), scales * (1 + 2**-20)]) * 6
    most = np.append(most, [1e4, 1e6, 1e9, 3e38]).astype(np.float32)
    halves = rng.integers(-24, 25, (most.size, 256)).astype(np.float32) / 24
    blocks = halves * most[:, None]
    blocks[:, ::16] = most[:, None]
    return np.where(rng.random(blocks.shape) < 0.3, np.nextafter(blocks, np.float32(0)), blocks)


def steps_of(scale: float) -> NDArray[np.float32]:
    """Multiples of a quarter of `scale` and their neighbours, with 4 and 6 times `scale` in each 16."""
    rng = np.random.default_rng(5)
    exact = rng.integers(-24, 25, (200, 256)).astype(np.float32) * np.float32(scale / 4)
    nudge = rng.integers(-1, 2, exact.shape).astype(np.float32)
    blocks = np.where(nudge == 0, exact, np.nextafter(exact, nudge * np.float32(3e38)))
    blocks[:, ::16], blocks[:, 3::16] = 6 * scale, -4 * scale
    return blocks.astype(np.float32)


def inputs() -> dict[str, list[NDArray[np.float32]]]:
    kinds = {kind: [weights(kind, *shape, seed=shape[1]) for shape in SHAPES] for kind in KINDS}
    kinds["near powers of two"] = [near_powers_of_two()]
    kinds["near scales"] = [near_scales()]
    kinds["steps"] = [steps_of(1), steps_of(2.0**-7), steps_of(0.375), steps_of(2.0**-20)]
    kinds["subnormal"] = [weights("normal", 5, 1024) * np.float32(1e-38)]
    kinds["one weight"] = [np.eye(256, dtype=np.float32) * np.float32(-0.7)]
    return kinds


INPUTS = inputs()


def assert_same_blocks(name: str, array: NDArray[np.float32], expected: NDArray[np.uint8]) -> None:
    ours = wp.quantize(array, f"gguf:{name.lower()}")[""]
    assert ours.shape == expected.shape
    weights_per_block, size = block_of(name)
    ours, expected = ours.reshape(-1, size), expected.reshape(-1, size)
    if name in ("TQ1_0", "TQ2_0", "Q2_0"):
        most = np.abs(array.reshape(-1, weights_per_block)).max(axis=1)
        with np.errstate(all="ignore"):
            is_defined = (most == 0) | np.isfinite(np.float32(1) / most)
        assert not wp.dequantize(ours[~is_defined], f"gguf:{name.lower()}").any()
        ours, expected = ours[is_defined], expected[is_defined]
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.llama
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", ENCODED_SIMPLY)
def test_ggml_gives_the_same_bytes(ggml: Ggml, name: str, kind: str) -> None:
    for array in INPUTS[kind]:
        assert_same_blocks(name, array, ggml.quantize(name, array))
        importance = np.random.default_rng(6).uniform(0, 2, array.shape[1])
        np.testing.assert_array_equal(ggml.quantize(name, array), ggml.quantize(name, array, importance))


@pytest.mark.parametrize("kind", ["normal", "heavy", "zeros", "sparse", "constant", "ties", "mixed", "steps"])
@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "MXFP4"])
def test_gguf_py_gives_the_same_bytes(peer: Callable[[str], ModuleType], name: str, kind: str) -> None:
    gguf = peer("gguf")
    for array in INPUTS[kind]:
        with np.errstate(all="ignore"):
            expected = gguf.quants.quantize(array, gguf.GGMLQuantizationType[name])
        assert_same_blocks(name, array, expected)


@pytest.mark.parametrize("name", ENCODED_SIMPLY)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_and_threads_change_nothing(name: str, dtype: Any) -> None:
    array = weights("heavy", 300, 2048).astype(dtype)
    with np.errstate(all="ignore"):
        expected = wp.quantize(array.astype(np.float32), f"gguf:{name.lower()}", threads=1)[""]
    for threads in (1, 2, 5):
        ours = wp.quantize(array, f"gguf:{name.lower()}", threads=threads)[""]
        np.testing.assert_array_equal(ours, expected)
