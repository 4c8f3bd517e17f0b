"""Weights in formats that are decoded and not written, packed here by the published formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from ..conftest import Tensor
from . import hqq_layers

AWQ_ROWS = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Packed:
    """One weight: what it decodes to in float64, its arrays by what stands in place of the last segment of its
    name, the section `quantization_config` that goes with them, and what the file's metadata says of the weight. In
    a GGUF file it is rows of blocks (uint8)."""

    weights: np.ndarray
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    section: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] | None = None
    blocks: np.ndarray | None = None


def part(dtype: str, array: Any) -> Tensor:
    """An array as `write_safetensors` takes it."""
    array = np.ascontiguousarray(array)
    return dtype, list(array.shape), array.tobytes()


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes of each column [K, n] as a stream of bits along K, in 32-bit words [K·bits/32, n]."""
    streams = ((codes[:, None, :] >> np.arange(bits)[None, :, None]) & 1).astype(np.uint8)
    flat = streams.reshape(-1, codes.shape[1])
    flat = np.pad(flat, ((0, -len(flat) % 32), (0, 0)))
    powers = np.uint64(1) << np.arange(32, dtype=np.uint64)
    return (flat.reshape(-1, 32, codes.shape[1]) * powers[None, :, None]).sum(1).astype(np.uint32).view(np.int32)


def eights(codes: np.ndarray) -> np.ndarray:
    """AWQ: [k, n] to words [k, n/8]."""
    groups = codes.reshape(codes.shape[0], -1, 8)[:, :, AWQ_ROWS].astype(np.uint64)
    return (groups << (4 * np.arange(8, dtype=np.uint64))).sum(-1).astype(np.uint32).view(np.int32)


def made(seed: int, rows: int, columns: int, bits: int, group: int, scale: str):
    """Codes [K, N], zeros [G, N] and scales [G, N] of a type, and the weight in float64 [N, K]."""
    rng = np.random.default_rng(seed)
    groups = -(-columns // group)
    codes = rng.integers(0, 1 << bits, (columns, rows))
    zeros = rng.integers(0, 1 << bits, (groups, rows))
    scales = (rng.standard_normal((groups, rows)) * 0.02).astype(np.float32)
    stored = scales if scale == "F32" else scales.astype(np.float16)
    return codes, zeros, stored


def weight(codes, zeros, scales, order) -> np.ndarray:
    """(code - zero)·scale, [N, K], exactly."""
    return ((codes - zeros[order]) * scales.astype(np.float64)[order]).T


def gptq(seed: int, rows: int, columns: int) -> Packed:
    """4 bits in groups of 128."""
    codes, zeros, scales = made(seed, rows, columns, 4, 128, "F16")
    order = np.arange(columns) // 128
    arrays = {
        "qweight": part("I32", words(codes, 4)),
        "qzeros": part("I32", words(zeros.T, 4).T),
        "scales": part("F16", scales),
        "g_idx": part("I32", order.astype(np.int32)),
    }
    section = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": False}
    return Packed(weight(codes, zeros + 1, scales, order), arrays, section)


def awq(seed: int, rows: int, columns: int) -> Packed:
    """4 bits in groups of 128."""
    codes, zeros, scales = made(seed, rows, columns, 4, 128, "F16")
    arrays = {
        "qweight": part("I32", eights(codes)),
        "qzeros": part("I32", eights(zeros)),
        "scales": part("F16", scales),
    }
    section = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
    return Packed(weight(codes, zeros, scales, np.arange(columns) // 128), arrays, section)


def compressed(seed: int, rows: int, columns: int) -> Packed:
    """compressed-tensors' packed integers: 4 bits in groups of 128, symmetric."""
    codes, _, scales = made(seed, rows, columns, 4, 128, "F16")
    arrays = {
        "weight_packed": part("I32", words(codes, 4).T),
        "weight_scale": part("F16", scales.T),
        "weight_shape": part("I64", np.array([rows, columns])),
    }
    section = _compressed(num_bits=4, symmetric=True, group_size=128, strategy="group")
    zeros = np.full_like(codes[: columns // 128], 8)
    return Packed(weight(codes, zeros, scales, np.arange(columns) // 128), arrays, section)


def four_bit_floats(block: int) -> Callable[[int, int, int], Packed]:
    """compressed-tensors' E2M1 codes: in blocks of 16 whose scale is divided by one of the tensor (NVFP4), or of 32
    with powers of two (MXFP4)."""

    def make(seed: int, rows: int, columns: int) -> Packed:
        rng = np.random.default_rng(seed)
        codes = rng.integers(0, 16, (rows, columns)).astype(np.uint8)
        magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = np.where(codes & 8, -1.0, 1.0) * magnitudes[codes & 7]
        arrays = {"weight_packed": part("U8", codes[:, 0::2] | codes[:, 1::2] << 4)}
        if block == 16:
            scales = rng.uniform(1, 400, (rows, columns // 16)).astype(ml_dtypes.float8_e4m3fn)
            whole = np.array([12345.0], np.float32)
            arrays |= {"weight_scale": part("F8_E4M3", scales), "weight_global_scale": part("F32", whole)}
            factors = (scales.astype(np.float32) / whole).astype(np.float64)
        else:
            exponents = rng.integers(115, 122, (rows, columns // 32)).astype(np.uint8)
            arrays["weight_scale"] = part("U8", exponents)
            factors = np.exp2(exponents.astype(np.float64) - 127)
        return Packed(values * factors.repeat(block, 1), arrays, _compressed(num_bits=4, type="float"))

    return make


def gridded(codes: str, section: Mapping[str, Any]) -> Callable[[int, int, int], Packed]:
    """Bytes, whole numbers or floats, with a scale for every 64 columns of a row."""

    def make(seed: int, rows: int, columns: int) -> Packed:
        rng = np.random.default_rng(seed)
        drawn = rng.standard_normal((rows, columns))
        stored = (drawn * 40).astype(np.int8) if codes == "I8" else drawn.astype(ml_dtypes.float8_e4m3fn)
        scales = rng.uniform(0.01, 0.03, (rows, columns // 64)).astype(np.float32)
        weights = stored.astype(np.float64) * scales.astype(np.float64).repeat(64, 1)
        return Packed(weights, {"weight": part(codes, stored), "weight_scale": part("F32", scales)}, section)

    return make


def mxfp8(seed: int, rows: int, columns: int) -> Packed:
    """ModelOpt's FP8 weights with a power of two for every 32 columns of a row."""
    rng = np.random.default_rng(seed)
    codes = rng.standard_normal((rows, columns)).astype(ml_dtypes.float8_e4m3fn)
    exponents = rng.integers(118, 124, (rows, columns // 32)).astype(np.uint8)
    factors = np.exp2(exponents.astype(np.float64) - 127).repeat(32, 1)
    arrays = {"weight": part("F8_E4M3", codes), "weight_scale": part("U8", exponents)}
    return Packed(codes.astype(np.float64) * factors, arrays, {"quant_method": "modelopt", "quant_algo": "MXFP8"})


def experts(seed: int, rows: int, columns: int) -> Packed:
    """gpt-oss' E2M1 codes with powers of two, packed with rows and columns exchanged."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (columns, rows // 32, 32)).astype(np.uint8)
    exponents = rng.integers(115, 122, (columns, rows // 32)).astype(np.uint8)
    values = np.where(codes & 8, -1.0, 1.0) * np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7]
    weights = (values * np.exp2(exponents.astype(np.float64) - 127)[..., None]).reshape(columns, rows).T
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    section = {"quant_method": "mxfp4"}
    return Packed(weights, {"weight_blocks": part("U8", packed), "weight_scales": part("U8", exponents)}, section)


def one_bit(seed: int, rows: int, columns: int) -> Packed:
    """torchao's integers of one bit, one to a byte."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-1, 1, (rows, columns)).astype(np.int8)
    scales = rng.uniform(0.01, 0.03, (rows, 1)).astype(ml_dtypes.bfloat16)
    arrays = {
        "_weight_qdata": part("I8", codes),
        "_weight_scale": part("BF16", scales),
        "_weight_zero_point": part("I8", np.zeros((rows, 1), np.int8)),
    }
    told = {
        "_type": "IntxUnpackedToInt8Tensor",
        "_data": {
            "target_dtype": {"_type": "torch.dtype", "_data": "int1"},
            "block_size": [1, columns],
            "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
            "activation_quantization": None,
        },
        "_tensor_data_names": ["qdata", "scale", "zero_point"],
    }
    section = {"quant_method": "torchao", "quant_type": {"default": {"_type": "IntxWeightOnlyConfig", "_data": {}}}}
    return Packed(codes * scales.astype(np.float64), arrays, section, told)


def hqq(seed: int, rows: int, columns: int) -> Packed:
    """4 bits in groups of 64 along rows, as most checkpoints are."""
    weights, arrays = hqq_layers.layer(seed, rows, columns)
    return Packed(weights, arrays, hqq_layers.section())


def _compressed(**weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


def float8(kind: str) -> Callable[[int, int, int], Packed]:
    """FP8 weights with a scale for each row ("row"), the tensor, or each block of 128 rows and columns."""

    def make(seed: int, rows: int, columns: int) -> Packed:
        rng = np.random.default_rng(seed)
        codes = rng.standard_normal((rows, columns)).astype(ml_dtypes.float8_e4m3fn)
        shape = {"row": (rows, 1), "tensor": (1,), "block": (-(-rows // 128), -(-columns // 128))}[kind]
        scales = rng.uniform(0.01, 0.03, shape).astype(np.float32)
        spread = np.repeat(np.repeat(scales, 128, 0), 128, 1)[:rows, :columns] if kind == "block" else scales
        name = "weight_scale_inv" if kind == "block" else "weight_scale"
        arrays = {"weight": part("F8_E4M3", codes), name: part("F32", scales)}
        section = {"quant_method": "fp8", "weight_block_size": [128, 128]} if kind == "block" else None
        return Packed(codes.astype(np.float64) * spread.astype(np.float64), arrays, section)

    return make


def activations(block: int, scale: type, sums: int) -> Callable[[int, int, int], Packed]:
    """ggml's types for activations: blocks of a scale, 8-bit codes, and sums that nobody looks at."""

    def make(seed: int, rows: int, columns: int) -> Packed:
        rng = np.random.default_rng(seed)
        count = rows * columns // block
        scales = rng.uniform(0.0001, 0.001, (count, 1)).astype(scale)
        codes = rng.integers(-127, 128, (count, block)).astype(np.int8)
        between = np.zeros((count, 2 if block == 32 else 0), np.uint8)
        after = np.zeros((count, sums), np.uint8)
        blocks = np.concatenate([scales.view(np.uint8), between, codes.view(np.uint8), after], axis=1)
        weights = codes * scales.astype(np.float64)
        return Packed(weights.reshape(rows, columns), blocks=blocks.reshape(rows, -1))

    return make


DECODED_ONLY: Mapping[str, Callable[[int, int, int], Packed]] = {
    "fp8:row": float8("row"),
    "fp8:tensor": float8("tensor"),
    "gguf:q8_1": activations(32, np.float16, 0),
    "gguf:q8_k": activations(256, np.float32, 32),
    "gptq:int": gptq,
    "awq:int": awq,
    "compressed-tensors:int": compressed,
    "compressed-tensors:nvfp4": four_bit_floats(16),
    "compressed-tensors:mxfp4": four_bit_floats(32),
    "compressed-tensors:int8": gridded("I8", _compressed(num_bits=8, type="int", strategy="group", group_size=64)),
    "compressed-tensors:float8": gridded(
        "F8_E4M3", _compressed(num_bits=8, type="float", strategy="group", group_size=64)
    ),
    "modelopt:mxfp8": mxfp8,
    "torchao:intx1": one_bit,
    "mxfp4:experts": experts,
    "hqq:int": hqq,
}
"""What makes a weight of a seed, a number of rows and one of columns."""
