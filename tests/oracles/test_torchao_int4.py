"""torchao's packed 4-bit weights: against torchao with MSLK's functions, where these are (`int4_peer`; golden
vectors of them are always compared), and against the formula in float64.

Differences that are meant to be:

| case | peer | weightpack |
|---|---|---|
| a group of zeros in float16 | decodes to 2^-24 | to zeros: the zero point is 8 times the stored scale |
| weights that are not finite, or a range that is not | scales of infinity or NaN | refused |
| an odd group size | packed | refused |
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weightpack as wp
from weightpack.errors import ConfigError, FormatError

from . import int4_peer
from .rows8 import DTYPES, KINDS, assert_equal, tensor_of

NAME = "torchao:int4"
SHAPES = (
    ((1, 16), 2), ((3, 48), 16), ((5, 80), 40), ((4, 1000), 8), ((2, 2736), 48), ((1, 4304), 16), ((130, 66), 66),
    ((9, 768), 128), ((70, 512), 32),
)  # fmt: skip
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Relative error of rounding to a type."""


@pytest.fixture(scope="module")
def torch(peer):
    peer("torchao")
    return peer("torch")


def narrowed(torch, kind, shape, dtype, seed=0):
    """A tensor of a named kind whose range float32 holds in every group."""
    tensor = tensor_of(torch, kind, shape, dtype, seed, 7.5)
    return tensor / 4 if kind == "huge" and dtype != "float16" else tensor


def codes_of(torch, qdata):
    """[N, K/2] bytes as signed codes [N, K], the low half of a byte first."""
    signed = qdata.view(torch.int8).to(torch.int16)
    halves = torch.stack([((signed & 15) ^ 8) - 8, signed >> 4], -1)
    return halves.reshape(len(qdata), -1)


def across(array, group):
    """[K/g, N] as a number for each weight [N, K]."""
    return array.t().repeat_interleave(group, 1)


def check_peer(torch, tensor, group):
    theirs = int4_peer.packed(tensor, group)
    arrays = {name: getattr(theirs, name) for name in ("qdata", "scale", "zero_point")}
    if tensor.dtype == torch.float16:
        empty = ~tensor.reshape(len(tensor), -1, group).any(-1).t()
        arrays["zero_point"] = torch.where(empty, arrays["scale"] * 8, arrays["zero_point"])
    assert_equal(torch, wp.quantize(tensor, NAME, block_size=group), arrays)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes(torch, dtype):
    for kind in KINDS:
        for shape, group in SHAPES:
            check_peer(torch, narrowed(torch, kind, shape, dtype), group)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 9),
    half=st.integers(1, 70),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_bytes_of_any_group(torch, rows, groups, half, kind, dtype, seed):
    check_peer(torch, narrowed(torch, kind, (rows, groups * half * 2), dtype, seed), half * 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_formula(torch, dtype):
    """Scales and zero points are the formula's, rounded, and each code is one of the nearest."""
    stored, unit = getattr(torch, dtype), UNIT[dtype]
    for kind in KINDS:
        for shape, group in SHAPES:
            tensor = narrowed(torch, kind, shape, dtype)
            parts = wp.quantize(tensor, NAME, block_size=group)
            assert {name: part.dtype for name, part in parts.items()} == {
                "qdata": torch.int8, "scale": stored, "zero_point": stored,
            }  # fmt: skip
            assert parts["scale"].shape == parts["zero_point"].shape == (shape[1] // group, shape[0])
            runs = tensor.double().reshape(shape[0], -1, group)
            least, greatest = runs.amin(-1).t(), runs.amax(-1).t()
            scale = (greatest - least).clamp(min=1e-6) / 15
            zero = least + 8 * scale
            near = (unit + 2.0**-22) * 1.01
            tiny = float(torch.finfo(stored).smallest_normal) * 2 * unit
            # What is rounded on the way is rounded as the largest number of the sum is.
            largest = torch.maximum(least.abs(), zero.abs()) + 8 * scale
            assert ((parts["scale"].double() - scale).abs() <= scale * near + tiny).all()
            assert (
                (parts["zero_point"].double() - zero).abs() <= zero.abs() * near + largest * 2.0**-22 + 9 * tiny
            ).all()
            codes = codes_of(torch, parts["qdata"]).double()
            assert -8 <= codes.min() <= codes.max() <= 7
            exact = (tensor.double() - across(least, group)) / across(scale, group) - 8
            assert ((codes - exact).abs() <= 0.5 + 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_is_one_product_and_one_sum(torch, dtype):
    for kind in KINDS:
        for shape, group in SHAPES:
            parts = wp.quantize(narrowed(torch, kind, shape, dtype, 1), NAME, block_size=group)
            product = codes_of(torch, parts["qdata"]).float() * across(parts["scale"].float(), group)
            expected = product + across(parts["zero_point"].float(), group)
            for wanted in (torch.float32, torch.bfloat16, torch.float16):
                decoded = wp.dequantize(parts, NAME, dtype=wanted, block_size=group)
                assert torch.equal(decoded, expected.to(wanted))


def test_every_tie(torch):
    """Quotients that are whole numbers and a half, and their neighbours, at scales of all sizes."""
    ties = torch.cat([torch.tensor([0.0, 15.0]), torch.arange(0, 15, 0.5)])
    for step in (-10, -3, 0, 5):
        for less in (0.0, 4.0, 15.0):
            weight = ((ties - less) * 2.0**step).repeat(3, 1)
            weight[1, 2:] = torch.nextafter(weight[1, 2:], torch.full((), -torch.inf))
            weight[2, 2:] = torch.nextafter(weight[2, 2:], torch.full((), torch.inf))
            weight = weight.clamp(weight[0, 0], weight[0, 1])
            codes = codes_of(torch, wp.quantize(weight, NAME, block_size=32)["qdata"]) + 8
            expected = ((weight - weight[:, :1]) / 2.0**step).round()
            assert torch.equal(codes.float(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_are_zeros(torch, dtype):
    for sign in (1.0, -1.0):
        weight = torch.randn(3, 256).to(getattr(torch, dtype))
        weight[1, 128:] = 0.0 * sign
        parts = wp.quantize(weight, NAME)
        assert all(torch.isfinite(parts[name]).all() for name in ("scale", "zero_point"))
        decoded = wp.dequantize(parts, NAME)
        assert not decoded[1, 128:].any()
        assert decoded[1, :128].any()


def test_one_number_is_that_number():
    for value in (3.0, -2.5, 1e-4):
        weight = np.full((2, 64), value, np.float32)
        decoded = wp.dequantize(wp.quantize(weight, NAME, block_size=32), NAME, block_size=32)
        np.testing.assert_allclose(decoded, weight, rtol=1e-5)


def test_any_number_of_threads_gives_the_same(torch):
    weight = torch.randn(513, 2048).bfloat16()
    first = wp.quantize(weight, NAME, threads=1)
    decoded = wp.dequantize(first, NAME, threads=1)
    for threads in (2, 3):
        assert_equal(torch, wp.quantize(weight, NAME, threads=threads), first)
        assert torch.equal(wp.dequantize(first, NAME, threads=threads), decoded)


def test_what_is_refused():
    weight = np.ones((4, 48), np.float32)
    for shape in ((256,), (2, 2, 256)):
        with pytest.raises(FormatError, match="2 dimensions"):
            wp.quantize(np.ones(shape, np.float32), NAME)
    for size, error, message in (
        (None, FormatError, "row of 48 weights is not a multiple of block_size 128"),
        (32, FormatError, "row of 48 weights is not a multiple of block_size 32"),
        (3, ConfigError, "block_size is 3, expected an even number"),
        (0, ConfigError, "block_size is 0, expected an even number"),
    ):
        with pytest.raises(error, match=message):
            wp.quantize(weight, NAME, block_size=size)
    weight[1, 5] = np.inf
    with pytest.raises(FormatError, match="weight 53 is inf"):
        wp.quantize(weight, NAME, block_size=16)
    weight[1, 5] = 3e38
    weight[1, 7] = -3e38
    with pytest.raises(FormatError, match=r"weights 48\.\.64 are from -3e38 to 3e38, a range that F32 does not hold"):
        wp.quantize(weight, NAME, block_size=16)
