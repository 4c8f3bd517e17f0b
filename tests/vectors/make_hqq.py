"""Makes the golden vectors of HQQ.

    python tests/vectors/make_hqq.py

writes `hqq.json` beside this file: the state of layers that hqq packed on the CPU, and the weights that it makes of
them when it computes in 64 bits, rounded once to 32. Needs hqq, which the tests do not.
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch

ROWS, COLUMNS, GROUP = 12, 16, 8
DTYPES = {torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64", torch.float16: "F16", torch.float32: "F32"}


def stored(array):
    array = array.detach().contiguous()
    return [DTYPES[array.dtype], list(array.shape), array.reshape(-1).view(torch.uint8).numpy().tobytes().hex()]


def cases():
    from hqq.core.quantize import HQQLinear, hqq_base_quant_config

    for bits in (8, 6, 5, 4, 3, 2, 1.58, 1):
        for axis in (1, 0):
            layer = torch.nn.Linear(COLUMNS, ROWS, bias=False)
            generator = torch.Generator().manual_seed(int(bits * 10) + axis)
            layer.weight.data = torch.randn(ROWS, COLUMNS, generator=generator)
            # For 3 bits, 24 lines of codes are padded to 30 along axis 1, and 8 to 10 along axis 0.
            config = hqq_base_quant_config(nbits=bits, group_size=GROUP, axis=axis, view_as_float=bits == 4)
            packed = HQQLinear(layer, config, compute_dtype=torch.float16, device="cpu")
            arrays = {name: stored(array) for name, array in packed.state_dict().items()}
            packed.meta["compute_dtype"] = torch.float64
            for name in ("scale", "zero"):
                packed.meta[name] = packed.meta[name].double()
            yield {"bits": bits, "axis": axis, "arrays": arrays, "weights": stored(packed.dequantize().float())}


def main():
    told = {"peer": "hqq", "version": version("hqq"), "recipe": "tests/vectors/make_hqq.py"}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}," for key, value in told.items()]
    made = ",\n".join(json.dumps(case) for case in cases())
    text = "\n".join(["{", *lines, '"cases": [', made, "]", "}", ""])
    (Path(__file__).parent / "hqq.json").write_text(text)


if __name__ == "__main__":
    main()
