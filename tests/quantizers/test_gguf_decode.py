"""torch decodes blocks to the numbers of the kernels, of every type."""

from __future__ import annotations

import numpy as np
import pytest

import weightpack
from weightpack.errors import UnsupportedError

torch = pytest.importorskip("torch")

from weightpack.quantizers import gguf_decode  # noqa: E402

BLOCKS = [row for row in weightpack.gguf.types() if row.block_weights > 1 and row.read]
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q8_1": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,),
    "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_S": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
    "Q1_0": (0,), "Q2_0": (0,),
}  # fmt: skip
"""Where the scales of a block lie that any bytes would make infinite."""


def random_blocks(info, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Blocks of any bytes, but for scales, which are finite: small, large, subnormal, zero, negative."""
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (rows * blocks, info.block_bytes), np.uint8)
    scales = random.choice([1e-3, 0.37, -2.5, 6e-8, 0.0, -0.0, 3e4, 1.0], (rows * blocks, 2)).astype(np.float16)
    for number, at in enumerate(HALVES.get(info.name, ())):
        data[:, at : at + 2] = scales[:, number : number + 1].view(np.uint8)
    if info.name == "Q8_K":
        data[:, :4] = scales[:, :1].astype(np.float32).view(np.uint8)
    if info.name == "IQ1_M":
        # The four top nibbles of its scales are an f16: a small exponent.
        data[:, 55] &= 0x3F
    return data.reshape(rows, blocks * info.block_bytes)


@pytest.mark.parametrize("info", BLOCKS, ids=lambda info: info.name)
def test_the_same_numbers_as_the_kernels(info):
    packed = random_blocks(info, 7, 6)
    expected = weightpack.gguf.dequantize(packed, info.name)
    found = gguf_decode.decode(torch.from_numpy(packed), info.name, expected.shape)
    assert np.isfinite(expected).all()
    assert found.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("info", BLOCKS, ids=lambda info: info.name)
def test_rounded_once(info):
    packed = random_blocks(info, 3, 2, seed=1)
    for dtype in (torch.bfloat16, torch.float16):
        expected = weightpack.gguf.dequantize(torch.from_numpy(packed), info.name, dtype=dtype)
        found = gguf_decode.decode(torch.from_numpy(packed), info.name, expected.shape, dtype)
        assert found.dtype == dtype
        assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


def test_every_type_is_there():
    assert set(gguf_decode.decodable_types()) == {info.name for info in BLOCKS}


def test_in_steps(monkeypatch):
    monkeypatch.setattr(gguf_decode, "WEIGHTS_AT_ONCE", 100)
    (info,) = (info for info in BLOCKS if info.name == "Q8_0")
    packed = torch.from_numpy(random_blocks(info, 5, 3))
    assert torch.equal(gguf_decode.decode(packed, "q8_0", (5, 96)), weightpack.gguf.dequantize(packed, "q8_0"))


def test_blocks_that_begin_at_an_odd_byte():
    (info,) = (info for info in BLOCKS if info.name == "Q6_K")
    packed = torch.from_numpy(random_blocks(info, 1, 1))
    shifted = torch.cat((torch.zeros((1, 1), dtype=torch.uint8), packed), dim=-1)[:, 1:]
    assert torch.equal(gguf_decode.decode(shifted, "Q6_K", (1, 256)), weightpack.gguf.dequantize(packed, "Q6_K"))


def test_plain_types_are_no_blocks():
    with pytest.raises(UnsupportedError, match="F16 is not decoded by torch"):
        gguf_decode.decode(torch.zeros((1, 2), dtype=torch.uint8), "F16", (1, 1))


@pytest.mark.cuda
@pytest.mark.parametrize("info", BLOCKS, ids=lambda info: info.name)
def test_the_same_numbers_on_cuda(info):
    packed = random_blocks(info, 7, 6, seed=2)
    expected = weightpack.gguf.dequantize(packed, info.name)
    found = gguf_decode.decode(torch.from_numpy(packed).cuda(), info.name, expected.shape)
    assert found.is_cuda
    assert found.cpu().numpy().tobytes() == expected.tobytes()
