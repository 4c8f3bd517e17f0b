"""Codes of NF4 and E2M1: for every number the one that ModelOpt takes."""

from __future__ import annotations

import warnings

import pytest

from tests.conftest import find_peer

torch = find_peer("torch")
find_peer("modelopt")

with warnings.catch_warnings():
    # It warns of kernels that a machine without CUDA does not have.
    warnings.simplefilter("ignore")
    nf4 = find_peer("modelopt.torch.quantization.qtensor.nf4_tensor")
    nvfp4 = find_peer("modelopt.torch.quantization.qtensor.nvfp4_tensor")

from weightpack.quantizers.modelopt_encode import e2m1_codes, nf4_codes  # noqa: E402


def every(dtype):
    """All numbers of a type of two bytes that are finite."""
    values = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_nf4(dtype):
    values = every(dtype) if dtype.itemsize == 2 else torch.linspace(-1, 1, 100_003)
    values = values[values.abs() <= 1]
    if dtype == torch.float32:
        table = nf4.nf4_table.float()
        middle = (table[1:] + table[:-1]) / 2
        near = [torch.nextafter(middle, torch.full_like(middle, side)) for side in (-2, 2)]
        values = torch.cat([values, table, middle, *near, every(torch.bfloat16).float().clamp(-1, 1)])
    expected = nf4._quantize_to_nearest_lut(values, nf4.nf4_table.to(dtype))
    assert torch.equal(nf4_codes(values), expected.to(torch.uint8))
    assert torch.equal(nf4_codes(values.reshape(1, -1)), expected.to(torch.uint8).reshape(1, -1))


def test_e2m1():
    steps = torch.arange(0, 9, 1 / 64)
    near = [torch.nextafter(steps, torch.full_like(steps, side)) for side in (-1, 10)]
    values = torch.cat([steps, *near, torch.randn(50_000) * 3, every(torch.float16).float()])
    values = torch.cat([values, -values])
    # ModelOpt writes over what it is given.
    expected = nvfp4.NVFP4QTensor._cast_fp4(values.clone())
    assert torch.equal(e2m1_codes(values.clone()), expected)
