"""The bytes do not depend on the number of threads, on the slab size, or on verification."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from weightpack import _rust

from .conftest import digest, normal

FORMATS = [
    "bitsandbytes:nf4",
    "bitsandbytes:fp4",
    "bitsandbytes:int8",
    "torchao:int8",
    "torchao:float8",
    "quanto:int8",
    "quanto:float8",
    "quanto:int4",
    "quanto:int2",
    "gguf:q4_0",
    "gguf:q8_0",
    "f16",
]


def tensors(columns: int) -> dict[str, np.ndarray]:
    return {
        "a.weight": normal((301, columns), 1),
        "b.weight": normal((64, columns), 2, np.float32),
        "c.weight": normal((7, columns), 3, np.float64),
        "d.weight": np.zeros((33, columns), np.float16),
    }


def convert(source: Path, target: Path, to: str, **options: object) -> dict[str, str]:
    checkpoint = _rust.Checkpoint.open(str(source))
    names = [tensor["name"] for tensor in json.loads(checkpoint.describe())["tensors"]]
    params = {"double_quant": True} if options.pop("double_quant", False) else {}
    assigned = [{"checkpoint": 0, "name": name, "as": name, "format": to, "params": params} for name in names]
    container = "gguf" if to.startswith("gguf:") else "safetensors"
    output = {"container": container, "stem": "model", "tensors": assigned}
    request = {"destination": str(target), "kind": "file", "outputs": [output], "options": options}
    _rust.Plan.build(json.dumps(request), [checkpoint]).run(overwrite=False, resume=False, on_progress=None)
    return digest(target)


@pytest.mark.parametrize("to", [*FORMATS, "double quant"])
@pytest.mark.parametrize("columns", [4096, 4320])
def test_threads_and_slabs(make_model: Callable[..., Path], tmp_path: Path, to: str, columns: int) -> None:
    source = make_model(tensors(columns))
    more: dict[str, object] = {"double_quant": True} if to == "double quant" else {}
    to = "bitsandbytes:nf4" if to == "double quant" else to
    seen = set()
    for number, options in enumerate(
        [
            {"threads": 1},
            {"threads": 2},
            {"threads": 8},
            {"threads": 1, "slab_bytes": 1},
            {"threads": 3, "slab_bytes": 50_000},
            {"threads": 2, "slab_bytes": 1 << 30},
            {"threads": 2, "verify": False, "sync": False},
        ]
    ):
        target = tmp_path / f"{number}.{'gguf' if to.startswith('gguf:') else 'safetensors'}"
        seen.add(tuple(convert(source, target, to, **options, **more).values()))
    assert len(seen) == 1
