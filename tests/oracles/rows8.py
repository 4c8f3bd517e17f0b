"""Weights for formats of one byte per weight and one scale per row."""

from __future__ import annotations

from typing import Any

import numpy as np

from .test_bitsandbytes import weights

SHAPES = ((1, 1), (1, 16), (3, 1), (2, 16), (3, 48), (5, 80), (4, 1000), (2, 2736), (1, 4304), (130, 33))
DTYPES = ("float32", "bfloat16", "float16")
KINDS = ("normal", "heavy", "zeros", "sparse", "constant", "tiny", "subnormal", "huge", "mixed", "halves", "eighths")


def tensor_of(torch: Any, kind: str, shape: tuple[int, ...], dtype: str, seed: int = 0, most: float = 127.0) -> Any:
    """A finite tensor of a named kind; `most` is the largest of `halves`, whole and half numbers that are
    ties once a row is divided by a power of two, and of `eighths`, ties of E4M3 of all sizes."""
    count = int(np.prod(shape, dtype=np.int64))
    if kind in ("halves", "eighths"):
        rng = np.random.default_rng(seed)
        if kind == "halves":
            values = rng.integers(-2 * int(most), 2 * int(most) + 1, count) / 2
        else:
            values = rng.integers(-31, 32, count) / 16 * 2.0 ** rng.integers(-10, 9, count)
        array = np.clip(values, -most, most).astype(np.float32).reshape(shape)
        array[:, 0] = most
    else:
        array = weights(None, kind, count, seed).reshape(shape)
    tensor = torch.from_numpy(array).to(getattr(torch, dtype))
    # "huge" overflows float16; only finite weights are compared.
    return torch.where(torch.isfinite(tensor), tensor, torch.ones((), dtype=tensor.dtype))


def as_bytes(tensor: Any, torch: Any) -> bytes:
    data: bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


def assert_equal(torch: Any, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype, name
        assert ours[name].shape == expected.shape, name
        assert as_bytes(ours[name], torch) == as_bytes(expected, torch), name
