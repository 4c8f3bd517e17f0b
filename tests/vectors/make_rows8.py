"""Makes the golden vectors of torchao's rows of bytes and of quanto's types.

    python tests/vectors/make_rows8.py

writes `torchao.json` and `quanto.json` into `tests/vectors/formats`, as `tests/vectors/make.py` describes.
"""

import json
from importlib.metadata import version

import numpy as np
import torch
from make import HERE, normal

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
STORED = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    **{dtype: name for name, dtype in TYPES.items()},
}


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def case(note, form, dtype, weight, parts, decoded, group=None):
    return {
        "note": note,
        "format": form,
        "params": {} if group is None else {"block_size": group},
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


def grouped(form, group, weight):
    """torchao's integers and groups, and tensors with one scale."""
    import torchao.quantization as ao

    per_group = None if group is None else ao.PerGroup(group)
    if form == "int8":
        config = ao.Int8WeightOnlyConfig(granularity=per_group)
    elif form.startswith("float8"):
        config = ao.Float8WeightOnlyConfig(granularity=per_group or ao.PerTensor())
    else:
        config = ao.IntxWeightOnlyConfig(getattr(torch, form.replace("x", "")), per_group or ao.PerAxis(0))
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    ao.quantize_(layer, config)
    packed = layer.weight.detach()
    names = ("qdata", "scale") if form.startswith("float8") else ("qdata", "scale", "zero_point")
    parts = {name: getattr(packed, name) for name in names}
    # Its own decoding rounds to the type of the weights; vectors are in float32.
    scale = parts["scale"].float()
    scale = scale if scale.numel() == 1 else scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    return parts, parts["qdata"].float() * scale


def grouped_cases():
    forms = [("int8", 16), ("intx2", 16), ("intx3", None), ("intx4", 16), ("intx5", 24), ("intx6", 48), ("intx7", 8)]
    for form, group in [*forms, ("intx8", None), ("float8", 16), ("float8_tensor", None)]:
        for dtype, torch_dtype in TYPES.items():
            weight = torch.from_numpy(normal(5 * 48, 2)).reshape(5, 48).to(torch_dtype)
            weight[1, ::3] = -0.0
            weight[2] *= 2.0**-9
            weight[3] *= 512
            parts = grouped(form, group, weight)
            yield case("groups of all sizes", f"torchao:{form}", dtype, weight, *parts, group)
    for dtype, torch_dtype in TYPES.items():
        weight = torch.from_numpy(normal(5 * 48, 3)).reshape(5, 48).to(torch_dtype)
        parts, _ = grouped("intx1", 16, weight)
        parts["qdata"][weight < 0] = -1
        decoded = parts["qdata"].float() * parts["scale"].float().repeat_interleave(16, 1)
        yield {**case("decoded only", "torchao:intx1", dtype, weight, parts, decoded, 16), "source": None}


def quanto(form, weight):
    from optimum.quanto import QLinear, qtypes

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    layer = QLinear.from_module(layer, weights=qtypes[f"q{form}"])
    layer.freeze()
    parts = {name.removeprefix("weight."): part for name, part in layer.state_dict().items()}
    # Its own decoding rounds to the type of the weights; vectors are in float32.
    scale = parts["_scale"].float()
    if "_data" in parts:
        return parts, parts["_data"].float() * scale
    bits = int(form.removeprefix("int"))
    packed = parts["_data._data"]
    codes = torch.cat([packed >> bit & 2**bits - 1 for bit in range(0, 8, bits)])[: len(scale)]
    return parts, (codes.float() * scale - parts["_shift"].float()).reshape(weight.shape)


def cases(backend, pack):
    for form in ("int8", "float8"):
        for dtype, torch_dtype in TYPES.items():
            weight = torch.from_numpy(normal(5 * 48, 1)).reshape(5, 48).to(torch_dtype)
            yield case("rows", f"{backend}:{form}", dtype, weight, *pack(form, weight))
            weight[1, ::3] = -0.0
            weight[2] *= 2.0**-9
            weight[3] *= 512
            yield case("rows of all sizes", f"{backend}:{form}", dtype, weight, *pack(form, weight))


def groups():
    """quanto's 4-bit and 2-bit types, which may divide rows into groups."""
    shapes = {"small groups": (3, 160), "rows": (8, 48), "uneven rows": (5, 40), "one row": (1, 24)}
    for form in ("int4", "int2"):
        for dtype, torch_dtype in TYPES.items():
            # The kernel that quanto keeps such weights for takes sixteen rows.
            rows = 16 if (form, dtype) == ("int4", "BF16") else 2
            for note, shape in {"groups": (rows, 256), **shapes}.items():
                weight = torch.from_numpy(normal(shape[0] * shape[1], 2)).reshape(shape).to(torch_dtype)
                weight[-1, : shape[1] // 2] *= 2.0**-9
                if len(weight) > 2:
                    weight[2] = 0.25
                yield case(note, f"quanto:{form}", dtype, weight, *quanto(form, weight))


def main():
    for backend, package, pack in (("torchao", "torchao", torchao), ("quanto", "optimum-quanto", quanto)):
        file = {
            "peer": package,
            "version": version(package),
            "recipe": "tests/vectors/make_rows8.py",
            "cases": [*cases(backend, pack), *(grouped_cases() if backend == "torchao" else groups())],
        }
        (HERE / f"{backend}.json").write_text(json.dumps(file, indent=1) + "\n")


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
