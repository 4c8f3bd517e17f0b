"""Arrays in and out: kinds, memory, errors, threads."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weightpack as wp
from weightpack.errors import CheckpointError, ConfigError, FormatError, UnsupportedError

NAMES = [info.name for info in wp.formats() if info.encodes == "always"]
"""Formats that are written from weights alone."""


@pytest.fixture
def torch(peer):
    return peer("torch")


def weights(*shape, dtype=np.float32, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(dtype)


def test_table():
    rows = {info.name: info for info in wp.formats()}
    assert rows["bitsandbytes:nf4"].short == "nf4"
    assert rows["bitsandbytes:nf4"].exactness == "exact given nested_offset"
    assert rows["gguf:q8_0"].bits_per_weight == 8.5
    assert all(info.peer and info.reader for info in rows.values())


def untold(parts, source):
    """The shape, where the parts do not tell it: groups of rows in bytes."""
    return source.shape if "_shift" in parts else None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_format_takes_every_float(name, dtype):
    source = weights(6, 512, dtype=dtype)
    parts = wp.quantize(source, name)
    decoded = wp.dequantize(parts, name, shape=untold(parts, source), dtype=dtype)
    assert decoded.dtype == source.dtype
    assert decoded.shape == source.shape
    error = decoded.astype(np.float64) - source.astype(np.float64)
    bits = next(info.bits_per_weight for info in wp.formats() if info.name == name)
    # Below three bits only weights that were trained for a type come back close.
    bounds = {2.5: 1.1, 3: 0.5, 3.2: 0.25, 5: 0.2, 8: 0.1}
    is_float8 = "fp8" in name or "float8" in name
    bound = next((bound for most, bound in bounds.items() if bits < most), 0.03 if is_float8 else 0.02)
    if name.startswith("torchao:intx"):
        # As many bits are used of the eight that are stored, with one scale for a row.
        bound = 3 / 2 ** int(name[-1])
    assert np.sqrt((error**2).mean() / (source.astype(np.float64) ** 2).mean()) < bound


@pytest.mark.parametrize("name", NAMES)
def test_tensors_give_tensors_of_the_same_bytes(torch, name):
    source = weights(6, 512)
    parts = wp.quantize(source, name)
    tensors = wp.quantize(torch.from_numpy(source), name)
    assert parts.keys() == tensors.keys()
    for key, part in parts.items():
        assert isinstance(tensors[key], torch.Tensor)
        assert tuple(tensors[key].shape) == part.shape
        assert tensors[key].reshape(-1).view(torch.uint8).numpy().tobytes() == part.tobytes()
    decoded = wp.dequantize(tensors, name, shape=untold(parts, source), dtype=torch.bfloat16)
    assert decoded.dtype == torch.bfloat16
    again = wp.dequantize(parts, name, shape=untold(parts, source))
    assert torch.equal(decoded, torch.from_numpy(again).to(torch.bfloat16))


def test_parameters_and_views_are_taken_as_they_are(torch):
    parameter = torch.nn.Parameter(torch.from_numpy(weights(64, 32)))
    transposed = wp.quantize(parameter.t(), "nf4")
    copied = wp.quantize(np.ascontiguousarray(weights(64, 32).T), "nf4")
    assert transposed[""].numpy().tobytes() == copied[""].tobytes()
    assert wp.quantize(weights(64, 32).T, "nf4")[""].tobytes() == copied[""].tobytes()
    swapped = weights(64, 32).astype(">f4")
    assert wp.quantize(swapped, "nf4")[""].tobytes() == wp.quantize(weights(64, 32), "nf4")[""].tobytes()


def test_out_is_filled_in_place(torch):
    source = weights(8, 64)
    parts = wp.quantize(source, "q8_0")
    expected = wp.dequantize(parts, "q8_0", dtype="float16")
    out = np.empty((8, 64), np.float16)
    assert wp.dequantize(parts, "q8_0", out=out) is out
    np.testing.assert_array_equal(out, expected)
    tensor = torch.empty(8, 64, dtype=torch.float16)
    assert wp.dequantize(parts, "q8_0", out=tensor) is tensor
    np.testing.assert_array_equal(tensor.numpy(), expected)
    with pytest.raises(FormatError, match="out is not a contiguous"):
        wp.dequantize(parts, "q8_0", out=np.empty((64, 8), np.float32).T)
    with pytest.raises(FormatError, match=r"out has shape \[8, 63\], expected \[8, 64\]"):
        wp.dequantize(parts, "q8_0", out=np.empty((8, 63), np.float32))
    with pytest.raises(ConfigError, match="out is float16, and dtype says float32"):
        wp.dequantize(parts, "q8_0", out=out, dtype="float32")
    out.flags.writeable = False
    with pytest.raises(FormatError, match="read-only"):
        wp.dequantize(parts, "q8_0", out=out)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    rows=st.integers(1, 50),
    blocks=st.integers(1, 6),
    extra=st.integers(0, 255),
    double_quant=st.booleans(),
)
def test_shapes_survive(name, rows, blocks, extra, double_quant):
    if name.startswith(("gguf", "modelopt", "torchao:nv", "torchao:mx")):
        extra = 0
    if name == "modelopt:int4":
        rows *= 2
    source = weights(rows, 256 * blocks + extra)
    params = {"double_quant": double_quant} if name.endswith("f4") else {}
    parts = wp.quantize(source, name, **params)
    decoded = wp.dequantize(parts, name, shape=untold(parts, source))
    assert decoded.shape == source.shape
    bits = next(info.bits_per_weight for info in wp.formats() if info.name == name)
    assert abs(decoded - source).max() < (0.2 if bits < 4 else 0.03)


@pytest.mark.parametrize("name", ["nf4", "bitsandbytes:int8", "q5_1", "bf16"])
def test_threads_change_nothing(name):
    source = weights(900, 1024)
    one = wp.quantize(source, name, threads=1)
    for threads in (2, 5, None):
        many = wp.quantize(source, name, threads=threads)
        assert all(one[key].tobytes() == many[key].tobytes() for key in one)
        assert wp.dequantize(one, name, threads=threads).tobytes() == wp.dequantize(one, name, threads=1).tobytes()


def test_main_component_alone_and_without_quant_state():
    source = weights(5, 48)
    parts = wp.quantize(source, "nf4", block_size=32)
    bare = {"": parts[""], "absmax": parts["absmax"]}
    with pytest.raises(ConfigError, match="shape is needed"):
        wp.dequantize(bare, "nf4", block_size=32)
    expected = wp.dequantize(parts, "nf4")
    np.testing.assert_array_equal(wp.dequantize(bare, "nf4", block_size=32, shape=(5, 48)), expected)
    blocks = wp.quantize(weights(4, 64), "q4_0")[""]
    assert wp.dequantize(blocks, "q4_0").shape == (4, 64)
    # Codes stored as wider elements are the same bytes.
    wide = {**parts, "": parts[""].reshape(-1).view(ml_dtypes.bfloat16).reshape(-1, 1)}
    np.testing.assert_array_equal(wp.dequantize(wide, "nf4"), expected)


def test_what_does_not_fit_is_told():
    source = weights(4, 64)
    parts = wp.quantize(source, "nf4")
    with pytest.raises(UnsupportedError, match='unknown format "nf5"'):
        wp.quantize(source, "nf5")
    with pytest.raises(FormatError, match="array of dtype int64: expected float32"):
        wp.quantize(np.arange(10), "nf4")
    with pytest.raises(ConfigError, match="block_size 48 is not one of"):
        wp.quantize(source, "nf4", block_size=48)
    with pytest.raises(ConfigError, match="has no double_quant"):
        wp.quantize(source, "q8_0", double_quant=True)
    with pytest.raises(FormatError, match='component "absmax" is missing'):
        wp.dequantize({key: part for key, part in parts.items() if key != "absmax"}, "nf4")
    with pytest.raises(FormatError, match='the main component "" is missing'):
        wp.dequantize({"absmax": parts["absmax"]}, "nf4")
    with pytest.raises(ConfigError, match="block_size is 64 in quant_state, not 128"):
        wp.dequantize(parts, "nf4", block_size=128)
    with pytest.raises(ConfigError, match="quant_state says nf4"):
        wp.dequantize(parts, "fp4")
    with pytest.raises(FormatError, match='component "absmax": expected 16 bytes, got 12'):
        wp.dequantize({**parts, "absmax": parts["absmax"][:3]}, "nf4")
    broken = np.frombuffer(b"{", np.uint8)
    with pytest.raises(CheckpointError, match="quant_state is not JSON"):
        wp.dequantize({**parts, "quant_state.bitsandbytes__nf4": broken}, "nf4")
    for name, params in (("quant_map", {}), ("nested_quant_map", {"double_quant": True})):
        other = wp.quantize(source, "nf4", **params)
        other[name] = other[name] * np.float32(0.5)
        with pytest.raises(UnsupportedError, match=f'component "{name}" differs from the table of bitsandbytes:nf4'):
            wp.dequantize(other, "nf4")
    with pytest.raises(ConfigError, match="dtype int8 is not"):
        wp.dequantize(parts, "nf4", dtype="int8")
    with pytest.raises(FormatError, match="does not hold rows of whole blocks"):
        wp.dequantize(np.zeros((2, 35), np.uint8), "q8_0")


def test_tensors_elsewhere_are_refused(torch):
    with pytest.raises(FormatError, match="tensor is on meta"):
        wp.quantize(torch.empty(4, 64, device="meta"), "nf4")


def test_empty_arrays():
    for name in ("nf4", "q8_0", "bf16"):
        parts = wp.quantize(np.zeros((0, 32), np.float32), name)
        assert wp.dequantize(parts, name).shape == (0, 32)


@pytest.mark.parametrize("order", ["low_first", "high_first"])
def test_int4(torch, order):
    codes = np.random.default_rng(0).integers(0, 16, (3, 5, 8), dtype=np.uint8)
    packed = wp.pack_int4(codes, order=order)
    first, second = codes[..., ::2], codes[..., 1::2]
    low, high = (first, second) if order == "low_first" else (second, first)
    np.testing.assert_array_equal(packed, low | high << 4)
    np.testing.assert_array_equal(wp.unpack_int4(packed, order=order), codes)
    tensor = wp.pack_int4(torch.from_numpy(codes), order=order)
    assert torch.equal(tensor, torch.from_numpy(packed))
    assert torch.equal(wp.unpack_int4(tensor, order=order), torch.from_numpy(codes))
    odd = codes.reshape(-1)[:7]
    packed = wp.pack_int4(odd, order=order)
    assert packed.shape == (4,)
    assert packed[3] >> (4 if order == "low_first" else 0) & 15 == 0
    np.testing.assert_array_equal(wp.unpack_int4(packed, order=order, count=7), odd)


def test_int4_refusals():
    with pytest.raises(FormatError, match="code 16 at index 1 does not fit in 4 bits"):
        wp.pack_int4(np.array([1, 16], np.uint8))
    with pytest.raises(ConfigError, match='unknown nibble order "lsb"'):
        wp.pack_int4(np.zeros(2, np.uint8), order="lsb")
    with pytest.raises(FormatError, match="expected uint8, got int32"):
        wp.pack_int4(np.zeros(2, np.int32))
    with pytest.raises(FormatError, match="the last dimension is not even"):
        wp.pack_int4(np.zeros((2, 3), np.uint8))
    with pytest.raises(FormatError, match="5 codes of 4 bits take 3 bytes, got 2"):
        wp.unpack_int4(np.zeros(2, np.uint8), count=5)
    with pytest.raises(FormatError, match="one dimension only"):
        wp.unpack_int4(np.zeros((2, 2), np.uint8), count=4)


def test_examples_run():
    import doctest

    from weightpack import formats_

    done = doctest.testmod(formats_)
    assert done.attempted >= 8
    assert done.failed == 0
