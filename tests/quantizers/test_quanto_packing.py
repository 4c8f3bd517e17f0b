"""quanto's numbers: the bytes of optimum-quanto for every type, and the rows that it gets wrong."""

from __future__ import annotations

import pytest

from tests.conftest import find_peer
from weightpack.errors import FormatError

torch = find_peer("torch")
find_peer("optimum.quanto")

from tests.quantizers.quanto_models import DTYPES, ERROR, WEIGHTS, bits, by_library, with_library_unpack  # noqa: E402
from weightpack.quantizers import quanto_packing as packing  # noqa: E402
from weightpack.quantizers import quanto_tinygemm as tinygemm  # noqa: E402

SHAPES = [
    (33, 48), (32, 80), (17, 1000), (33, 2736), (7, 4304), (32, 1152), (64, 256), (16, 192), (5, 128), (6, 160),
    (1, 64), (1, 1000), (3, 8), (2, 4), (8, 12, 3, 3), (33, 64, 2, 2), (1, 6, 2, 2), (1, 5, 3, 1),
    (1, 131, 3, 3), (1, 128), (1, 128, 1, 1), (48, 384),
]  # fmt: skip


def random(shape, dtype, seed=0):
    torch.manual_seed(seed)
    return (torch.randn(shape) * torch.rand(shape[0], *(1 for _ in shape[1:])) * 3).to(dtype)


def library_layer(weight):
    if weight.ndim == 2:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    else:
        layer = torch.nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def theirs(weight, weights):
    """Components by optimum-quanto, before it turns them into the form of a kernel."""
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qtypes
    from optimum.quanto.tensor import group

    qtype = qtypes[f"q{weights}"]
    size = packing.group_size(weight.shape, weights)
    if qtype.bits == 8:
        scale = AbsmaxOptimizer()(weight, qtype=qtype, axis=0)
        axis = 0 if weight.shape[0] > 1 else None
        data = torch.ops.quanto.quantize_symmetric(weight, dtype=qtype.dtype, axis=axis, scale=scale)
        return {"_data": data, "_scale": scale}
    from optimum.quanto.tensor.packed import pack_weights

    scale, shift = MaxOptimizer()(weight, qtype=qtype, axis=0, group_size=size)
    codes = torch.ops.quanto.quantize_affine(weight, bits=qtype.bits, axis=0, group_size=size, scale=scale, shift=shift)
    assert size is None or codes.shape == group(weight, axis=0, group_size=size).shape
    return {"_data": pack_weights(codes, qtype.bits), "_scale": scale, "_shift": shift}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_bytes_are_those_of_the_library(weights, dtype):
    for shape in SHAPES:
        weight = random(shape, dtype)
        ours, expected = packing.encode(weight, weights), theirs(weight, weights)
        assert list(ours) == list(expected)
        for component, value in expected.items():
            assert bits(ours[component]) == bits(value), (shape, component)
        assert {c: tuple(v.shape) for c, v in ours.items()} == packing.component_shapes(shape, weights)
        assert sum(v.nbytes for v in ours.values()) == packing.packed_bytes(shape, weights, dtype.itemsize)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_group_sizes_are_those_of_the_layer(weights):
    from optimum.quanto import QLinear

    for columns in (8, 127, 128, 129, 160, 192, 224, 256, 288, 1000, 1152, 2736, 4304):
        layer = QLinear(columns, 4, weights=f"q{weights}", device="meta")
        assert packing.group_size((4, columns), weights) == layer.weight_group_size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("chunk", [1 << 10, 1 << 22])
def test_decoded_weights(weights, dtype, chunk, monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK_WEIGHTS", chunk)
    with_library_unpack(monkeypatch)
    for shape in [(33, 48), (17, 1000), (32, 1152), (8, 12, 3, 3)]:
        weight = random(shape, dtype)
        parts = packing.encode(weight, weights)
        decoded = packing.decode(parts, weights, shape, torch.float32)
        assert (decoded - weight.float()).norm() < ERROR[weights] * weight.float().norm()
        assert packing.decode(parts, weights, shape).dtype == dtype
        if weights != "int4" or dtype != torch.bfloat16:
            library = by_library(library_layer(weight), weights).weight
            assert bits(packing.dequantize(parts, weights, shape)) == bits(library.dequantize())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_rows_of_zeros_are_zeros(weights, dtype):
    # pytorch/ao#4713 is the same fault; optimum-quanto's own float8 gives NaN.
    weight = random((16, 256), dtype)
    weight[3] = 0
    weight[5] = 0.7
    parts = packing.encode(weight, weights)
    decoded = packing.decode(parts, weights, weight.shape, torch.float32)
    assert torch.all(decoded[3] == 0)
    assert torch.allclose(decoded[5], weight[5].float(), rtol=5e-3)
    if weights == "float8":
        assert theirs(weight, weights)["_data"][3].float().isnan().all()


def test_rows_whose_scale_is_rounded_to_zero_hold_no_nan():
    weight = random((8, 64), torch.float32)
    weight[2] *= 1e-6
    weight = weight.half()
    parts = packing.encode(weight, "float8")
    assert parts["_scale"][2] == 0
    assert packing.decode(parts, "float8", weight.shape).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_values_that_are_not_finite_are_refused(weights, value):
    weight = random((20, 256), torch.bfloat16)
    weight[7, 200] = value
    with pytest.raises(FormatError, match=r"weight 1992 is .* \(tensor \"a.weight\""):
        packing.encode(weight, weights, name="a.weight")


def test_ranges_that_overflow_are_refused():
    weight = torch.tensor([[60000.0, -60000.0] * 8, [1.0, 2.0] * 8], dtype=torch.float16)
    with pytest.raises(FormatError, match=r"from -6e4 to 6e4, a range that F16 does not hold \(tensor \"weight\""):
        packing.encode(weight, "int4")
    with pytest.raises(FormatError, match="weight 0 is inf"):
        packing.encode(torch.full((4, 16), 1e6), "int8", dtype=torch.float16)
    assert packing.decode(packing.encode(weight, "int8"), "int8", weight.shape).isfinite().all()


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        (torch.zeros(4), "has no rows"),
        (torch.zeros(0, 4), "has no rows"),
        (torch.zeros(4, 4, dtype=torch.float64), "float64 weights as float64"),
        (torch.zeros(4, 4, dtype=torch.int32), "int32 weights"),
    ],
)
def test_weights_that_have_no_components(weight, told):
    with pytest.raises(FormatError, match=told):
        packing.encode(weight, "int8")


def test_rounding_to_the_type_comes_first():
    weight = random((16, 256), torch.float32)
    ours = packing.encode(weight, "int4", dtype=torch.bfloat16)
    for component, value in packing.encode(weight.bfloat16(), "int4").items():
        assert bits(ours[component]) == bits(value)


@pytest.mark.parametrize("n_bits", [4, 2])
def test_unpack_undoes_pack(n_bits):
    for rows in range(1, 20):
        codes = torch.randint(0, 2**n_bits, (rows, 5), dtype=torch.uint8)
        packed = packing.pack(codes, n_bits)
        assert torch.equal(packing.unpack(packed, n_bits, rows), codes)
        pieces = {start: piece for piece, start in packing.unpack_chunks(packed, n_bits, rows)}
        assert torch.equal(torch.cat([pieces[start] for start in sorted(pieces)]), codes)


@pytest.mark.parametrize("shape", [(16, 32), (48, 128), (64, 256), (80, 128), (1136, 384), (256, 1152)])
def test_the_kernels_form_and_back(shape):
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = tinygemm.pack_rows(codes)
    assert torch.equal(packed, torch._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 2))
    assert torch.equal(tinygemm.unpack_rows(packed), codes)
