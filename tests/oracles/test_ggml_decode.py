"""Decoding of every GGUF block type: bit for bit what ggml's own C gives (marker `llama`) and what
gguf-py gives, over random codes and every kind of scale; and what follows from that for other output
types, for parts of a tensor and for threads.
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
from weightpack.errors import UnsupportedError

from .ggml import BLOCK_TYPES, Ggml, block_of, put_scales

UNKNOWN_TO_GGUF_PY = ("Q1_0", "Q2_0", "Q8_1", "Q8_K")

KINDS = ("ordinary", "subnormal", "large", "any bits", "infinite")


def random_blocks(name: str, kind: str, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """[count, block bytes] of random codes, the scales of a named kind."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    blocks = rng.integers(0, 256, (count, block_of(name)[1]), dtype=np.uint8)
    if kind == "any bits":
        return blocks
    sign = rng.choice(np.array([-1, 1], np.float32), count)
    scales = {
        "ordinary": 2.0 ** rng.uniform(-12, -2, count),
        "subnormal": rng.integers(0, 1024, count) * 2.0**-24,
        "large": rng.uniform(1000, 65504, count),
        "infinite": np.full(count, np.inf),
    }[kind]
    put_scales(name, blocks, (sign * scales).astype(np.float16))
    return blocks


def assert_same_bits(ours: NDArray[Any], expected: NDArray[Any]) -> None:
    """Equal bits; the payloads of NaN aside."""
    expected = expected.reshape(ours.shape)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    bits = np.uint32 if ours.itemsize == 4 else np.uint16
    different = (ours.view(bits) != expected.view(bits)) & ~nan
    assert not different.any(), f"{different.sum()} of {different.size}, first at {np.argwhere(different)[0]}"


@pytest.mark.llama
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in BLOCK_TYPES if name != "Q8_1"])
def test_ggml_gives_the_same_bits(ggml: Ggml, name: str, kind: str) -> None:
    # Enough for every point of the largest grid.
    blocks = random_blocks(name, kind, 3000)
    assert_same_bits(wp.dequantize(blocks, f"gguf:{name.lower()}"), ggml.dequantize(name, blocks))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in BLOCK_TYPES if name not in UNKNOWN_TO_GGUF_PY])
def test_gguf_py_gives_the_same_bits(peer: Callable[[str], ModuleType], name: str, kind: str) -> None:
    gguf = peer("gguf")
    blocks = random_blocks(name, kind, 700, seed=1)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert_same_bits(wp.dequantize(blocks, f"gguf:{name.lower()}"), expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", ["ordinary", "subnormal", "large", "any bits"])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_16_bits_are_the_rounded_32(name: str, kind: str, dtype: Any) -> None:
    blocks = random_blocks(name, kind, 200, seed=2)
    with np.errstate(all="ignore"):
        expected = wp.dequantize(blocks, f"gguf:{name.lower()}").astype(dtype)
    assert_same_bits(wp.dequantize(blocks, f"gguf:{name.lower()}", dtype=dtype), expected)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_parts_threads_and_shapes_change_nothing(name: str) -> None:
    form = f"gguf:{name.lower()}"
    weights, size = block_of(name)
    for rows, columns in ((1, 1), (3, 1), (2, 5), (7, 11), (1030, 256 // weights * 5)):
        blocks = random_blocks(name, "ordinary", rows * columns, seed=rows).reshape(rows, columns * size)
        whole = wp.dequantize(blocks, form, threads=1)
        assert whole.shape == (rows, columns * weights)
        for threads in (2, 5, None):
            assert_same_bits(wp.dequantize(blocks, form, threads=threads), whole)
        for first, last in ((0, 1), (rows // 2, rows), (rows - 1, rows)):
            assert_same_bits(wp.dequantize(blocks[first:last], form), whole[first:last])
        out = np.full(whole.shape, np.nan, np.float32)
        assert wp.dequantize(blocks, form, out=out) is out
        assert_same_bits(out, whole)


def test_types_that_are_decoded_only_say_so() -> None:
    decoded_only = [info.name for info in wp.formats() if info.encodes == "never"]
    for name in decoded_only:
        with pytest.raises(UnsupportedError, match=f"{name}: is decoded, and not encoded"):
            wp.quantize(np.zeros((1, 256), np.float32), name)


def test_q8_1_is_a_product() -> None:
    """No peer decodes it."""
    blocks = random_blocks("Q8_1", "ordinary", 50)
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    assert_same_bits(wp.dequantize(blocks, "gguf:q8_1"), blocks[:, 4:].view(np.int8).astype(np.float32) * scales)
