"""Against the live optimum-quanto: the arrays of a packed weight, and the weights that they decode to.

Differences that are meant to be:

| case | peer | weightpack |
|---|---|---|
| float8 row whose scale is 0 (zeros, or rounded to 0) | zeros are stored as NaN | stored as 0 |
| weights that are not finite | codes without meaning | refused |
| int4, int2: a group whose range the type does not hold | scale infinite, decodes to NaN | refused |
| int4, int2: the least of a group is zero | shift is 0 or -0 by chance | shift is 0 or -0 |
| int4 in bfloat16 and groups of 128, rows no multiple of 16 | fails | stored with the shift as it is |
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weightpack as wp
from weightpack.errors import ConfigError, FormatError

from .rows8 import DTYPES, KINDS, SHAPES, assert_equal, tensor_of

FORMATS = ("int8", "float8")
GROUPED = ("int4", "int2")
GROUPED_SHAPES = (
    (1, 1), (1, 48), (2, 1), (3, 48), (8, 80), (5, 96), (4, 128), (2, 256), (3, 160), (1, 256), (1, 1000), (4, 1000),
    (3, 2736), (4, 4304), (6, 40), (11, 40), (12, 129),
)  # fmt: skip
MOST = {"int8": 127.0, "float8": 448.0}


@pytest.fixture(scope="module")
def torch(peer):
    peer("optimum.quanto")
    return peer("torch")


def packed_by_quanto(torch, form, tensor):
    """The frozen weight of quanto's layer, and what the layer's state holds of it."""
    from optimum.quanto import QLinear, qtypes

    rows, columns = tensor.shape
    layer = torch.nn.Linear(columns, rows, bias=False, dtype=tensor.dtype)
    layer.weight = torch.nn.Parameter(tensor.clone(), requires_grad=False)
    layer = QLinear.from_module(layer, weights=qtypes[f"q{form}"])
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


def spans_too_much(tensor, form):
    """Whether the range of some group overflows the type."""
    group = group_of(tensor.shape[1])
    rows = tensor.reshape(-1, group)
    return len(rows) > 1 and not (rows.amax(1) - rows.amin(1)).isfinite().all()


def group_of(columns):
    sizes = (128, 96, 64, 32) if columns > 128 else ()
    return next((size for size in sizes if columns % size == 0), columns)


def check_groups(torch, form, tensor):
    if spans_too_much(tensor, form):
        with pytest.raises(FormatError, match=r"weights \d+\.\.\d+ are from .* to .*, a range that"):
            wp.quantize(tensor, f"quanto:{form}")
        return
    columns = tensor.shape[1]
    if form == "int4" and tensor.dtype == torch.bfloat16 and columns > 128 and columns % 128 == 0:
        tensor = tensor.repeat(16, 1)
    _, arrays = packed_by_quanto(torch, form, tensor)
    ours = wp.quantize(tensor, f"quanto:{form}")
    # Decoded as documented, in float32 and in order, from the peer's arrays.
    bits = int(form.removeprefix("int"))
    codes = arrays["_data._data"]
    scale, shift = arrays["_scale"].float(), arrays["_shift"].float()
    codes = torch.cat([codes >> bit & 2**bits - 1 for bit in range(0, 8, bits)])[: len(scale)]
    expected = (codes.float() * scale - shift).reshape(tensor.shape)
    decoded = wp.dequantize(ours, f"quanto:{form}", shape=tensor.shape)
    assert torch.equal(decoded, expected)
    # The sign of a shift that is zero.
    for part in (arrays, ours):
        part["_shift"] = part["_shift"] + 0.0
    assert_equal(torch, ours, arrays)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", GROUPED)
def test_bytes_of_groups(torch, form, dtype):
    for kind in KINDS:
        for shape in GROUPED_SHAPES:
            check_groups(torch, form, tensor_of(torch, kind, shape, dtype))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 200) | st.sampled_from([256, 288, 320, 384, 448]),
    form=st.sampled_from(GROUPED),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_bytes_of_groups_of_any_shape(torch, rows, columns, form, kind, dtype, seed):
    check_groups(torch, form, tensor_of(torch, kind, (rows, columns), dtype, seed))


@pytest.mark.parametrize("form", GROUPED)
def test_threads_do_not_change_groups(torch, form):
    tensor = tensor_of(torch, "heavy", (1024, 1024), "bfloat16")
    alone, many = (wp.quantize(tensor, f"quanto:{form}", threads=threads) for threads in (1, 3))
    assert_equal(torch, alone, many)
    one, other = (wp.dequantize(alone, f"quanto:{form}", shape=tensor.shape, threads=threads) for threads in (1, 3))
    assert torch.equal(one, other)


@pytest.mark.parametrize("form", GROUPED)
def test_what_is_refused_of_groups(form):
    ones = np.ones((8, 160), np.float32)
    with pytest.raises(FormatError, match="rows of weights"):
        wp.quantize(ones[0], f"quanto:{form}")
    ones[6, 33] = np.nan
    with pytest.raises(FormatError, match="weight 993 is NaN"):
        wp.quantize(ones, f"quanto:{form}")
    ones[6, 33], ones[7, 0] = 3e38, -3e38
    wp.quantize(ones, f"quanto:{form}")
    ones[6, 34] = -3e38
    with pytest.raises(FormatError, match=r"weights 992\.\.1024 are from -3e38 to 3e38"):
        wp.quantize(ones, f"quanto:{form}")
    parts = wp.quantize(np.zeros((8, 160), np.float32), f"quanto:{form}")
    assert not parts["_data._data"].any()
    assert not wp.dequantize(parts, f"quanto:{form}", shape=(8, 160)).any()
    with pytest.raises(ConfigError, match="shape is needed"):
        wp.dequantize(parts, f"quanto:{form}")
    with pytest.raises(FormatError, match="expected"):
        wp.dequantize(parts, f"quanto:{form}", shape=(8, 192))


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
