"""Makes the golden vectors of torchao's and quanto's rows of bytes.

    python tests/vectors/make_rows8.py

writes `torchao.json` and `quanto.json` into `tests/vectors/formats`, as `tests/vectors/make.py` describes.
"""

import json
from importlib.metadata import version

import numpy as np
import torch
from make import HERE, normal

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
STORED = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", **{dtype: name for name, dtype in TYPES.items()}}


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def case(note, form, dtype, weight, parts, decoded):
    return {
        "note": note,
        "format": form,
        "params": {},
        "dtype": dtype,
        "shape": list(weight.shape),
        "source": raw(weight).hex(),
        "components": {
            name: {"dtype": STORED[part.dtype], "shape": list(part.shape), "data": raw(part).hex()}
            for name, part in parts.items()
        },
        "decoded": raw(decoded.float()).hex(),
    }


def torchao(form, weight):
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(layer, Int8WeightOnlyConfig() if form == "int8" else Float8WeightOnlyConfig())
    names = ("qdata", "scale", "zero_point") if form == "int8" else ("qdata", "scale")
    packed = layer.weight.detach()
    return {name: getattr(packed, name) for name in names}, packed.dequantize(torch.float32)


def quanto(form, weight):
    from optimum.quanto import QLinear, qfloat8, qint8

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    layer = QLinear.from_module(layer, weights=qint8 if form == "int8" else qfloat8)
    layer.freeze()
    parts = {name.removeprefix("weight."): part for name, part in layer.state_dict().items()}
    # Its own decoding rounds to the type of the weights; vectors are in float32.
    return parts, parts["_data"].float() * parts["_scale"].float()


def cases(backend, pack):
    for form in ("int8", "float8"):
        for dtype, torch_dtype in TYPES.items():
            weight = torch.from_numpy(normal(5 * 48, 1)).reshape(5, 48).to(torch_dtype)
            yield case("rows", f"{backend}:{form}", dtype, weight, *pack(form, weight))
            weight[1, ::3] = -0.0
            weight[2] *= 2.0**-9
            weight[3] *= 512
            yield case("rows of all sizes", f"{backend}:{form}", dtype, weight, *pack(form, weight))


def main():
    for backend, package, pack in (("torchao", "torchao", torchao), ("quanto", "optimum-quanto", quanto)):
        file = {
            "peer": package,
            "version": version(package),
            "recipe": "tests/vectors/make_rows8.py",
            "cases": list(cases(backend, pack)),
        }
        (HERE / f"{backend}.json").write_text(json.dumps(file, indent=1) + "\n")


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
