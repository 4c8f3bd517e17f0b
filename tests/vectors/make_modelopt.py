"""Makes the golden vectors of ModelOpt's exported formats and of FP8 with scales beside it.

    python tests/vectors/make_modelopt.py

writes `modelopt.json` (layers exported by ModelOpt, decoded by its own classes), `transformers.json`
(blocks) and `torch.json` (scales for rows and tensors, which are decoded only) into
`tests/vectors/formats`, as `tests/vectors/make.py` describes.
"""

import copy
import json
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import torch
from make import HERE, normal

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
STORED = {torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
PRESETS = {
    "modelopt:fp8": "FP8_DEFAULT_CFG",
    "modelopt:fp8_row": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "modelopt:fp8_block": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "modelopt:int8": "INT8_WEIGHT_ONLY_CFG",
    "modelopt:int4": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "modelopt:nvfp4": "W4A16_NVFP4_CFG",
    "modelopt:mxfp4": "MXFP4_DEFAULT_CFG",
}


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def case(note, form, dtype, weight, parts, decoded):
    return {
        "note": note,
        "format": form,
        "params": {},
        "dtype": dtype,
        "shape": list(decoded.shape),
        "source": None if weight is None else raw(weight).hex(),
        "components": {
            name: {"dtype": STORED[part.dtype], "shape": list(part.shape), "data": raw(part).hex()}
            for name, part in parts.items()
        },
        "decoded": raw(decoded.float()).hex(),
    }


def modelopt():
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.unified_export_hf import _export_quantized_weight
    from modelopt.torch.quantization import qtensor

    def export(form, weight):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
        layer.weight.data = weight.clone()
        model = torch.nn.Sequential(layer)
        mtq.quantize(model, copy.deepcopy(getattr(mtq, PRESETS[form])), forward_loop=lambda model: None)
        _export_quantized_weight(layer, weight.dtype)
        state = {key: value for key, value in layer.state_dict().items() if "quantizer" not in key}
        return {"": state.pop("weight"), **state}

    def decode(form, parts, shape):
        shape, codes, scale = torch.Size(shape), parts[""], parts["weight_scale"]
        if form == "modelopt:nvfp4":
            scales = {"scale": scale, "double_scale": parts["weight_scale_2"]}
            return qtensor.NVFP4QTensor(shape, torch.float32, codes).dequantize(**scales, block_sizes={-1: 16})
        if form == "modelopt:mxfp4":
            return qtensor.MXFP4QTensor(shape, torch.float32, codes).dequantize(scale=scale, block_sizes={-1: 32})
        if form == "modelopt:int4":
            # No class of ModelOpt reads what it exports so.
            rows = torch.stack([codes & 15, codes >> 4], 1).reshape(shape).to(torch.int8)
            return (rows - ((rows & 8) << 1)).float() * scale.repeat_interleave(128, 1)
        kind = qtensor.INT8QTensor if form == "modelopt:int8" else qtensor.FP8QTensor
        if form == "modelopt:fp8_block":
            scale = scale.reshape(-(-shape[0] // 128), -1)
            return kind(shape, torch.float32, codes).dequantize(scale=scale, block_sizes={0: 128, 1: 128})
        return kind(shape, torch.float32, codes).dequantize(scale=scale.reshape(-1, 1))

    for form in PRESETS:
        columns = 256 if form == "modelopt:fp8_block" else 128
        for dtype, torch_dtype in TYPES.items():
            weight = torch.from_numpy(normal(4 * columns, 1)).reshape(4, columns).to(torch_dtype)
            parts = export(form, weight)
            yield case("rows", form, dtype, weight, parts, decode(form, parts, weight.shape))
        weight = torch.from_numpy(normal(4 * columns, 2, 3)).reshape(4, columns)
        weight[1] = 0
        weight[2] *= 2.0**-12
        weight[3, ::3] = -0.0
        parts = export(form, weight)
        yield case("row of zeros, small and minus zero", form, "F32", weight, parts, decode(form, parts, weight.shape))


def transformers():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float")
    quantizer = SimpleNamespace(quantization_config=config)
    weight = torch.zeros(128, 256)
    weight[:, 128:] = torch.from_numpy(normal(128 * 128)).reshape(128, 128)
    packed = Fp8Quantize(quantizer)._quantize_one("a.weight", weight.bfloat16())
    parts = {"": packed["a.weight"], "weight_scale_inv": packed["a.weight_scale_inv"]}
    decoded = Fp8Dequantize(quantizer)._dequantize_one(parts[""], parts["weight_scale_inv"], torch.float32)
    yield case("block of zeros, and another", "fp8:block", "BF16", weight.bfloat16(), parts, decoded)


def by_torch():
    codes = torch.arange(254, dtype=torch.uint8)
    codes = torch.where(codes < 127, codes, codes + 1).reshape(2, 127).view(torch.float8_e4m3fn)
    rows = torch.tensor([[0.01], [3.0]])
    yield case("every code", "fp8:row", "F32", None, {"": codes, "weight_scale": rows}, codes.float() * rows)
    one = torch.tensor(0.3)
    yield case("every code", "fp8:tensor", "F32", None, {"": codes, "weight_scale": one}, codes.float() * one)


def main():
    made = {
        "modelopt": ("nvidia-modelopt", modelopt),
        "transformers": ("transformers", transformers),
        "torch": ("torch", by_torch),
    }
    for name, (package, cases) in made.items():
        file = {
            "peer": package,
            "version": version(package),
            "recipe": "tests/vectors/make_modelopt.py",
            "cases": list(cases()),
        }
        (HERE / f"{name}.json").write_text(json.dumps(file, indent=1) + "\n")


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
