"""Makes the golden vectors of torchao's packed 4-bit weights.

    WEIGHTPACK_INT4_PEER=quantize.py python tests/vectors/make_torchao_int4.py

writes `torchao_int4.json` into `tests/vectors/formats`, as `tests/vectors/make.py` describes. torchao 0.18.0 packs
them with the functions of `fbgemm_gpu/experimental/gen_ai/quantize.py`, a file of fbgemm-gpu-genai 1.9.0 (the wheel
of Linux on x86-64 for Python 3.11); those of `mslk/quantize/shuffle.py` in meta-pytorch/MSLK at
2a3c89786adf55359cfcc5d5cb9f4c41875eaac6 give the same bytes. `tests/oracles/int4_peer.py` says more.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from make import HERE, normal
from make_rows8 import TYPES, case

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.oracles.int4_peer import packed

SHAPES = {"groups of 128": ((3, 256), None), "small groups": ((5, 80), 16), "rows": ((4, 48), 48)}


def arrays(weight, group):
    """The arrays, and the weights that the kernels multiply with: code·scale + zero point."""
    group = group or 128
    found = packed(weight, group)
    parts = {name: getattr(found, name) for name in ("qdata", "scale", "zero_point")}
    low, high = (parts["qdata"] << 4) >> 4, parts["qdata"] >> 4
    codes = torch.stack([low, high], -1).reshape(weight.shape).float()
    scale, zero = (parts[name].float().t().repeat_interleave(group, 1) for name in ("scale", "zero_point"))
    return parts, codes * scale + zero


def cases():
    for note, (shape, group) in SHAPES.items():
        for dtype, torch_dtype in TYPES.items():
            weight = torch.from_numpy(normal(shape[0] * shape[1], 4)).reshape(shape).to(torch_dtype)
            weight[0, ::3] = -0.0
            weight[1] *= 2.0**-9
            weight[2] *= 512
            weight[2, 1 : shape[1] // 2] = 0.25
            yield case(note, "torchao:int4", dtype, weight, *arrays(weight, group), group)
    for dtype, torch_dtype in TYPES.items():
        ties = torch.arange(32) / 2 - 4
        rows = [ties, ties.flip(0) * 2.0**-7, ties.abs(), torch.full((32,), 0.75), ties * 2.0**-24, -ties.abs() * 300]
        weight = torch.stack(rows).to(torch_dtype)
        yield case("ties and small ranges", "torchao:int4", dtype, weight, *arrays(weight, 32), 32)
    for dtype in ("BF16", "F32"):
        weight = torch.zeros(2, 64, dtype=TYPES[dtype])
        weight[1, 32:] = torch.from_numpy(normal(32, 5)).to(TYPES[dtype])
        yield case("zeros", "torchao:int4", dtype, weight, *arrays(weight, 32), 32)


def main():
    file = {
        "peer": "torchao",
        "version": version("torchao"),
        "recipe": "tests/vectors/make_torchao_int4.py",
        "cases": list(cases()),
    }
    (HERE / "torchao_int4.json").write_text(json.dumps(file, indent=1) + "\n")


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
