"""Makes the golden vectors of torchao's blocks with swizzled scales.

    python tests/vectors/make_torchao_blocks.py

writes `torchao_blocks.json` into `tests/vectors/formats`, as `tests/vectors/make.py` describes.
"""

import json
from importlib.metadata import version

import numpy as np
import torch
from make import HERE, normal
from make_rows8 import STORED, TYPES, case
from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig, NVFP4WeightOnlyConfig
from torchao.quantization import quantize_

STORED |= {torch.uint8: "U8", torch.float8_e8m0fnu: "F8_E8M0"}


def config(form):
    if form == "nvfp4":
        return NVFP4WeightOnlyConfig()
    codes = torch.float8_e4m3fn if form == "mxfp8" else torch.float4_e2m1fn_x2
    return MXDynamicActivationMXWeightConfig(activation_dtype=codes, weight_dtype=codes)


def pack(form, weight):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(layer, config(form))
    packed = layer.weight.detach()
    names = ("qdata", "scale", "per_tensor_scale") if form == "nvfp4" else ("qdata", "scale")
    return {name: getattr(packed, name) for name in names}, packed.dequantize(torch.float32)


SHAPES = (
    ("nvfp4", "BF16", (144, 48)),
    ("nvfp4", "F32", (16, 80)),
    ("mxfp8", "BF16", (133, 32)),
    ("mxfp8", "BF16", (3, 160)),
    ("mxfp4", "BF16", (133, 32)),
    ("mxfp4", "BF16", (3, 160)),
)
"""Scales in one and in two tiles, down and across."""


def cases():
    for form, dtype, (rows, columns) in SHAPES:
        weight = torch.from_numpy(normal(rows * columns, 1)).reshape(rows, columns).to(TYPES[dtype])
        weight[0, ::3] = -0.0
        weight[1] *= 2.0**-9
        weight[rows - 1] *= 512
        weight[rows - 1, :32] = 0
        yield case("rows of all sizes", f"torchao:{form}", dtype, weight, *pack(form, weight))


def main():
    file = {
        "peer": "torchao",
        "version": version("torchao"),
        "recipe": "tests/vectors/make_torchao_blocks.py",
        "cases": list(cases()),
    }
    (HERE / "torchao_blocks.json").write_text(json.dumps(file, indent=1) + "\n")


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
