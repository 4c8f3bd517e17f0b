"""Against the live torchao: the arrays of a packed weight, and the weights that they decode to.

Differences that are meant to be:

| case | peer | weightpack |
|---|---|---|
| float8 row whose scale is 0 | its zeros are stored as NaN | codes 0, the scale the smallest normal number |
| int8 matrix of one column | not packed (an error about shapes) | packed |
| weights that are not finite | the largest code, or NaN | refused |
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weightpack as wp
from weightpack.errors import FormatError

from .rows8 import DTYPES, KINDS, SHAPES, as_bytes, assert_equal, tensor_of

FORMATS = ("int8", "float8")
MOST = {"int8": 127.5, "float8": 448.0}


@pytest.fixture(scope="module")
def torch(peer):
    peer("torchao")
    return peer("torch")


def packed_by_torchao(torch, form, tensor):
    """The tensor as torchao packs a linear layer's weight, and its arrays."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    rows, columns = tensor.shape
    layer = torch.nn.Linear(columns, rows, bias=False, dtype=tensor.dtype, device="meta")
    layer.weight = torch.nn.Parameter(tensor.clone(), requires_grad=False)
    quantize_(layer, Int8WeightOnlyConfig() if form == "int8" else Float8WeightOnlyConfig())
    names = ("qdata", "scale", "zero_point") if form == "int8" else ("qdata", "scale")
    return layer.weight.detach(), {name: getattr(layer.weight, name) for name in names}


def settled(torch, arrays):
    """The peer's arrays with the documented result for rows without a scale."""
    empty = arrays["scale"] == 0
    qdata = arrays["qdata"].view(torch.uint8).masked_fill(empty, 0).view(arrays["qdata"].dtype)
    scale = torch.where(empty, torch.finfo(torch.float32).smallest_normal, arrays["scale"])
    return {**arrays, "qdata": qdata, "scale": scale}


def check(torch, form, tensor):
    theirs, arrays = packed_by_torchao(torch, form, tensor)
    ours = wp.quantize(tensor, f"torchao:{form}")
    if form == "float8":
        arrays = settled(torch, arrays)
        theirs = type(theirs)(arrays["qdata"], arrays["scale"], block_size=[1, tensor.shape[1]], dtype=tensor.dtype)
    assert_equal(torch, ours, arrays)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        decoded = wp.dequantize(ours, f"torchao:{form}", dtype=dtype)
        assert as_bytes(decoded, torch) == as_bytes(theirs.dequantize(dtype), torch), dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_bytes(torch, form, dtype, kind):
    for shape in SHAPES:
        if shape == (3, 1):
            continue
        check(torch, form, tensor_of(torch, kind, shape, dtype, most=MOST[form]))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(2, 300)),
    form=st.sampled_from(FORMATS),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_bytes_of_any_shape(torch, shape, form, kind, dtype, seed):
    check(torch, form, tensor_of(torch, kind, shape, dtype, seed, MOST[form]))


@pytest.mark.parametrize("form", FORMATS)
def test_zeros_are_zeros(form):
    parts = wp.quantize(np.zeros((2, 48), np.float32), f"torchao:{form}")
    assert not parts["qdata"].view(np.uint8).any()
    decoded = wp.dequantize(parts, f"torchao:{form}")
    assert decoded.shape == (2, 48)
    assert not decoded.any()


@pytest.mark.parametrize("form", FORMATS)
def test_one_column(form):
    weights = np.array([[0.5], [-3.0], [0.0]], np.float32)
    decoded = wp.dequantize(wp.quantize(weights, f"torchao:{form}"), f"torchao:{form}")
    assert np.allclose(decoded, weights, rtol=0.01)


def test_a_zero_point_is_taken_off():
    parts = wp.quantize(np.linspace(-1, 1, 96, dtype=np.float32).reshape(2, 48), "torchao:int8")
    parts["zero_point"][1] = 5
    expected = (parts["qdata"].astype(np.float32) - parts["zero_point"]) * parts["scale"]
    assert np.array_equal(wp.dequantize(parts, "torchao:int8"), expected.astype(np.float32))


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_refused(form):
    with pytest.raises(FormatError, match="2 dimensions"):
        wp.quantize(np.ones(4, np.float32), f"torchao:{form}")
    with pytest.raises(FormatError, match="weight 5 is inf"):
        wp.quantize(np.where(np.arange(8) == 5, np.inf, 1.0).astype(np.float32).reshape(2, 4), f"torchao:{form}")
