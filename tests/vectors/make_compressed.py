"""Makes the golden vectors of compressed-tensors' floats in groups.

    python tests/vectors/make_compressed.py

writes `compressed_tensors.json` into `tests/vectors/formats`, as `tests/vectors/make.py` describes: every code
with every kind of scale, decoded by the library's own functions in 32 bits.
"""

import json
from importlib.metadata import version

import torch
from make import HERE
from make_modelopt import case


def cases():
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    packed = torch.arange(256, dtype=torch.uint8).repeat(2).reshape(4, 128)
    codes = unpack_fp4_from_uint8(packed, 4, 256, torch.float32)

    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    scale = (torch.arange(64, dtype=torch.uint8) * 2).clamp(max=126).reshape(4, 16).view(torch.float8_e4m3fn)
    divisor = torch.tensor([1297.3])
    parts = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": divisor}
    decoded = dequantize(codes, scale.float(), args=args, dtype=torch.float32, global_scale=divisor)
    yield case("every code", "compressed-tensors:nvfp4", "F32", None, parts, decoded)

    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32)
    scale = (torch.arange(32, dtype=torch.uint8) * 8).reshape(4, 8)
    decoded = dequantize(codes, decompress_mx_scale(scale).float(), args=args, dtype=torch.float32)
    parts = {"weight_packed": packed, "weight_scale": scale}
    yield case("every code", "compressed-tensors:mxfp4", "F32", None, parts, decoded)

    args = QuantizationArgs(num_bits=8, type="float", strategy="group", group_size=32)
    codes = torch.arange(256, dtype=torch.uint8)
    # NaN has no one encoding once it is multiplied.
    codes = codes.where((codes & 127) != 127, 0).reshape(4, 64).view(torch.float8_e4m3fn)
    scale = torch.tensor([[0, 1], [100, 127], [130, 200], [245, 7]], dtype=torch.uint8)
    decoded = dequantize(codes, decompress_mx_scale(scale).float(), args=args, dtype=torch.float32)
    yield case("every number", "modelopt:mxfp8", "F32", None, {"": codes, "weight_scale": scale}, decoded)


def main():
    file = {
        "peer": "compressed-tensors",
        "version": version("compressed-tensors"),
        "recipe": "tests/vectors/make_compressed.py",
        "cases": list(cases()),
    }
    (HERE / "compressed_tensors.json").write_text(json.dumps(file, indent=1) + "\n")


if __name__ == "__main__":
    main()
