"""Every safetensors format, encoded and decoded on one thread, against its peer library and a copy of memory.

    python benches/python/formats.py --megabytes 32 --runs 5 --record benches/record/NAME.json

One bf16 matrix of `--megabytes`, rows of 4096. The codes are compared with the peer's before anything is
timed; the contenders take turns, and each figure is the best of its runs (peers are slow: one run fewer
does for them). Speeds, and ratios to a copy of the bf16 matrix, are of work into memory that has been
written before; beside the peers, which give new arrays, encoding gives new arrays too. Peers that are not
installed are left out.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conversion import cpu_name
from gguf_types import best

import weightpack as wp
from loading import versions
from weightpack import _rust

COLUMNS = 4096


@dataclass
class Peer:
    """What a library does with the matrix: `encode` gives what it packs to, `codes` the array of codes of
    that, `decode` the weights."""

    encode: Callable[[], Any]
    codes: Callable[[Any], torch.Tensor]
    decode: Callable[[Any], Any]


def bitsandbytes(name: str, weight: torch.Tensor) -> Peer:
    from bitsandbytes import functional

    if name == "int8":
        half = weight.half()
        return Peer(
            lambda: functional.int8_vectorwise_quant(half),
            lambda packed: packed[0],
            lambda packed: functional.int8_vectorwise_dequant(packed[0], packed[1]),
        )
    return Peer(
        lambda: functional.quantize_4bit(weight, quant_type=name),
        lambda packed: packed[0],
        lambda packed: functional.dequantize_4bit(*packed),
    )


def torchao(name: str, weight: torch.Tensor) -> Peer:
    from torchao.prototype import mx_formats
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerTensor,
        quantize_,
    )

    configs: dict[str, Callable[[], Any]] = {
        "int8": Int8WeightOnlyConfig,
        "float8": Float8WeightOnlyConfig,
        "float8_tensor": lambda: Float8WeightOnlyConfig(granularity=PerTensor()),
        "nvfp4": mx_formats.NVFP4WeightOnlyConfig,
        "mxfp8": lambda: mx_formats.MXDynamicActivationMXWeightConfig(),
        "mxfp4": lambda: mx_formats.MXDynamicActivationMXWeightConfig(
            activation_dtype=torch.float4_e2m1fn_x2, weight_dtype=torch.float4_e2m1fn_x2
        ),
    }
    if name.startswith("intx"):
        width = getattr(torch, f"int{name.removeprefix('intx')}")
        config = IntxWeightOnlyConfig(weight_dtype=width, granularity=PerAxis(0))
    else:
        config = configs[name]()

    def encode() -> Any:
        layer = torch.nn.Linear(1, 1, bias=False)
        layer.in_features, layer.out_features = weight.shape[1], weight.shape[0]
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantize_(layer, config)
        return layer.weight

    return Peer(encode, lambda packed: packed.qdata, lambda packed: packed.dequantize())


def quanto(name: str, weight: torch.Tensor) -> Peer:
    from optimum.quanto import MaxOptimizer, qfloat8, qint2, qint4, qint8, quantize_weight
    from optimum.quanto.tensor import AbsmaxOptimizer

    kind = {"int8": qint8, "float8": qfloat8, "int4": qint4, "int2": qint2}[name]

    def encode() -> Any:
        if kind in (qint8, qfloat8):
            return quantize_weight(weight, kind, 0, AbsmaxOptimizer()(weight, kind, 0), optimized=False)
        scale, shift = MaxOptimizer()(weight, kind, 0, 128)
        return quantize_weight(weight, kind, 0, scale, shift, 128, optimized=False)

    def codes(packed: Any) -> torch.Tensor:
        data = packed._data
        return data._data if hasattr(data, "_data") else data

    return Peer(encode, codes, lambda packed: packed.dequantize())


def modelopt(name: str, weight: torch.Tensor) -> Peer:
    """Scales from magnitudes, and what the export packs with them."""
    from modelopt.torch.export import quant_utils
    from modelopt.torch.quantization import qtensor

    if name == "nvfp4":
        return Peer(
            lambda: qtensor.NVFP4QTensor.quantize(weight, 16),
            lambda packed: packed[0]._quantized_data,
            lambda packed: packed[0].dequantize(scale=packed[1], double_scale=packed[2], block_sizes={-1: 16}),
        )
    if name == "mxfp4":
        return Peer(
            lambda: qtensor.MXFP4QTensor.quantize(weight, 32),
            lambda packed: packed[0]._quantized_data,
            lambda packed: packed[0].dequantize(scale=packed[1], block_sizes={-1: 32}),
        )
    rows, columns = weight.shape
    tiles = weight.view(rows // 128, 128, columns // 128, 128)
    ways: dict[str, tuple[str, Callable[[], torch.Tensor], int | None]] = {
        "fp8": (quant_utils.QUANTIZATION_FP8, lambda: weight.abs().amax().float() / 448, None),
        "fp8_row": (quant_utils.QUANTIZATION_FP8_PC_PT, lambda: weight.abs().amax(1).float() / 448, None),
        "fp8_block": (
            quant_utils.QUANTIZATION_FP8_PB_WO,
            lambda: tiles.abs().amax((1, 3), keepdim=True).float() / 448,
            128,
        ),
        "int8": (quant_utils.QUANTIZATION_INT8_SQ, lambda: weight.abs().amax(1).float() / 127, None),
        "int4": (
            quant_utils.QUANTIZATION_INT4_AWQ,
            lambda: weight.view(rows, -1, 128).abs().amax(-1).float() / 7,
            128,
        ),
    }
    kind, scale_of, block = ways[name]

    def encode() -> Any:
        scale = scale_of()
        return quant_utils.to_quantized_weight(weight, scale, kind, block_size=block), scale

    def decode(packed: Any) -> Any:
        codes, scale = packed
        if name == "int4":
            raise NotImplementedError("the export is not read by ModelOpt")
        if name == "fp8_block":
            return (codes.view(tiles.shape).to(weight.dtype) * scale).view(weight.shape)
        return codes.to(weight.dtype) * (scale if scale.dim() == 0 else scale[:, None])

    return Peer(encode, lambda packed: packed[0], decode)


def fp8(name: str, weight: torch.Tensor) -> Peer:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    host = FineGrainedFP8HfQuantizer(FineGrainedFP8Config())
    pack, unpack = Fp8Quantize(host), Fp8Dequantize(host)
    return Peer(
        lambda: pack._quantize_one("a.weight", weight),
        lambda packed: packed["a.weight"],
        lambda packed: unpack._dequantize_one(packed["a.weight"], packed["a.weight_scale_inv"], torch.bfloat16),
    )


PEERS = {"bitsandbytes": bitsandbytes, "torchao": torchao, "quanto": quanto, "modelopt": modelopt, "fp8": fp8}


def peer_of(name: str, weight: torch.Tensor) -> Peer | None:
    """The peer, unless there is none of it here."""
    backend, _, kind = name.partition(":")
    try:
        return PEERS[backend](kind, weight)
    except (ImportError, KeyError, AttributeError):
        return None


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def again(weight: torch.Tensor, name: str) -> Callable[[], Any]:
    """Encoding into the same arrays each time."""
    shape, dtype = list(weight.shape), "F16" if weight.dtype == torch.float16 else "BF16"
    params = json.dumps({"dtype": dtype})
    parts = [np.zeros(component["bytes"], np.uint8) for component in json.loads(_rust.layout(name, shape, params))]
    data = raw(weight).numpy()
    return lambda: _rust.encode(name, shape, params, data, dtype, parts, 1)


def bench(name: str, weight: torch.Tensor, runs: int) -> dict[str, Any]:
    """Seconds of each contender, and what they are in GB/s of bf16 and as ratios."""
    given = weight.half() if name == "bitsandbytes:int8" else weight
    parts = wp.quantize(given, name, threads=1)
    out = torch.empty_like(weight)
    copy = torch.empty_like(weight)
    contenders: dict[str, Callable[[], Any]] = {
        "copy": lambda: copy.copy_(weight),
        "encode": lambda: wp.quantize(given, name, threads=1),
        "encode again": again(given, name),
        "decode": lambda: wp.dequantize(parts, name, shape=weight.shape, out=out, threads=1),
    }
    peer = peer_of(name, weight)
    slow: dict[str, Callable[[], Any]] = {}
    if peer is not None:
        packed = peer.encode()
        ours = parts[next(iter(parts))]
        if not torch.equal(raw(ours), raw(peer.codes(packed))):
            raise AssertionError(f"{name}: the codes differ from the peer's")
        slow = {"peer encode": peer.encode, "peer decode": lambda: peer.decode(packed)}
    seconds = best(contenders, runs) | timed(slow, max(1, runs - 1))
    gigabytes = weight.nbytes / 1e9
    row: dict[str, Any] = {
        "encode_gigabytes_per_second": round(gigabytes / seconds["encode again"], 2),
        "decode_gigabytes_per_second": round(gigabytes / seconds["decode"], 2),
        "encode_copies": round(seconds["encode again"] / seconds["copy"], 2),
        "decode_copies": round(seconds["decode"] / seconds["copy"], 2),
    }
    for step in ("encode", "decode"):
        if f"peer {step}" in seconds:
            row[f"{step}_times_peer"] = round(seconds[f"peer {step}"] / seconds[step], 1)
    return row


def timed(contenders: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Least seconds of each of those that run here; some libraries do not decode on a CPU."""
    least = {}
    for name, contender in contenders.items():
        for _ in range(runs):
            started = time.perf_counter()
            try:
                contender()
            except (RuntimeError, NotImplementedError, AssertionError, ImportError, TypeError) as error:
                print(f"    {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                break
            taken = time.perf_counter() - started
            least[name] = min(least.get(name, taken), taken)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", default="", help="part of the names of formats")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = max(128, options.megabytes * (1 << 20) // (2 * COLUMNS) // 128 * 128)
    weight = (torch.randn(rows, COLUMNS) * 0.02).bfloat16()
    names = [
        info.name
        for info in wp.formats()
        if info.container == "safetensors" and info.encodes == "always" and options.only in info.name
    ]
    results: dict[str, Any] = {}
    print(
        f"{'format':24} {'encode GB/s':>12} {'copies':>7} {'x peer':>7} {'decode GB/s':>12} {'copies':>7} {'x peer':>7}"
    )
    for name in names:
        row = results[name] = bench(name, weight, options.runs)
        cells = [row["encode_gigabytes_per_second"], row["encode_copies"], row.get("encode_times_peer", "-")]
        cells += [row["decode_gigabytes_per_second"], row["decode_copies"], row.get("decode_times_peer", "-")]
        print(
            f"{name:24} {cells[0]:>12} {cells[1]:>7} {cells[2]:>7} {cells[3]:>12} {cells[4]:>7} {cells[5]:>7}",
            flush=True,
        )
    if options.record:
        record = {
            "bench": "formats",
            "date": time.strftime("%Y-%m-%d"),
            "cpu": cpu_name(),
            "threads": 1,
            "weights": weight.numel(),
            "runs": options.runs,
            "versions": versions(),
            "formats": results,
        }
        options.record.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
