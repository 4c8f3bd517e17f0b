"""Against the live bitsandbytes: stored bytes on the way in, weights on the way out.

Differences that are meant to be, each with a test of its own below:

| case | peer | weightpack |
|---|---|---|
| nested offset | torch's mean, depends on the number of threads | `f64` mean; all else is compared given it |
| row not a multiple of the block, AVX-512 | finds scales by row, wrong | finds scales by position |
| int8 weight beyond f16 | row of zeros, SCB infinite | refused |
| double quantization of weights that are not finite | every weight NaN | refused |
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weightpack as wp
from weightpack.errors import FormatError

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CODES = ("nf4", "fp4")
DTYPES = ("float32", "bfloat16", "float16")
SHAPES = ((1,), (2,), (63,), (64,), (65,), (4097,), (3, 48), (5, 80), (2, 1000), (3, 2736), (1, 4304), (2, 3, 64), ())


@pytest.fixture(scope="module")
def torch(peer):
    return peer("torch")


@pytest.fixture(scope="module")
def functional(peer):
    return peer("bitsandbytes.functional")


def thresholds(functional, code):
    """Numbers that lie exactly between two neighbouring values of a code."""
    values = np.sort(functional.get_4bit_type(code, device="cpu").numpy())
    return ((values[:-1] + values[1:]) / 2).astype(np.float32)


def weights(functional, kind, count, seed=0):
    """`count` float32 numbers of a named kind."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(count).astype(np.float32)
    if kind == "normal":
        return normal * np.float32(0.02)
    if kind == "heavy":
        return rng.standard_t(2, count).astype(np.float32)
    if kind == "zeros":
        return np.where(rng.random(count) < 0.5, np.float32(0), np.float32(-0.0))
    if kind == "sparse":
        return np.where(np.arange(count) % 97 == 5, normal, np.float32(0)).astype(np.float32)
    if kind == "constant":
        return np.full(count, -0.3, np.float32)
    if kind == "ties":
        # Blocks whose largest magnitude is 1, so that scaling leaves the thresholds as they are.
        ties = np.concatenate([thresholds(functional, code) for code in CODES])
        ties = np.concatenate([ties, np.nextafter(ties, np.float32(2)), np.nextafter(ties, np.float32(-2)), [1.0]])
        return np.resize(ties, count).astype(np.float32)
    if kind == "tiny":
        return normal * np.float32(1e-38)
    if kind == "subnormal":
        return rng.integers(-200, 200, count).astype(np.float32) * np.float32(1e-45)
    if kind == "huge":
        return np.clip(normal, -3, 3) * np.float32(1e38)
    assert kind == "mixed"
    return normal * np.float32(2) ** rng.integers(-60, 15, count).astype(np.float32)


KINDS = ("normal", "heavy", "zeros", "sparse", "constant", "ties", "tiny", "subnormal", "huge", "mixed")


def tensor_of(torch, functional, kind, shape, dtype, seed=0):
    count = int(np.prod(shape, dtype=np.int64))
    tensor = torch.from_numpy(weights(functional, kind, count, seed)).reshape(shape).to(getattr(torch, dtype))
    # "huge" overflows float16; only finite weights are compared.
    return torch.where(torch.isfinite(tensor), tensor, torch.ones((), dtype=tensor.dtype))


def as_bytes(array):
    return np.ascontiguousarray(array.numpy() if hasattr(array, "numpy") else array).tobytes()


def assert_components_equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert ours[name].shape == expected.shape, name
        assert as_bytes(ours[name]) == as_bytes(expected), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
def test_4bit_bytes(torch, functional, code, dtype, kind):
    for shape in SHAPES:
        tensor = tensor_of(torch, functional, kind, shape, dtype)
        for block_size in BLOCK_SIZES:
            packed, state = functional.quantize_4bit(tensor, blocksize=block_size, quant_type=code)
            theirs = {"": packed, **state.as_dict(packed=True)}
            assert_components_equal(wp.quantize(tensor, code, block_size=block_size), theirs)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    block_size=st.sampled_from(BLOCK_SIZES),
    code=st.sampled_from(CODES),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_4bit_bytes_of_any_shape(torch, functional, shape, block_size, code, kind, dtype, seed):
    tensor = tensor_of(torch, functional, kind, shape, dtype, seed)
    packed, state = functional.quantize_4bit(tensor, blocksize=block_size, quant_type=code)
    assert_components_equal(
        wp.quantize(tensor, code, block_size=block_size), {"": packed, **state.as_dict(packed=True)}
    )


@pytest.mark.parametrize("code", CODES)
def test_4bit_takes_64_bit_weights_rounded_once(functional, code):
    exact = np.random.default_rng(5).standard_normal((30, 50))
    ours = wp.quantize(exact, code)
    rounded = wp.quantize(exact.astype(np.float32), code)
    assert all(as_bytes(ours[name]) == as_bytes(rounded[name]) for name in rounded)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("kind", ["normal", "heavy", "zeros", "sparse", "constant", "tiny", "huge", "mixed"])
def test_double_quant_given_the_offset(torch, functional, kind, block_size, code):
    for rows in (1, 3, 300):
        tensor = tensor_of(torch, functional, kind, (rows, block_size + 7), "bfloat16", rows)
        ours = wp.quantize(tensor, code, block_size=block_size, double_quant=True)
        packed, plain = functional.quantize_4bit(tensor, blocksize=block_size, quant_type=code)
        _, state = functional.quantize_4bit(tensor, blocksize=block_size, quant_type=code, compress_statistics=True)
        name = f"quant_state.bitsandbytes__{code}"
        stored = json.loads(as_bytes(ours[name]))
        offset = np.float32(stored["nested_offset"])
        exact = np.float32(plain.absmax.double().mean().item())
        assert abs(offset - exact) <= np.spacing(exact)
        # torch sums in float32, which may overflow.
        assert abs(offset - state.offset.numpy()) <= 4 * np.spacing(exact) or torch.isinf(state.offset)

        # The peer's own second quantization and its own JSON, given our offset.
        absmax, nested = functional.quantize_blockwise(plain.absmax - torch.tensor(offset), blocksize=256)
        state.absmax, state.state2, state.offset = absmax, nested, torch.tensor(offset)
        assert_components_equal(ours, {"": packed, **state.as_dict(packed=True)})


def test_double_quant_of_tiny_differences(torch, functional):
    """The inverse of a nested scale below 2^-128 is infinite; the peer's conversion of NaN is what x86 does."""
    absmax = np.full(300, 1e-39, np.float32)
    absmax[::7] = 3e-39
    tensor = torch.from_numpy(np.repeat(absmax, 64).reshape(300, 64))
    ours = wp.quantize(tensor, "nf4", double_quant=True)
    offset = np.float32(json.loads(as_bytes(ours["quant_state.bitsandbytes__nf4"]))["nested_offset"])
    codes, nested = functional.quantize_blockwise(torch.from_numpy(absmax) - torch.tensor(offset), blocksize=256)
    assert as_bytes(ours["absmax"]) == as_bytes(codes)
    assert as_bytes(ours["nested_absmax"]) == as_bytes(nested.absmax)


def offset_text(value):
    """The nested offset as it is written for a tensor of one block of one magnitude."""
    ours = wp.quantize(np.full((1, 64), value), "nf4", double_quant=True)
    return as_bytes(ours["quant_state.bitsandbytes__nf4"]).decode().rpartition('"nested_offset": ')[2]


def test_offset_is_written_as_python_does():
    rng = np.random.default_rng(0)
    random = rng.integers(0, 0x7F800000, 3000, dtype=np.uint32).view(np.float32)
    # Few significant bits: exact ties between decimal numbers are common.
    short = (rng.integers(1, 2**20, 3000) * 2.0 ** rng.integers(-30, 10, 3000)).astype(np.float32)
    named = np.array([0, 1e-05, 1e-4, 0.1, 1e15, 1e16, 3e-42, 65504, 3.4e38], np.float32)
    for value in np.concatenate([named, short, random]):
        assert offset_text(value) == json.dumps(float(value)) + "}"


@pytest.mark.parametrize("code", CODES)
def test_nonfinite_weights_on_request(torch, functional, code):
    tensor = torch.randn(10, 64)
    tensor[1, 3] = float("nan")
    tensor[3, 4] = float("inf")
    tensor[5, 60] = -float("inf")
    tensor[7, 0], tensor[7, 1] = float("inf"), float("nan")
    tensor = torch.cat([tensor.flatten(), torch.tensor([1.0, float("inf"), -2.0])])
    with pytest.raises(FormatError, match="weight 67 is NaN"):
        wp.quantize(tensor, code)
    ours = wp.quantize(tensor, code, keep_nonfinite=True)
    packed, state = functional.quantize_4bit(tensor, quant_type=code)
    assert as_bytes(ours[""]) == as_bytes(packed)
    np.testing.assert_array_equal(ours["absmax"].numpy(), state.absmax.numpy())
    blocks = torch.isnan(wp.dequantize(ours, code))
    assert [int(blocks[i * 64]) for i in range(11)] == [0, 1, 0, 1, 0, 1, 0, 1, 0, 0, 1]
    with pytest.raises(FormatError, match="double_quant takes finite weights only"):
        wp.quantize(tensor, code, double_quant=True, keep_nonfinite=True)


def evaluate(components, code, shape, block_size, double_quant):
    """The decoding rule in numpy, in float32."""
    packed = components[""].numpy().reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    count = int(np.prod(shape, dtype=np.int64))
    absmax = components["absmax"].numpy()
    if double_quant:
        state = json.loads(as_bytes(components[f"quant_state.bitsandbytes__{code}"]))
        nested = np.repeat(components["nested_absmax"].numpy(), 256)[: absmax.size]
        absmax = components["nested_quant_map"].numpy()[absmax] * nested + np.float32(state["nested_offset"])
    scale = np.repeat(absmax, block_size)[:count]
    return (components["quant_map"].numpy()[codes[:count]] * scale).reshape(shape)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("code", CODES)
def test_4bit_decodes_by_position(torch, functional, code, double_quant):
    for shape in [*SHAPES, (64, 4304), (40, 2736), (33, 64), (500, 48)]:
        tensor = tensor_of(torch, functional, "heavy", shape, "float32", 3)
        for block_size in (32, 64, 256, 4096):
            parts = wp.quantize(tensor, code, block_size=block_size, double_quant=double_quant)
            expected = evaluate(parts, code, shape, block_size, double_quant)
            ours = wp.dequantize(parts, code)
            assert ours.shape == tensor.shape
            assert as_bytes(ours) == as_bytes(expected)
            for dtype in (torch.bfloat16, torch.float16):
                rounded = torch.from_numpy(np.array(expected)).to(dtype)
                assert torch.equal(wp.dequantize(parts, code, dtype=dtype), rounded)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("code", CODES)
def test_the_peer_reads_what_was_written(torch, functional, code, dtype, double_quant):
    # Rows of whole blocks, or rows that its fast decoder does not take.
    for shape, block_size in [((96, 256), 64), ((16, 1024), 128), ((8, 512), 512), ((40, 90), 64), ((3, 2050), 64)]:
        tensor = tensor_of(torch, functional, "normal", shape, dtype, 1)
        parts = wp.quantize(tensor, code, block_size=block_size, double_quant=double_quant)
        state = functional.QuantState.from_dict(
            {name: part for name, part in parts.items() if name}, device=torch.device("cpu")
        )
        theirs = functional.dequantize_4bit(parts[""], state)
        assert theirs.dtype == tensor.dtype
        assert torch.equal(wp.dequantize(parts, code, dtype=theirs.dtype), theirs)


def test_dynamic_map_is_the_peers(functional):
    ours = wp.quantize(np.ones((2, 64), np.float32), "nf4", double_quant=True)["nested_quant_map"]
    assert as_bytes(ours) == as_bytes(functional.create_dynamic_map())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "huge"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_bytes(torch, functional, dtype, kind):
    for shape in ((1, 1), (3, 48), (5, 80), (2, 1000), (3, 2736), (2, 4304), (17, 33)):
        tensor = tensor_of(torch, functional, kind, shape, dtype, 2)
        if kind == "heavy":
            tensor = tensor.clamp(-60000, 60000)
        tensor[0] = 0
        ours = wp.quantize(tensor, "bitsandbytes:int8")
        codes, scales, _ = functional.int8_vectorwise_quant(tensor.to(torch.float16))
        assert ours[""].dtype == codes.dtype
        assert as_bytes(ours[""]) == as_bytes(codes)
        assert as_bytes(ours["SCB"]) == as_bytes(scales)
        decoded = functional.int8_vectorwise_dequant(codes, scales)
        assert as_bytes(wp.dequantize(ours, "bitsandbytes:int8")) == as_bytes(decoded)


def test_int8_ties_and_extremes(torch, functional):
    halves = (np.arange(-254, 255) / 2).astype(np.float32)
    for scale in (1.0, 2.0**-10, 2.0**-17, 2.0**8, 3.0, 515.0):
        tensor = torch.from_numpy((halves * np.float32(scale)).reshape(1, -1))
        codes, scales, _ = functional.int8_vectorwise_quant(tensor.to(torch.float16))
        ours = wp.quantize(tensor, "bitsandbytes:int8")
        assert as_bytes(ours[""]) == as_bytes(codes)
        assert as_bytes(ours["SCB"]) == as_bytes(scales)


def test_int8_state_dict(torch, peer):
    modules = peer("bitsandbytes").nn
    layer = modules.Linear8bitLt(48, 20, bias=False, has_fp16_weights=False)
    tensor = torch.randn(20, 48)
    layer.weight = modules.Int8Params(tensor.clone(), requires_grad=False, has_fp16_weights=False)
    state = layer.to("cpu").state_dict()
    ours = wp.quantize(tensor, "bitsandbytes:int8")
    theirs = {"": state["weight"], "SCB": state["SCB"], "weight_format": state["weight_format"]}
    assert set(state) == {"weight", "SCB", "weight_format"}
    assert_components_equal(ours, theirs)


def test_int8_rounds_64_bit_weights_once_to_half(torch, functional):
    half = np.random.default_rng(1).standard_normal((4, 100)).astype(np.float16)
    step = np.spacing(half).astype(np.float64)
    # A hair above a tie between two halves: only one rounding sees it.
    exact = half + step / 2 * (1 + 1e-12 * np.sign(half.astype(np.float64)))
    codes, scales, _ = functional.int8_vectorwise_quant(torch.from_numpy(exact.astype(np.float16)))
    ours = wp.quantize(exact, "bitsandbytes:int8")
    assert as_bytes(ours[""]) == as_bytes(codes)
    assert as_bytes(ours["SCB"]) == as_bytes(scales)


def test_int8_refuses_what_half_cannot_hold():
    weights = np.zeros((3, 5), np.float32)
    weights[1, 2] = 65520
    with pytest.raises(FormatError, match="weight 65520 at index 7 does not fit in f16"):
        wp.quantize(weights, "bitsandbytes:int8")
    weights[1, 2] = 65519
    assert wp.quantize(weights, "bitsandbytes:int8")["SCB"][1] == 65504
    with pytest.raises(FormatError, match="takes 2 dimensions"):
        wp.quantize(weights[0], "bitsandbytes:int8")
