"""Against the live gguf-py: blocks on the way in, weights on the way out.

Differences that are meant to be, each with a test of its own below:

| case | peer | weightpack |
|---|---|---|
| block of zeros opening with -0, Q4_0 and Q5_0 | d = +0 | d = -0, as ggml |
| m is zero, and zeros of both signs are in the block | sign depends on numpy's build | that of the first, as ggml |
| d so small that 1/d is infinite | undefined | decodes to zeros (to m) |
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weightpack as wp
from weightpack.errors import FormatError

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
STEPS = {"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 127}


@pytest.fixture(scope="module")
def gguf(peer):
    return peer("gguf")


def weights(kind, rows, row_weights, seed=0):
    """float32 numbers of a named kind."""
    rng = np.random.default_rng(seed)
    shape = (rows, row_weights)
    normal = rng.standard_normal(shape).astype(np.float32)
    if kind == "normal":
        return normal * np.float32(0.02)
    if kind == "heavy":
        return rng.standard_t(2, shape).astype(np.float32)
    if kind == "zeros":
        return np.zeros(shape, np.float32)
    if kind == "sparse":
        return np.where(rng.random(shape) < 0.02, normal, np.float32(0)).astype(np.float32)
    if kind == "signed_zeros":
        zeros = np.where(rng.random(shape) < 0.5, np.float32(-0.0), np.float32(0))
        zeros[:, ::32] = 0
        return np.where(rng.random(shape) < 0.05, normal, zeros).astype(np.float32)
    if kind == "positive":
        return np.where(rng.random(shape) < 0.3, np.float32(-0.0), np.abs(normal)).astype(np.float32)
    if kind == "constant":
        return np.full(shape, -0.3, np.float32)
    if kind == "ties":
        # Multiples of half a step of every type, with both extremes in each block.
        step = rng.choice([15.0, 31.0, 8.0, 16.0, 127.0], size=(rows, row_weights // 32, 1))
        halves = rng.integers(-254, 255, (rows, row_weights // 32, 32)) / 2
        halves = np.clip(halves, -step, step)
        halves[..., 7], halves[..., 9] = step[..., 0], -step[..., 0]
        return halves.reshape(shape).astype(np.float32)
    if kind == "tiny":
        return normal * np.float32(1e-36)
    if kind == "huge":
        return np.clip(normal, -3, 3) * np.float32(5e37)
    assert kind == "mixed"
    return normal * np.float32(2) ** rng.integers(-30, 15, shape).astype(np.float32)


KINDS = (
    "normal",
    "heavy",
    "zeros",
    "sparse",
    "signed_zeros",
    "positive",
    "constant",
    "ties",
    "tiny",
    "huge",
    "mixed",
)


def theirs(gguf, array, name):
    with np.errstate(all="ignore"):
        return gguf.quants.quantize(array, gguf.GGMLQuantizationType[name])


def is_defined(array, name):
    """Blocks that the peer defines: the inverse of their scale is finite, or the scale is zero."""
    blocks = array.reshape(*array.shape[:-1], -1, 32)
    least, most = blocks.min(axis=-1), blocks.max(axis=-1)
    with np.errstate(all="ignore"):
        reach = most - least if name.endswith("_1") else np.maximum(abs(least), abs(most))
        scale = (reach / np.float32(STEPS[name])).astype(np.float32)
        return np.isfinite(reach) & ((scale == 0) | np.isfinite(np.float32(1) / scale))


def assert_equal_where_defined(gguf, array, name):
    ours = wp.quantize(array, name.lower())[""]
    expected = theirs(gguf, array, name)
    assert ours.dtype == np.uint8
    assert ours.shape == expected.shape
    blocks = is_defined(array, name)
    ours, expected = (stored.reshape(*blocks.shape, -1)[blocks] for stored in (ours, expected))
    if name.endswith("_1"):
        ours, expected = without_sign_of_zero_m(ours), without_sign_of_zero_m(expected)
    np.testing.assert_array_equal(ours, expected)


def without_sign_of_zero_m(blocks):
    blocks = blocks.copy()
    m = np.ascontiguousarray(blocks[:, 2:4]).view(np.float16)
    blocks[:, 2:4] = np.where(m == 0, np.float16(0), m).view(np.uint8)
    return blocks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TYPES)
def test_blocks(gguf, name, kind):
    for rows, row_weights in ((1, 32), (3, 96), (5, 2752), (2, 4320), (17, 1024)):
        assert_equal_where_defined(gguf, weights(kind, rows, row_weights, rows), name)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 9),
    name=st.sampled_from(TYPES),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
)
def test_blocks_of_any_shape(gguf, rows, blocks, name, kind, seed):
    assert_equal_where_defined(gguf, weights(kind, rows, 32 * blocks, seed), name)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_blocks_of_other_floats(gguf, peer, name, dtype):
    import ml_dtypes

    source = weights("heavy", 7, 320).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    ours = wp.quantize(source, name.lower())[""]
    np.testing.assert_array_equal(ours, theirs(gguf, source.astype(np.float32), name))


@pytest.mark.parametrize("name", TYPES)
def test_any_bytes_decode_as_the_peer_decodes_them(gguf, name):
    rng = np.random.default_rng(1)
    qtype = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[qtype]
    data = rng.integers(0, 256, (50, 6 * size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, qtype)
    ours = wp.dequantize(data, name.lower())
    assert ours.shape == (50, 6 * block)
    # Payloads of NaN aside.
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(ours), ~numbers)
    np.testing.assert_array_equal(ours.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0"])
def test_block_of_negative_zeros_follows_ggml(gguf, name):
    zeros = np.full((1, 32), -0.0, np.float32)
    ours = wp.quantize(zeros, name.lower())[""]
    expected = theirs(gguf, zeros, name)
    assert ours[0, :2].tolist() == [0, 0x80]
    assert expected[0, :2].tolist() == [0, 0]
    np.testing.assert_array_equal(ours[0, 2:], expected[0, 2:])
    np.testing.assert_array_equal(ours, wp.quantize(-zeros, name.lower())[""])


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_the_first_of_two_zeros_gives_m(name):
    block = np.array([[3.0, -0.0, 0.0] + [1.0] * 29], np.float32)
    assert wp.quantize(block, name.lower())[""][0, 2:4].tolist() == [0, 0x80]
    assert wp.quantize(abs(block), name.lower())[""][0, 2:4].tolist() == [0, 0]


@pytest.mark.parametrize("name", TYPES)
def test_blocks_of_vanishing_scale_decode_to_zeros(name):
    tiny = np.random.default_rng(0).integers(-50, 50, (4, 64)).astype(np.float32) * np.float32(1e-45)
    decoded = wp.dequantize(wp.quantize(tiny, name.lower()), name.lower())
    assert not decoded.any()


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_casts(gguf, peer, name):
    bits = np.random.default_rng(2).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    numbers = bits.view(np.float32)
    numbers = np.concatenate([numbers[np.isfinite(numbers)], weights("ties", 40, 320).ravel(), [0, -0.0, 65504, 65520]])
    numbers = numbers.astype(np.float32)
    ours = wp.quantize(numbers, name.lower())[""]
    expected = theirs(gguf, numbers.reshape(1, -1), name)
    assert ours.tobytes() == expected.tobytes()
    torch = peer("torch")
    dtype = torch.float16 if name == "F16" else torch.bfloat16
    assert ours.tobytes() == torch.from_numpy(numbers).to(dtype).view(torch.uint8).numpy().tobytes()
    again = wp.dequantize(ours, name.lower())
    assert again.tobytes() == torch.from_numpy(numbers).to(dtype).float().numpy().tobytes()


def test_rows_of_partial_blocks_are_refused():
    with pytest.raises(FormatError, match="q8_0: row of 48 weights is not a multiple of block_size 32"):
        wp.quantize(np.zeros((2, 48), np.float32), "gguf:q8_0")
    with pytest.raises(FormatError, match="weight 40 is inf"):
        wp.quantize(np.where(np.arange(64) == 40, np.inf, 0).astype(np.float32), "q4_0")
