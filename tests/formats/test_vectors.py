"""Golden vectors of the formats, from Python, without the peers."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import weightpack as wp

from ..weighted import quantize

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
FOLDER = Path(__file__).parents[1] / "vectors" / "formats"
FILES = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
CASES = [
    pytest.param(case, id=f"{file['peer']}-{file['version']} {case['format']} {case['dtype']} {case['note']}")
    for file in FILES
    for case in file["cases"]
]


@pytest.mark.parametrize("case", CASES)
def test_vector(case):
    if case["source"] is None:
        parts = {
            name: np.frombuffer(bytes.fromhex(part["data"]), DTYPES.get(part["dtype"], np.uint8)).reshape(part["shape"])
            for name, part in case["components"].items()
        }
    else:
        source = np.frombuffer(bytes.fromhex(case["source"]), DTYPES[case["dtype"]]).reshape(case["shape"])
        if "importance" in case:
            importance = np.frombuffer(bytes.fromhex(case["importance"]), np.float32)
            parts = {"": quantize(case["format"], source, importance)}
        else:
            parts = wp.quantize(source, case["format"], **case["params"])
        assert set(parts) == set(case["components"])
        for name, expected in case["components"].items():
            assert parts[name].tobytes().hex() == expected["data"], name
            assert list(parts[name].shape) == expected["shape"], name
    shape = case["shape"] if "_shift" in parts else None
    decoded = wp.dequantize(parts, case["format"], shape=shape, block_size=case["params"].get("block_size"))
    assert list(decoded.shape) == case["shape"]
    assert decoded.tobytes().hex() == case["decoded"]
