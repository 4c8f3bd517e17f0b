"""Every GGUF type, decoded and encoded on one thread, against ggml's C, gguf-py and diffusers, in one run.

    python benches/python/gguf_types.py --megabytes 32 --runs 9 --record benches/record/NAME.json

Sizes are those of the weights as f32. Results are compared with ggml's before anything is timed; the
contenders take turns, and each figure is the best of its runs. ggml's library comes with
llama-cpp-python; peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from conversion import cpu_name

import weightpack as wp

BF16 = np.dtype(ml_dtypes.bfloat16)
COLUMNS = 4096
SLOW = ("iq", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")


class Traits(ctypes.Structure):
    """The head of ggml 0.25.3's `struct ggml_type_traits`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block_weights", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


class Ggml:
    """ggml's own C, through ctypes."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        library.ggml_quantize_chunk.argtypes = (
            [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
        )
        self.ids = {}
        for number in range(64):
            traits = library.ggml_get_type_traits(number).contents if number < 43 else None
            if traits is not None and traits.name:
                self.ids[traits.name.decode().lower()] = number

    def decodes(self, name: str) -> bool:
        """Whether it has a decoder; the types of activations have none."""
        return bool(self.library.ggml_get_type_traits(self.ids[name]).contents.to_float)

    def decode(self, name: str, packed: np.ndarray, out: np.ndarray) -> None:
        traits = self.library.ggml_get_type_traits(self.ids[name]).contents
        traits.to_float(packed.ctypes.data, out.ctypes.data, out.size)

    def encode(self, name: str, weights: np.ndarray, importance: np.ndarray | None, out: np.ndarray) -> None:
        rows, columns = weights.shape
        vector = None if importance is None else importance.ctypes.data
        self.library.ggml_quantize_chunk(self.ids[name], weights.ctypes.data, out.ctypes.data, 0, rows, columns, vector)


def find_ggml() -> Ggml | None:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    return Ggml(ctypes.CDLL(str(next(folder.glob("*ggml-base*")))))


def best(contenders: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Least seconds of each contender. They take turns, in another order each time: noise hits all of
    them, and none always finds what the same one before it left in the caches."""
    least = dict.fromkeys(contenders, float("inf"))
    for contender in contenders.values():
        contender()
    order = random.Random(1)
    for _ in range(runs):
        for name, contender in order.sample(list(contenders.items()), len(contenders)):
            started = time.perf_counter()
            contender()
            least[name] = min(least[name], time.perf_counter() - started)
    return least


def bench_decode(name: str, weights: int, runs: int, ggml: Ggml | None) -> dict[str, float]:
    """GB/s of f32 output (the number of weights times four, whatever the output type)."""
    rows = weights // COLUMNS
    row = make_packed(name, 64)
    packed = np.ascontiguousarray(np.tile(row, (rows // 64, 1)))
    out = np.empty((rows, COLUMNS), np.float32)
    half = np.empty((rows, COLUMNS), BF16)
    format = f"gguf:{name}"
    contenders: dict[str, Callable[[], Any]] = {
        "weightpack f32": lambda: wp.dequantize(packed, format, out=out, threads=1),
        "weightpack bf16": lambda: wp.dequantize(packed, format, out=half, threads=1),
    }
    wp.dequantize(packed, format, out=out, threads=1)
    expected = out.copy()
    if ggml is not None and ggml.decodes(name):
        ggml.decode(name, packed, out)
        assert out.tobytes() == expected.tobytes(), f"{name}: decoded weights differ from ggml's"
        contenders["ggml"] = lambda: ggml.decode(name, packed, out)
    few = packed[: max(1, rows // 8)]
    scales = {}
    peer = gguf_py(name)
    if peer is not None:
        assert np.array_equal(peer(few), expected[: few.shape[0]]), f"{name}: decoded weights differ from gguf-py's"
        contenders["gguf-py"] = lambda: peer(few)
        scales["gguf-py"] = few.shape[0] / rows
    torch_peer = diffusers(name)
    if torch_peer is not None:
        contenders["diffusers"] = lambda: torch_peer(few)
        scales["diffusers"] = few.shape[0] / rows
    seconds = best(contenders, runs)
    return {key: weights * 4 * scales.get(key, 1.0) / value / 1e9 for key, value in seconds.items()}


def bench_encode(
    name: str, weights: int, runs: int, ggml: Ggml | None, importance: np.ndarray | None
) -> dict[str, float]:
    """MB/s of f32 input."""
    array = np.random.default_rng(5).normal(0, 0.02, (weights // COLUMNS, COLUMNS)).astype(np.float32)
    format = f"gguf:{name}"
    given: dict[str, Any] = {} if importance is None else {"importance": importance}
    mine = np.asarray(wp.quantize(array, format, threads=1, **given)[""])
    contenders: dict[str, Callable[[], Any]] = {"weightpack": lambda: wp.quantize(array, format, threads=1, **given)}
    if ggml is not None:
        theirs = np.empty_like(mine)
        ggml.encode(name, array, importance, theirs)
        assert theirs.tobytes() == mine.tobytes(), f"{name}: encoded bytes differ from ggml's"
        contenders["ggml"] = lambda: ggml.encode(name, array, importance, theirs)
    seconds = best(contenders, runs)
    return {key: weights * 4 / value / 1e6 for key, value in seconds.items()}


def make_packed(name: str, rows: int) -> np.ndarray:
    """Rows of encoded normal weights; of types that are not encoded, random blocks."""
    info = next(info for info in wp.formats() if info.name == f"gguf:{name}")
    if info.encodes == "never":
        # With these bits off, no 16-bit field is an infinity.
        row_bytes = round(COLUMNS * info.bits_per_weight / 8)
        return np.random.default_rng(3).integers(0, 256, (rows, row_bytes), np.uint8) & 0x3F
    array = np.random.default_rng(3).normal(0, 0.02, (rows, COLUMNS)).astype(np.float32)
    if info.encodes == "always":
        return np.asarray(wp.quantize(array, info.name)[""])
    ones = np.ones(COLUMNS, np.float32)
    return np.asarray(wp.quantize(array, info.name, importance=ones)[""])


def gguf_py(name: str) -> Callable[[np.ndarray], np.ndarray] | None:
    if importlib.util.find_spec("gguf") is None:
        return None
    import gguf
    from gguf.quants import dequantize

    kind = getattr(gguf.GGMLQuantizationType, name.upper(), None)
    if kind is None:
        return None
    try:
        dequantize(make_packed(name, 1), kind)
    except (NotImplementedError, KeyError):
        return None
    return lambda packed: dequantize(packed, kind)


def diffusers(name: str) -> Callable[[np.ndarray], Any] | None:
    if importlib.util.find_spec("diffusers") is None or importlib.util.find_spec("gguf") is None:
        return None
    import gguf
    import torch
    from diffusers.quantizers.gguf import utils

    kind = getattr(gguf.GGMLQuantizationType, name.upper(), None)
    function = utils.dequantize_functions.get(kind) if kind is not None else None
    if function is None:
        return None
    block_weights, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    torch.set_num_threads(1)

    def run(packed: np.ndarray) -> Any:
        blocks = torch.from_numpy(packed).view(torch.uint8).reshape(-1, block_bytes)
        return function(blocks, block_weights, block_bytes, dtype=torch.float32)

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=32, help="f32 bytes that are decoded")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--types", default="", help="only these, with commas between")
    parser.add_argument("--record")
    chosen = parser.parse_args()
    decoded = max(chosen.megabytes * 1024 * 1024 // 4 // COLUMNS // 64, 1) * 64 * COLUMNS
    ggml = find_ggml()
    source, target = (np.ones(decoded, np.float32) for _ in range(2))
    copy = best({"copy": lambda: np.copyto(target, source)}, chosen.runs)["copy"]
    rows = {}
    wanted = chosen.types.split(",") if chosen.types else None
    importance = np.random.default_rng(9).uniform(0.1, 2, COLUMNS).astype(np.float32)
    for info in wp.formats():
        name = info.name.removeprefix("gguf:")
        if info.backend != "gguf" or (wanted is not None and name not in wanted):
            continue
        row: dict[str, Any] = {}
        row["decode"] = bench_decode(name, decoded, 3 * chosen.runs, ggml)
        if info.encodes != "never":
            few = decoded if not name.startswith(SLOW) else max(decoded // 8 // COLUMNS, 1) * COLUMNS
            least = min(chosen.runs, 3) if name.startswith(SLOW) else chosen.runs
            if info.encodes == "always":
                row["encode"] = bench_encode(name, few, least, ggml, None)
            row["encode, importance"] = bench_encode(name, few, least, ggml, importance)
        rows[name] = row
        print(name, json.dumps({key: {k: round(v, 2) for k, v in value.items()} for key, value in row.items()}))
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "threads": 1,
        "cores": os.cpu_count(),
        "decoded_weights": decoded,
        "copy_gb_per_second_one_way": decoded * 4 / copy / 1e9,
        "units": {"decode": "GB/s of f32 output", "encode": "MB/s of f32 input"},
        "types": rows,
    }
    if chosen.record:
        Path(chosen.record).write_text(json.dumps(record, indent=1) + "\n")
    print(f"copy {record['copy_gb_per_second_one_way']:.1f} GB/s one way")


if __name__ == "__main__":
    main()
