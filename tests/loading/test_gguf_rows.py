"""Blocks that are stored as rows of bytes, read as those of a GGUF file."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import weightpack as wp  # noqa: E402
from weightpack.errors import CheckpointError  # noqa: E402
from weightpack.loading.gguf_rows import StoredRows  # noqa: E402
from weightpack.loading.source import StateDict  # noqa: E402
from weightpack.streaming import Job  # noqa: E402


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return torch.randn(6, 64)


def stored(weights, **more):
    return StateDict({"a.0.weight": wp.gguf.quantize(weights, "Q8_0"), "a.1.weight": weights, **more})


def test_entries_are_those_of_blocks(weights):
    rows = StoredRows(stored(weights), {"a.0": "Q8_0"}, {})
    packed, plain = rows.entries["a.0.weight"], rows.entries["a.1.weight"]
    assert (packed.shape, packed.dtype, packed.format, packed.nbytes) == ((6, 64), "Q8_0", "gguf:q8_0", 6 * 68)
    assert not packed.is_plain
    assert plain.is_plain
    assert StoredRows(stored(weights), {"a.0": "Q8_0"}, {"a.0": (3, 4, 32)}).entries["a.0.weight"].shape == (3, 4, 32)


def test_blocks_are_copied_and_decoded(weights):
    rows = StoredRows(stored(weights), {"a.*": "Q8_0", "a.1": None}, {})
    blocks = wp.gguf.quantize(weights, "Q8_0")
    out = torch.empty(6, 64, dtype=torch.bfloat16)
    (copied,), (decoded,) = rows.fill(
        [Job("a.0.weight", "copy"), Job("a.0.weight", "bf16")], [[torch.empty_like(blocks)], [out]], 1
    )
    assert torch.equal(copied, blocks)
    assert decoded is out
    assert torch.equal(out, torch.as_tensor(wp.gguf.dequantize(blocks, "Q8_0", dtype=torch.bfloat16)))
    assert rows.array("a.1.weight") is weights
    with pytest.raises(CheckpointError, match="only decoded as a whole"):
        rows.fill([Job("a.0.weight", "f32", add=1.0)], [[torch.empty(6, 64)]], 1)


def test_what_is_no_blocks(weights):
    with pytest.raises(CheckpointError, match=r'"a\.1\.weight" is F32 \[6, 64\]'):
        StoredRows(stored(weights), {"a.*": "Q8_0"}, {})
    with pytest.raises(CheckpointError, match="holds blocks of Q4_0, of 18 bytes"):
        StoredRows(stored(weights), {"a.0": "Q4_0"}, {})
    with pytest.raises(CheckpointError, match="holds 384 weights"):
        StoredRows(stored(weights), {"a.0": "Q8_0"}, {"a.0": (6, 63)})
