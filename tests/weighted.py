"""Encoding with importance, through the compiled module."""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from weightpack import _rust


def quantize(
    form: str, rows: NDArray[np.float32], importance: NDArray[np.float32] | None, threads: int | None = None
) -> NDArray[np.uint8]:
    """The bytes of a GGUF type, [rows, row bytes]. `importance` is one number per column."""
    shape, params = list(rows.shape), json.dumps({"block_size": None, "double_quant": False})
    (component,) = json.loads(_rust.layout(form, shape, params))
    out = np.full(component["bytes"], 0xAA, np.uint8)
    data = np.ascontiguousarray(rows).view(np.uint8).reshape(-1)
    _rust.encode(form, shape, params, data, "F32", [out], threads, importance)
    return out.reshape(len(rows), -1)
