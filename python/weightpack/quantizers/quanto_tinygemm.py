"""The form in which torch's CPU kernel for 4-bit weights keeps them, and the way back.

optimum-quanto puts bfloat16 `int4` weights in groups of 128 into this form: what it calls TinyGemm. It
turns them back by a product with an identity matrix of K x K, which for wide layers takes more memory
and time than loading. The form is that of `torch._convert_weight_to_int4pack_for_cpu`: blocks of rows, in
them column after column, each byte two rows. How many rows a block has and which two share a byte depends
on the CPU; it is read off packed samples once, checked, and undone by an index.

Scale and mid = scale * 8 - shift lie together, bfloat16 [K / 128, N, 2]; mid is rounded, so the shift
that comes back may be another one than went in. That is what optimum-quanto saves, too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ..errors import BackendError

GROUP_SIZE = 128
ROWS_MULTIPLE = 16
"""The kernel takes numbers of rows that are a multiple of it."""
_SAMPLE_COLUMNS = 32
_CHUNK_ROWS = 512
"""Rows converted at a time, a multiple of the rows of a block on any CPU."""


def pack_rows(codes: Any) -> Any:
    """Codes (uint8 [N, K], N a multiple of 16) in the form of the kernel: uint8 [N, K / 2]."""
    rows, columns = codes.shape
    packed = torch.empty((rows, columns // 2), dtype=torch.uint8)
    for start in range(0, rows, _CHUNK_ROWS):
        part = codes[start : start + _CHUNK_ROWS].to(torch.int32).contiguous()
        packed[start : start + _CHUNK_ROWS] = torch._convert_weight_to_int4pack_for_cpu(part, 2)
    return packed


def unpack_rows(packed: Any) -> Any:
    """The codes (uint8 [N, K]) of what `pack_rows` gives."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    block = _block_rows()
    codes = torch.empty((rows, columns), dtype=torch.uint8)
    flat = packed.reshape(-1)
    for start in range(0, rows, _CHUNK_ROWS):
        end = min(start + _CHUNK_ROWS, rows)
        whole = start + (end - start) // block * block
        for first, last, height in ((start, whole, block), (whole, end, end - whole)):
            if first < last:
                stored = flat[first * columns // 2 : last * columns // 2]
                _unpack_blocks(stored.view(-1, columns, height // 2), codes[first:last].view(-1, height, columns))
    return codes


def _unpack_blocks(stored: Any, codes: Any) -> None:
    """Blocks as they are kept (bytes [blocks, K, rows / 2]) to codes [blocks, rows, K]."""
    low, high = _rows_of_nibbles(codes.shape[1])
    pairs = stored.transpose(1, 2)
    codes[:, low] = pairs & 15
    codes[:, high] = pairs >> 4


def mid_of(scale: Any, shift: Any) -> Any:
    """What the kernel keeps instead of the shift (bfloat16)."""
    return -shift + 8 * scale


def shift_of(scale: Any, mid: Any) -> Any:
    """The shift that a mid stands for (bfloat16)."""
    return 8 * scale - mid


@lru_cache(maxsize=1)
def _block_rows() -> int:
    """Rows of a block on this CPU; `BackendError` where torch keeps weights in another form."""
    sample = torch.zeros((256, _SAMPLE_COLUMNS), dtype=torch.uint8)
    sample[:, 0] = 1
    nonzero = pack_rows(sample).reshape(-1) != 0
    block = 2 * int(torch.argmin(nonzero.to(torch.uint8)))
    if block == 0 or 256 % block or _CHUNK_ROWS % block:
        raise BackendError(
            f"torch {torch.__version__} keeps 4-bit weights in blocks of {block} rows, which is not known"
        )
    return block


@lru_cache(maxsize=8)
def _rows_of_nibbles(rows: int) -> tuple[Any, Any]:
    """The row of each low nibble and of each high one, in a block of `rows`."""
    ids = torch.arange(rows, dtype=torch.uint8)[:, None].expand(rows, _SAMPLE_COLUMNS)
    ones, sixteens = (pack_rows(digit).reshape(-1)[: rows // 2].to(torch.int64) for digit in (ids & 15, ids >> 4))
    low, high = (ones & 15) + 16 * (sixteens & 15), (ones >> 4) + 16 * (sixteens >> 4)
    if not torch.equal(torch.cat([low, high]).sort().values, torch.arange(rows)):
        raise BackendError(f"torch {torch.__version__} keeps 4-bit weights in a form that is new")
    return low, high
