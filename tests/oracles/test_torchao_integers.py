"""Against the live torchao: integers and float8 in groups, and float8 with one scale for the tensor.

Differences that are meant to be:

| case | peer | weightpack |
|---|---|---|
| intx1 | nearly all codes are 0 | decoded only |
| float8 group whose scale is 0 | its zeros are stored as NaN | codes 0, the scale the smallest normal number |
| float8 tensor whose scale is 0 | its zeros are stored as NaN | scale 1, codes of zero |
| a matrix of one column, grouped by rows | not packed (an error about shapes) | packed |
| weights that are not finite | the largest code, or NaN | refused |
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weightpack as wp
from weightpack.errors import ConfigError, FormatError, UnsupportedError

from .rows8 import DTYPES, KINDS, as_bytes, assert_equal, tensor_of

INTX = [f"torchao:intx{bits}" for bits in range(2, 9)]
FORMS = [*INTX, "torchao:int8", "torchao:float8", "torchao:float8_tensor"]
GROUPED = FORMS[:-1]
SHAPES = ((1, 16), (3, 48), (5, 80), (4, 1000), (2, 2736), (1, 4304), (130, 34))


@pytest.fixture(scope="module")
def torch(peer):
    peer("torchao")
    return peer("torch")


def packed_by_torchao(torch, name, tensor, group):
    """The weight of a linear layer as torchao packs it, and its arrays."""
    import torchao.quantization as ao

    if name == "torchao:float8_tensor":
        config = ao.Float8WeightOnlyConfig(granularity=ao.PerTensor())
    elif name == "torchao:float8":
        config = ao.Float8WeightOnlyConfig(granularity=ao.PerRow() if group is None else ao.PerGroup(group))
    elif name == "torchao:int8":
        config = ao.Int8WeightOnlyConfig(granularity=ao.PerRow() if group is None else ao.PerGroup(group))
    else:
        granularity = ao.PerAxis(0) if group is None else ao.PerGroup(group)
        config = ao.IntxWeightOnlyConfig(getattr(torch, name.removeprefix("torchao:").replace("x", "")), granularity)
    layer = torch.nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, dtype=tensor.dtype, device="meta")
    layer.weight = torch.nn.Parameter(tensor.clone(), requires_grad=False)
    ao.quantize_(layer, config)
    packed = layer.weight.detach()
    names = ("qdata", "scale") if "float8" in name else ("qdata", "scale", "zero_point")
    return packed, {name: getattr(packed, name) for name in names}


def check(torch, name, tensor, group=None):
    theirs, arrays = packed_by_torchao(torch, name, tensor, group)
    ours = wp.quantize(tensor, name, block_size=group)
    if name == "torchao:float8_tensor" and not arrays["scale"].any():
        assert ours["scale"].tolist() == [[1.0]]
        assert not (ours["qdata"].view(torch.uint8) & 0x7F).any()
        return
    if name == "torchao:float8" and not arrays["scale"].all():
        empty = arrays["scale"] == 0
        codes = arrays["qdata"].view(torch.uint8)
        codes.masked_fill_(empty.repeat_interleave(codes.shape[1] // empty.shape[1], 1), 0)
        arrays["scale"].masked_fill_(empty, torch.finfo(torch.float32).smallest_normal)
    assert_equal(torch, ours, arrays)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        decoded = wp.dequantize(ours, name, dtype=dtype, block_size=group)
        if name in INTX:
            # The peer gives back the type of the weight only.
            expected = ours["qdata"].float() * ours["scale"].float().repeat_interleave(
                tensor.shape[1] // ours["scale"].shape[1], 1
            )
            assert as_bytes(decoded, torch) == as_bytes(expected.to(dtype), torch), dtype
            if dtype == tensor.dtype:
                assert as_bytes(decoded, torch) == as_bytes(theirs.dequantize(), torch)
        else:
            assert as_bytes(decoded, torch) == as_bytes(theirs.dequantize(dtype), torch), dtype


def groups_of(columns):
    """None, and every usual size of groups that fits."""
    return [None, *(size for size in (8, 16, 32, 40, 128) if columns % size == 0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_bytes(torch, name, dtype):
    most = 448.0 if "float8" in name else 2.0 ** (int(name[-1]) - 1) - 0.5
    for number, kind in enumerate(KINDS):
        for shape in SHAPES:
            groups = groups_of(shape[1]) if name in GROUPED else [None]
            # One size of groups for each: all are seen.
            group = groups[number % len(groups)]
            check(torch, name, tensor_of(torch, kind, shape, dtype, most=most), group)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 20),
    groups=st.integers(1, 9),
    size=st.integers(2, 140),
    name=st.sampled_from(GROUPED),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_bytes_of_any_group(torch, rows, groups, size, name, kind, dtype, seed):
    check(torch, name, tensor_of(torch, kind, (rows, groups * size), dtype, seed, 7.5), size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tie(torch, dtype):
    """Quotients that are whole numbers and a half, and their neighbours, at scales of all sizes."""
    for bits in (2, 3, 4, 6, 8):
        half = 2.0 ** (bits - 1) - 0.5
        ties = torch.arange(-half, half + 0.5, 0.5)
        ties = torch.cat([torch.tensor([half]), ties, torch.zeros(-(len(ties) + 1) % 16)])
        for step in (-24, -13, -1, 0, 3):
            weight = (ties * 2.0**step).to(getattr(torch, dtype)).repeat(3, 1)
            weight[1] = torch.nextafter(weight[1], torch.zeros_like(weight[1]))
            weight[2] *= 0.7
            check(torch, f"torchao:intx{bits}", weight, weight.shape[1])
            check(torch, f"torchao:intx{bits}", weight, 16)


@pytest.mark.parametrize("name", FORMS)
def test_zeros_are_zeros(name):
    group = 16 if name in GROUPED else None
    for weight in (np.zeros((2, 48), np.float32), np.full((2, 48), -0.0, np.float16)):
        parts = wp.quantize(weight, name, block_size=group)
        assert np.isfinite(parts["scale"].astype(np.float32)).all()
        assert not wp.dequantize(parts, name, block_size=group).any()


def test_one_bit_is_decoded(torch):
    weight = torch.randn(4, 64, dtype=torch.bfloat16)
    theirs, arrays = packed_by_torchao(torch, "torchao:intx1", weight, 16)
    arrays["qdata"][:, ::3] = -1
    decoded = wp.dequantize(arrays, "torchao:intx1", dtype=torch.bfloat16, block_size=16)
    assert decoded.any()
    assert torch.equal(decoded, theirs.dequantize())


def test_zero_points_are_taken_off():
    weights = np.linspace(-1, 1, 96, dtype=np.float32).reshape(2, 48)
    for name in ("torchao:int8", "torchao:intx5"):
        parts = wp.quantize(weights, name, block_size=16)
        parts["zero_point"][1] = (5, -3, 0)
        moved = parts["qdata"].astype(np.float32) - parts["zero_point"].repeat(16, 1)
        expected = moved * parts["scale"].repeat(16, 1)
        assert np.array_equal(wp.dequantize(parts, name, block_size=16), expected)


def test_what_is_refused(torch):
    weight = torch.ones(4, 48)
    for name in GROUPED:
        # So does the peer, without a word about why.
        with pytest.raises(FormatError, match="row of 48 weights is not a multiple of block_size 32"):
            wp.quantize(weight, name, block_size=32)
        with pytest.raises((AssertionError, RuntimeError)):
            packed_by_torchao(torch, name, weight, 32)
        with pytest.raises(ConfigError, match="block_size is 0"):
            wp.quantize(weight, name, block_size=0)
    for name in FORMS:
        with pytest.raises(FormatError, match="2 dimensions"):
            wp.quantize(torch.ones(4), name)
        with pytest.raises(FormatError, match="weight 5 is"):
            wp.quantize(torch.where(torch.arange(8) == 5, torch.inf, 1.0).reshape(2, 4), name)
    with pytest.raises(ConfigError, match="has no block_size"):
        wp.quantize(weight, "torchao:float8_tensor", block_size=16)
    with pytest.raises(UnsupportedError, match="is decoded, and not encoded"):
        wp.quantize(weight, "torchao:intx1")
