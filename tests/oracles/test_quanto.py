"""Against the live optimum-quanto: the arrays of a packed weight, and the weights that they decode to.

Differences that are meant to be:

| case | peer | weightpack |
|---|---|---|
| float8 row whose scale is 0 (zeros, or rounded to 0) | zeros are stored as NaN | stored as 0 |
| weights that are not finite | codes without meaning | refused |
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weightpack as wp
from weightpack.errors import FormatError

from .rows8 import DTYPES, KINDS, SHAPES, assert_equal, tensor_of

FORMATS = ("int8", "float8")
MOST = {"int8": 127.0, "float8": 448.0}


@pytest.fixture(scope="module")
def torch(peer):
    peer("optimum.quanto")
    return peer("torch")


def packed_by_quanto(torch, form, tensor):
    """The frozen weight of quanto's layer, and what the layer's state holds of it."""
    from optimum.quanto import QLinear, qfloat8, qint8

    rows, columns = tensor.shape
    layer = torch.nn.Linear(columns, rows, bias=False, dtype=tensor.dtype)
    layer.weight = torch.nn.Parameter(tensor.clone(), requires_grad=False)
    layer = QLinear.from_module(layer, weights=qint8 if form == "int8" else qfloat8)
    layer.freeze()
    state = layer.state_dict()
    return layer.weight.detach(), {name.removeprefix("weight."): array for name, array in state.items()}


def check(torch, form, tensor):
    theirs, arrays = packed_by_quanto(torch, form, tensor)
    if form == "float8":
        codes = arrays["_data"].view(torch.uint8)
        codes = torch.where((codes & 0x7F) == 0x7F, 0, codes)
        arrays["_data"] = codes.view(torch.float8_e4m3fn)
    ours = wp.quantize(tensor, f"quanto:{form}")
    assert_equal(torch, ours, arrays)
    decoded = wp.dequantize(ours, f"quanto:{form}", dtype=tensor.dtype)
    expected = theirs.dequantize()
    expected = torch.where(torch.isnan(expected), torch.zeros((), dtype=expected.dtype), expected)
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_bytes(torch, form, dtype, kind):
    for shape in SHAPES:
        check(torch, form, tensor_of(torch, kind, shape, dtype, most=MOST[form]))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 300)),
    form=st.sampled_from(FORMATS),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_bytes_of_any_shape(torch, shape, form, kind, dtype, seed):
    check(torch, form, tensor_of(torch, kind, shape, dtype, seed, MOST[form]))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_rounds_once(torch, form, dtype):
    tensor = tensor_of(torch, "heavy", (7, 80), dtype)
    parts = wp.quantize(tensor, f"quanto:{form}")
    exact = parts["_data"].double() * parts["_scale"].double()
    assert torch.equal(wp.dequantize(parts, f"quanto:{form}"), exact.float())


@pytest.mark.parametrize("form", FORMATS)
def test_zeros_are_zeros(form):
    parts = wp.quantize(np.zeros((2, 48), np.float32), f"quanto:{form}")
    assert not parts["_data"].view(np.uint8).any()
    assert not wp.dequantize(parts, f"quanto:{form}").any()


@pytest.mark.parametrize("form", FORMATS)
def test_kernels_are_rows(form):
    weights = np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype(np.float32)
    parts = wp.quantize(weights, f"quanto:{form}")
    assert parts["_scale"].shape == (4, 1, 1, 1)
    flat = wp.quantize(weights.reshape(4, 12), f"quanto:{form}")
    assert parts["_data"].tobytes() == flat["_data"].tobytes()
    assert wp.dequantize(parts, f"quanto:{form}").shape == weights.shape


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_refused(form):
    with pytest.raises(FormatError, match="rows of weights"):
        wp.quantize(np.ones(4, np.float32), f"quanto:{form}")
    with pytest.raises(FormatError, match="weight 5 is inf"):
        wp.quantize(np.where(np.arange(8) == 5, np.inf, 1.0).astype(np.float32).reshape(2, 4), f"quanto:{form}")
