"""Model folders of one layer, packed by the libraries themselves, with the weight that each library, or the
published formula, makes of them."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.conftest import find_peer

from .test_integer_sources import eights, words

ROWS, COLUMNS = 64, 256
MODULE = "model.layers.0.mlp.up_proj"


@dataclass(frozen=True)
class Packed:
    """Arrays by name behind the module's, the section of the config, and the weight in the type that the
    library computes it in; `form` is how the name of its format begins."""

    arrays: Mapping[str, torch.Tensor]
    section: Mapping[str, Any] | None
    weight: torch.Tensor
    form: str
    metadata: Mapping[str, str] = field(default_factory=dict)


def write(packed: Packed, folder: Path) -> Path:
    """The model folder: the packed layer, and a norm."""
    folder.mkdir()
    tensors = {f"{MODULE}.{name}": value.detach().contiguous() for name, value in packed.arrays.items()}
    tensors["model.norm.weight"] = torch.ones(ROWS, dtype=torch.bfloat16)
    save = find_peer("safetensors.torch").save_file
    save(tensors, folder / "model.safetensors", {"format": "pt", **packed.metadata})
    config: dict[str, Any] = {"model_type": "x", "dtype": "bfloat16"}
    if packed.section is not None:
        config["quantization_config"] = dict(packed.section)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def source_weight(rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    """Weights with a row of zeros."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(7)) * 0.05
    weight[3] = 0
    return weight.bfloat16()


def compressed(activations: bool = False, columns: int = COLUMNS, **arguments: Any) -> Packed:
    """compressed-tensors' own compressor and what it gives back."""
    quantization = find_peer("compressed_tensors.quantization")
    utils = find_peer("compressed_tensors.quantization.utils")
    registry = find_peer("compressed_tensors.compressors.base").BaseCompressor
    infer = find_peer("compressed_tensors.compressors.format").infer_module_format

    weight = source_weight(columns=columns)
    args = quantization.QuantizationArgs(**arguments)
    inputs = None
    if activations:
        inputs = quantization.QuantizationArgs(num_bits=8, type=args.type, dynamic=True, strategy="token")
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    scheme.format = infer(torch.nn.Linear, scheme).value
    compressor = registry.get_value_from_registry(scheme.format)

    runs = _sharing(weight, args)
    least, most = runs.amin((1, 3)), runs.amax((1, 3))
    if args.strategy == "tensor":
        least, most = least.reshape(1), most.reshape(1)
    state = {"weight": weight}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = utils.generate_gparam(weight.min().reshape(1), weight.max().reshape(1))
    scale, zero = utils.calculate_qparams(least, most, args, global_scale=state.get("weight_global_scale"))
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    arrays = compressor.compress(state, scheme)
    section = quantization.QuantizationConfig(config_groups={"group_0": scheme}, format=scheme.format).model_dump()
    weight = compressor.decompress(dict(arrays), scheme)["weight"]
    return Packed(arrays, json.loads(json.dumps(section, default=str)), weight, "compressed-tensors:")


def _sharing(weight: torch.Tensor, args: Any) -> torch.Tensor:
    """`weight` as [down, rows, across, columns], of which those of one cell share a scale."""
    rows, columns = weight.shape
    cell = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "block": tuple(args.block_structure or ()),
    }.get(args.strategy, (1, args.group_size))
    padded = torch.nn.functional.pad(weight, (0, -columns % cell[1], 0, -rows % cell[0]))
    return padded.reshape(padded.shape[0] // cell[0], cell[0], padded.shape[1] // cell[1], cell[1])


def by_modelopt(preset: str, decode: Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor]) -> Packed:
    """ModelOpt's export of a layer; `decode` gives the weight from its tensor classes and the arrays."""
    find_peer("modelopt")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export.unified_export_hf import _export_quantized_weight
        from modelopt.torch.quantization import qtensor

        layer = torch.nn.Linear(COLUMNS, ROWS, bias=False).bfloat16()
        layer.weight.data = source_weight()
        inputs = torch.randn(8, COLUMNS, generator=torch.Generator().manual_seed(8)).bfloat16()
        model = torch.nn.Sequential(layer)
        mtq.quantize(model, copy.deepcopy(getattr(mtq, preset)), forward_loop=lambda model: model(inputs))
        factors = getattr(layer.input_quantizer, "_pre_quant_scale", None)
        _export_quantized_weight(layer, torch.bfloat16)
    arrays = {key: value for key, value in layer.state_dict().items() if "quantizer" not in key}
    weight = decode(qtensor, arrays)
    if factors is not None:
        arrays["pre_quant_scale"] = factors.squeeze()
        weight = weight * factors.float()
    return Packed(arrays, {"quant_method": "modelopt", "producer": {"name": "modelopt"}}, weight, "modelopt:")


def _nvfp4(block: int) -> Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor]:
    def decode(qtensor: Any, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
        codes = qtensor.NVFP4QTensor(torch.Size((ROWS, COLUMNS)), torch.float32, arrays["weight"])
        scales = {"scale": arrays["weight_scale"], "double_scale": arrays["weight_scale_2"]}
        weight: torch.Tensor = codes.dequantize(**scales, block_sizes={-1: block})
        return weight

    return decode


def _one_scale(name: str, **blocks: Any) -> Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor]:
    def decode(qtensor: Any, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
        codes = getattr(qtensor, name)(torch.Size((ROWS, COLUMNS)), torch.float32, arrays["weight"])
        scale = arrays["weight_scale"]
        if scale.dtype == torch.float32:
            scale = scale.reshape(-1, 2) if scale.dim() == 4 else scale.reshape(-1, 1)
        weight: torch.Tensor = codes.dequantize(scale=scale, **blocks)
        return weight

    return decode


def _int4(qtensor: Any, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """No class of ModelOpt reads what it exports so."""
    codes = torch.stack([arrays["weight"] & 15, arrays["weight"] >> 4], 1).reshape(ROWS, COLUMNS).to(torch.int8)
    return (codes - ((codes & 8) << 1)).float() * arrays["weight_scale"].repeat_interleave(128, 1)


def by_bitsandbytes(kind: str, double_quant: bool = False) -> Packed:
    """A layer's weight as the functions of bitsandbytes pack it."""
    functional = find_peer("bitsandbytes.functional")
    section = {"quant_method": "bitsandbytes", f"load_in_{'8' if kind == 'int8' else '4'}bit": True}
    weight = source_weight()
    if kind == "int8":
        codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
        arrays = {"weight": codes, "SCB": scale, "weight_format": torch.zeros((), dtype=torch.uint8)}
        decoded = codes.float() * scale[:, None] * (1 / 127)
        return Packed(arrays, section, decoded.half(), "bitsandbytes:")
    codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double_quant)
    arrays = {"weight": codes} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return Packed(arrays, section, functional.dequantize_4bit(codes, state), "bitsandbytes:")


def by_columns(method: str, **section: Any) -> Packed:
    """GPTQ and AWQ by the published formula, in float64."""
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, (COLUMNS, ROWS))
    zeros = rng.integers(0, 15, (COLUMNS // 64, ROWS))
    scales = (rng.random((COLUMNS // 64, ROWS)) * 0.01).astype(np.float16)
    pack, pack_zeros = (eights, eights) if method == "awq" else (lambda k: words(k, 4), lambda z: words(z.T, 4).T)
    arrays = {"qweight": pack(codes), "qzeros": pack_zeros(zeros), "scales": scales}
    added = 1 if method == "gptq" and section.get("checkpoint_format") != "gptq_v2" else 0
    order = np.arange(COLUMNS) // 64
    weight = ((codes - (zeros + added)[order]) * scales.astype(np.float64)[order]).T
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    # Products of such numbers are exact in 32 bits.
    told = {"quant_method": method, "bits": 4, "group_size": 64, **section}
    return Packed(tensors, told, torch.from_numpy(weight.astype(np.float32)), f"{method}:")


def by_torchao(name: str) -> Packed:
    """torchao's weight-only tensors, flattened as it saves them."""
    quantization = find_peer("torchao.quantization")
    support = find_peer("torchao.prototype.safetensors.safetensors_support")
    layer = torch.nn.Linear(COLUMNS, ROWS, bias=False).bfloat16()
    layer.weight.data = source_weight()
    # One row of zeros is NaN in torchao's float8.
    layer.weight.data[3] = 0.01
    quantization.quantize_(layer, getattr(quantization, name)())
    flat, metadata = support.flatten_tensor_state_dict({f"{MODULE}.weight": layer.weight})
    arrays = {key.removeprefix(f"{MODULE}."): value for key, value in flat.items()}
    section = {"quant_method": "torchao", "quant_type": {"default": {"_type": name, "_data": {}}}}
    return Packed(arrays, section, layer.weight.dequantize(), "torchao:", metadata)


def by_quanto(name: str) -> Packed:
    """The state of quanto's layer."""
    quanto = find_peer("optimum.quanto")
    layer = torch.nn.Linear(COLUMNS, ROWS, bias=False).bfloat16()
    layer.weight.data = source_weight()
    layer.weight.data[3] = 0.01
    layer = quanto.QLinear.from_module(layer, weights=getattr(quanto, name))
    layer.freeze()
    section = {"quant_method": "quanto", "weights": name.removeprefix("q")}
    return Packed(layer.state_dict(), section, layer.weight.dequantize(), "quanto:")


def by_transformers() -> Packed:
    """FP8 in blocks."""
    fp8 = find_peer("transformers.integrations.finegrained_fp8")
    weight = torch.cat([source_weight(), source_weight() * 2])
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(128, 128), scale_fmt="float"))
    packed = fp8.Fp8Quantize(quantizer)._quantize_one("weight", weight)
    decoded = fp8.Fp8Dequantize(quantizer)._dequantize_one(*packed.values(), torch.float32)
    return Packed(packed, {"quant_method": "fp8", "weight_block_size": [128, 128]}, decoded, "fp8:")


def by_rows(section: Mapping[str, Any], scale: torch.Tensor) -> Packed:
    """FP8 with scales for rows (transformers' `fbgemm_fp8`) or for the tensor (AutoFP8), by the formula."""
    weight = (source_weight().float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    decoded = weight.double() * scale.double()
    return Packed({"weight": weight, "weight_scale": scale}, section, decoded.float(), "fp8:")


def _floats(**arguments: Any) -> Callable[[], Packed]:
    return lambda: compressed(type="float", **arguments)


def _ints(**arguments: Any) -> Callable[[], Packed]:
    return lambda: compressed(type="int", **arguments)


MX = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
W8A8: dict[str, Any] = {"activations": True, "num_bits": 8}
BLOCKS = {"strategy": "block", "block_structure": [128, 128]}
KINDS: dict[str, Callable[[], Packed]] = {
    "bitsandbytes nf4": lambda: by_bitsandbytes("nf4"),
    "bitsandbytes nf4, scales packed too": lambda: by_bitsandbytes("nf4", double_quant=True),
    "bitsandbytes fp4": lambda: by_bitsandbytes("fp4"),
    "bitsandbytes int8": lambda: by_bitsandbytes("int8"),
    "gptq": lambda: by_columns("gptq"),
    "gptq v2": lambda: by_columns("gptq", checkpoint_format="gptq_v2"),
    "awq": lambda: by_columns("awq", version="gemm"),
    "torchao int8": lambda: by_torchao("Int8WeightOnlyConfig"),
    "torchao float8": lambda: by_torchao("Float8WeightOnlyConfig"),
    "quanto int8": lambda: by_quanto("qint8"),
    "quanto float8": lambda: by_quanto("qfloat8"),
    "fp8 blocks": by_transformers,
    "fp8 rows": lambda: by_rows({"quant_method": "fbgemm_fp8"}, torch.full((ROWS, 1), 0.0007)),
    "fp8 tensor": lambda: by_rows(
        {"quant_method": "fp8", "activation_scheme": "static"}, torch.tensor(0.0007, dtype=torch.bfloat16)
    ),
    "compressed-tensors pack-quantized": _ints(num_bits=4, strategy="group", group_size=64),
    "compressed-tensors pack-quantized, zeros": _ints(num_bits=4, strategy="group", group_size=64, symmetric=False),
    "compressed-tensors nvfp4": _floats(num_bits=4, strategy="tensor_group", group_size=16),
    "compressed-tensors mxfp4": _floats(num_bits=4, **MX),
    "compressed-tensors mxfp8": _floats(num_bits=8, **MX),
    "compressed-tensors fp8, tensor": _floats(**W8A8, strategy="tensor"),
    "compressed-tensors fp8, rows": _floats(**W8A8, strategy="channel"),
    "compressed-tensors fp8, blocks": _floats(**W8A8, **BLOCKS),
    "compressed-tensors fp8, blocks cut short": _floats(**W8A8, **BLOCKS, columns=320),
    "compressed-tensors fp8, groups": _floats(**W8A8, strategy="group", group_size=64),
    "compressed-tensors int8, tensor": _ints(**W8A8, strategy="tensor"),
    "compressed-tensors int8, tensor, zero": _ints(**W8A8, strategy="tensor", symmetric=False),
    "compressed-tensors int8, rows": _ints(**W8A8, strategy="channel"),
    "compressed-tensors int8, rows, zeros": _ints(**W8A8, strategy="channel", symmetric=False),
    "compressed-tensors int8, groups, zeros": _ints(**W8A8, strategy="group", group_size=32, symmetric=False),
    "compressed-tensors int8, blocks": _ints(**W8A8, strategy="block", block_structure=[32, 128]),
    "modelopt fp8": lambda: by_modelopt("FP8_DEFAULT_CFG", _one_scale("FP8QTensor")),
    "modelopt fp8 rows": lambda: by_modelopt("FP8_PER_CHANNEL_PER_TOKEN_CFG", _one_scale("FP8QTensor")),
    "modelopt fp8 blocks": lambda: by_modelopt(
        "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", _one_scale("FP8QTensor", block_sizes={0: 128, 1: 128})
    ),
    "modelopt int8": lambda: by_modelopt("INT8_WEIGHT_ONLY_CFG", _one_scale("INT8QTensor")),
    "modelopt int8, SmoothQuant": lambda: by_modelopt("INT8_SMOOTHQUANT_CFG", _one_scale("INT8QTensor")),
    "modelopt int4": lambda: by_modelopt("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", _int4),
    "modelopt W4A8, AWQ": lambda: by_modelopt("W4A8_AWQ_BETA_CFG", _int4),
    "modelopt nvfp4": lambda: by_modelopt("W4A16_NVFP4_CFG", _nvfp4(16)),
    "modelopt W4A8, nvfp4": lambda: by_modelopt("W4A8_NVFP4_FP8_CFG", _nvfp4(32)),
    "modelopt mxfp4": lambda: by_modelopt("MXFP4_DEFAULT_CFG", _one_scale("MXFP4QTensor", block_sizes={-1: 32})),
    "modelopt W4A8, mxfp4": lambda: by_modelopt("W4A8_MXFP4_FP8_CFG", _one_scale("MXFP4QTensor", block_sizes={-1: 32})),
    "modelopt mxfp8": lambda: by_modelopt("MXFP8_DEFAULT_CFG", _one_scale("MXFP8QTensor")),
}
"""Every kind of packed checkpoint that is decoded, but for GGUF, which has tests of its own."""
