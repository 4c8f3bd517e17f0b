"""Against the live torchao: weights in blocks with swizzled scales, and what they decode to.

Differences that are meant to be:

| case | peer | weightpack |
|---|---|---|
| nvfp4, a/2688 = 0 for the largest weight a | scales of NaN | a tensor scale of 1, codes of zero |
| nvfp4, the reciprocal of a block's scale is beyond f32 | codes of 6, and of -1.5 for zeros | codes of zero |
| nvfp4, rows that are no multiple of 16 | refused by the config, not by the tensor | packed |
| float16, and float32 for mx by its config | refused | packed as float32 is |
| weights that are not finite | the largest code, or NaN | refused |
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import weightpack as wp
from weightpack.errors import ConfigError, FormatError

from .rows8 import as_bytes, assert_equal, tensor_of

FORMATS = ("nvfp4", "mxfp8", "mxfp4")
DTYPES = ("float32", "bfloat16", "float16")
KINDS = ("normal", "heavy", "zeros", "sparse", "constant", "tiny", "subnormal", "huge", "mixed", "ties", "powers")
BLOCK = {"nvfp4": 16, "mxfp8": 32, "mxfp4": 32}
MOST = {"nvfp4": 6.0, "mxfp8": 448.0, "mxfp4": 6.0}
SHAPES = ((16, 32), (1, 32), (48, 96), (128, 64), (130, 160), (144, 2720), (257, 128))


@pytest.fixture(scope="module")
def torch(peer):
    peer("torchao")
    return peer("torch")


def source(torch, form, kind, shape, dtype, seed=0):
    """As `tensor_of`, and for each format numbers half way between codes (`ties`), and blocks whose largest number
    is at or beside the code's largest times a power of two (`powers`)."""
    block, most = BLOCK[form], MOST[form]
    rng = np.random.default_rng(seed)
    if kind == "ties" and most == 6.0:
        values = rng.integers(-24, 25, shape) / 4.0
        values[:, ::block] = 6.0
        values[0, 0] = 2688.0 if form == "nvfp4" else 6.0
    elif kind == "powers":
        sizes = most * 2.0 ** rng.integers(-20 if dtype == "float16" else -100, 5, (shape[0], shape[1] // block))
        sizes = np.repeat(sizes, block, 1)
        values = rng.uniform(-0.999, 0.999, shape) * sizes
        edge = sizes[:, ::block].astype(np.float32).view(np.int32) + rng.integers(-3, 4, sizes[:, ::block].shape)
        values[:, ::block] = edge.astype(np.int32).view(np.float32)
    else:
        return tensor_of(torch, "eighths" if kind == "ties" else kind, shape, dtype, seed, most)
    tensor = torch.from_numpy(values.astype(np.float32)).to(getattr(torch, dtype))
    return torch.where(torch.isfinite(tensor), tensor, torch.ones((), dtype=tensor.dtype))


def packed_by_torchao(torch, form, tensor):
    """The tensor as torchao packs it: a layer's weight by the config, or by itself where only the class takes it."""
    from torchao.prototype.mx_formats import inference_workflow as workflow
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, ScaleCalculationMode
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
    from torchao.quantization import quantize_

    tensor = tensor.float() if tensor.dtype == torch.float16 else tensor
    codes = torch.float8_e4m3fn if form == "mxfp8" else torch.float4_e2m1fn_x2
    if form == "nvfp4":
        config = workflow.NVFP4WeightOnlyConfig()
    else:
        config = workflow.MXDynamicActivationMXWeightConfig(activation_dtype=codes, weight_dtype=codes)
    if tensor.shape[0] % 16 == 0 if form == "nvfp4" else tensor.dtype == torch.bfloat16:
        layer = torch.nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(tensor.clone(), requires_grad=False)
        quantize_(layer, config)
        return layer.weight.detach()
    if form == "nvfp4":
        scale = per_tensor_amax_to_scale(tensor.abs().max())
        return NVFP4Tensor.to_nvfp4(tensor, per_tensor_scale=scale, is_swizzled_scales=True)
    return MXTensor.to_mx(tensor, codes, scaling_mode=ScaleCalculationMode.RCEIL, is_swizzled_scales=True)


def settled(torch, theirs, tensor):
    """The peer's NVFP4 tensor with the documented result for what has no scale."""
    if theirs.per_tensor_scale == 0:
        one = torch.ones_like(theirs.per_tensor_scale)
        return type(theirs).to_nvfp4(tensor.float(), per_tensor_scale=one, is_swizzled_scales=True)
    plain = theirs.get_hp_scales() / theirs.per_tensor_scale
    scales = torch.where(torch.isfinite(plain), plain, 1.0).to(torch.float8_e4m3fn).float()
    lost = ~torch.isfinite(1.0 / theirs.per_tensor_scale / scales)
    if lost.any():
        signs = torch.signbit(tensor.float()).to(torch.uint8) * 8
        signs = signs[:, ::2] | signs[:, 1::2] << 4
        theirs.qdata.copy_(torch.where(lost.repeat_interleave(8, 1), signs, theirs.qdata))
    return theirs


def arrays_of(theirs):
    names = ("qdata", "scale", "per_tensor_scale")
    return {name: getattr(theirs, name) for name in names if getattr(theirs, name, None) is not None}


def check(torch, form, tensor):
    theirs = packed_by_torchao(torch, form, tensor)
    if form == "nvfp4":
        theirs = settled(torch, theirs, tensor)
    ours = wp.quantize(tensor, f"torchao:{form}")
    assert_equal(torch, ours, arrays_of(theirs))
    for dtype in (torch.float32, torch.bfloat16):
        decoded = wp.dequantize(ours, f"torchao:{form}", shape=tuple(tensor.shape), dtype=dtype)
        assert as_bytes(decoded, torch) == as_bytes(theirs.dequantize(dtype), torch), dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
def test_bytes(torch, form, dtype, kind):
    for shape in SHAPES:
        check(torch, form, source(torch, form, kind, shape, dtype))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300),
    blocks=st.integers(1, 12),
    form=st.sampled_from(FORMATS),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_bytes_of_any_shape(torch, rows, blocks, form, kind, dtype, seed):
    check(torch, form, source(torch, form, kind, (rows, blocks * BLOCK[form]), dtype, seed))


@pytest.mark.parametrize("form", FORMATS)
def test_every_code_and_scale_is_decoded(torch, form):
    """NaN aside from its sign, which no one looks at."""
    rows, columns = 256, 32 * BLOCK[form]
    parts = wp.quantize(torch.zeros(rows, columns), f"torchao:{form}")
    for name in ("qdata", "scale"):
        size = parts[name].numel()
        every = torch.from_numpy(np.random.default_rng(3).integers(0, 256, size).astype(np.uint8))
        parts[name] = every.view(parts[name].dtype).reshape(parts[name].shape)
    theirs = packed_by_torchao(torch, form, torch.ones(rows, columns, dtype=torch.bfloat16))
    for name, part in parts.items():
        getattr(theirs, name).copy_(part)
    expected = theirs.dequantize(torch.float32)
    decoded = wp.dequantize(parts, f"torchao:{form}")
    assert torch.equal(torch.isnan(decoded), torch.isnan(expected))
    assert as_bytes(torch.nan_to_num(decoded), torch) == as_bytes(torch.nan_to_num(expected), torch)


@pytest.mark.parametrize(("form", "percent"), [("nvfp4", 9.51), ("mxfp8", 2.7), ("mxfp4", 11.6)])
def test_error(form, percent):
    weights = np.random.default_rng(0).standard_normal((512, 4096)).astype(np.float32)
    decoded = wp.dequantize(wp.quantize(weights, f"torchao:{form}"), f"torchao:{form}")
    error = 100 * np.sqrt(((decoded - weights) ** 2).mean() / (weights**2).mean())
    assert error == pytest.approx(percent, rel=0.03)


@pytest.mark.parametrize("form", FORMATS)
def test_zeros_are_zeros(form):
    parts = wp.quantize(np.zeros((20, 96), np.float32), f"torchao:{form}")
    assert not parts["qdata"].view(np.uint8).any()
    assert parts["scale"].shape == (32, 32 if form == "nvfp4" else 16)
    decoded = wp.dequantize(parts, f"torchao:{form}")
    assert decoded.shape == (20, 96)
    assert not decoded.any()


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_refused(form):
    with pytest.raises(FormatError, match="2 dimensions"):
        wp.quantize(np.ones(32, np.float32), f"torchao:{form}")
    with pytest.raises(FormatError, match="row of 40 weights is not a multiple of block_size"):
        wp.quantize(np.ones((2, 40), np.float32), f"torchao:{form}")
    with pytest.raises(FormatError, match="weight 33 is inf"):
        wp.quantize(np.where(np.arange(64) == 33, np.inf, 1.0).astype(np.float32).reshape(2, 32), f"torchao:{form}")
    with pytest.raises(ConfigError, match="block_size is always"):
        wp.quantize(np.ones((2, 64), np.float32), f"torchao:{form}", block_size=64)
