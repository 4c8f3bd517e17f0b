"""Whole conversions against a plain copy, safetensors, bitsandbytes and gguf-py, in one run.

    python benches/python/conversion.py --megabytes 2048 --runs 5 --record benches/record/NAME.json

The source is a made bf16 checkpoint with the shapes of a Llama layer, in the page cache. Every
conversion is a whole process, start-up included. What is written is compared with the peers before
anything is timed. `--one-tensor-megabytes` adds a checkpoint that is one single tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
LAYER = {
    "self_attn.q_proj": (2048, 2048),
    "self_attn.k_proj": (512, 2048),
    "self_attn.v_proj": (512, 2048),
    "self_attn.o_proj": (2048, 2048),
    "mlp.gate_proj": (5632, 2048),
    "mlp.up_proj": (5632, 2048),
    "mlp.down_proj": (2048, 5632),
}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file of bf16 arrays, written with the standard library alone."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(array.view(np.uint8).data)


def make_checkpoint(path: Path, megabytes: int) -> None:
    """Normal weights, sigma 0.02; one random pool re-used at shifting offsets, for speed."""
    pool = np.random.default_rng(7).normal(0, 0.02, 1 << 24).astype(np.float32).astype(BF16)
    tensors: dict[str, np.ndarray] = {}
    written, layer = 0, 0
    while written < megabytes * 1_000_000:
        for module, shape in LAYER.items():
            start = (layer * 7919 + len(tensors) * 104729) % (1 << 20)
            tensors[f"model.layers.{layer}.{module}.weight"] = pool[start : start + shape[0] * shape[1]].reshape(shape)
        written = sum(array.nbytes for array in tensors.values())
        layer += 1
    write_safetensors(path, tensors)


def make_single_tensor(path: Path, megabytes: int) -> None:
    """One tensor of `megabytes`, 4096 weights wide."""
    rows = megabytes * 1_000_000 // (2 * 4096)
    block = np.random.default_rng(8).normal(0, 0.02, (1024, 4096)).astype(np.float32).astype(BF16)
    header = {"big.weight": {"dtype": "BF16", "shape": [rows, 4096], "data_offsets": [0, rows * 8192]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for first in range(0, rows, 1024):
            file.write(block[: min(1024, rows - first)].view(np.uint8).data)


def peak_anonymous(pid: int, stop: threading.Event) -> int:
    """Largest RssAnon of a process, in bytes, sampled every 2 ms."""
    peak = 0
    status = Path(f"/proc/{pid}/status")
    while not stop.is_set():
        try:
            text = status.read_text()
        except OSError:
            break
        for line in text.splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.002)
    return peak


def run_process(command: list[str]) -> tuple[float, int]:
    """Wall seconds and peak anonymous bytes of a whole process."""
    peaks: list[int] = []
    stop = threading.Event()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    sampler = threading.Thread(target=lambda: peaks.append(peak_anonymous(process.pid, stop)))
    sampler.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - started
    stop.set()
    sampler.join()
    if process.returncode != 0:
        raise SystemExit(f"{command}: {errors.decode()}")
    return seconds, peaks[0]


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def timed(runs: int, work: Callable[[], Any]) -> list[Any]:
    work()
    return [work() for _ in range(runs)]


def convert_command(source: Path, target: Path, to: str, *more: str) -> list[str]:
    base = [sys.executable, "-m", "weightpack", "convert", str(source), str(target), "--to", to]
    return [*base, "--layers", "names", *more]


def check_equality(source: Path, folder: Path) -> list[str]:
    """What is timed writes the peers' bytes: checked on the first tensor, before any timing."""
    checked = []
    import weightpack as wp

    name = "model.layers.0.mlp.down_proj.weight"
    weight = wp.open_checkpoint(source).read(name)
    try:
        import bitsandbytes.functional as bnb
        import torch

        packed, state = bnb.quantize_4bit(torch.from_numpy(weight.astype(np.float32)).bfloat16(), quant_type="nf4")
        nf4 = folder / "check-nf4.safetensors"
        run_process(convert_command(source, nf4, "nf4", "--overwrite"))
        mine = {part: np.asarray(array) for part, array in wp.quantize(weight, "bitsandbytes:nf4").items()}
        assert np.array_equal(mine[""].reshape(-1), packed.numpy().reshape(-1))
        assert np.array_equal(mine["absmax"], state.absmax.numpy())
        remove(nf4)
        checked.append("bitsandbytes nf4")
    except ImportError:
        pass
    try:
        from gguf import GGMLQuantizationType, quants

        theirs = quants.quantize(weight.astype(np.float32), GGMLQuantizationType.Q8_0)
        mine_q8 = np.asarray(wp.quantize(weight, "gguf:q8_0")[""])
        assert np.array_equal(mine_q8.reshape(-1), theirs.reshape(-1))
        checked.append("gguf-py q8_0")
    except ImportError:
        pass
    return checked


def copy_file(source: Path, target: Path) -> float:
    """A plain read and write loop: what a conversion does, without the conversion."""
    started = time.perf_counter()
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        buffer = memoryview(bytearray(4 << 20))
        while count := reader.readinto(buffer):
            writer.write(buffer[:count])
    return time.perf_counter() - started


def peers(source: Path, folder: Path) -> dict[str, float]:
    """Seconds per GB of bf16 for what the peers do with the same weights, one thread."""
    results: dict[str, float] = {}
    try:
        import bitsandbytes.functional as bnb
        import torch

        torch.set_num_threads(1)
        weight = torch.randn(4096, 2048).mul(0.02).bfloat16()
        gigabytes = weight.numel() * 2 / 1e9
        bnb.quantize_4bit(weight, quant_type="nf4")
        started = time.perf_counter()
        bnb.quantize_4bit(weight, quant_type="nf4")
        results["bitsandbytes CPU quantize_4bit nf4, seconds per GB"] = (time.perf_counter() - started) / gigabytes
        half = weight.half()
        started = time.perf_counter()
        bnb.int8_vectorwise_quant(half)
        results["bitsandbytes CPU int8_vectorwise_quant, seconds per GB"] = (time.perf_counter() - started) / gigabytes
    except ImportError:
        pass
    try:
        from gguf import GGMLQuantizationType, quants

        array = np.random.default_rng(3).normal(0, 0.02, (4096, 2048)).astype(np.float32)
        for kind in ("Q8_0", "Q4_0"):
            started = time.perf_counter()
            quants.quantize(array, GGMLQuantizationType[kind])
            results[f"gguf-py {kind}, seconds per GB"] = (time.perf_counter() - started) / (array.size * 2 / 1e9)
    except ImportError:
        pass
    try:
        from safetensors.numpy import load_file, save_file  # noqa: F401
        from safetensors.torch import load_file as load_torch
        from safetensors.torch import save_file as save_torch

        target = folder / "again.safetensors"
        started = time.perf_counter()
        save_torch(load_torch(source), target)
        results["safetensors load_file + save_file, seconds per GB"] = (time.perf_counter() - started) / (
            source.stat().st_size / 1e9
        )
        remove(target)
    except ImportError:
        pass
    return results


def array_encode(runs: int) -> dict[str, float]:
    """Seconds per GB of bf16 for `weightpack.quantize`, one thread, arrays in memory."""
    import weightpack as wp

    weight = np.random.default_rng(3).normal(0, 0.02, (4096, 8192)).astype(np.float32).astype(BF16)
    results = {}
    for to in ("bitsandbytes:nf4", "bitsandbytes:fp4", "bitsandbytes:int8", "gguf:q8_0", "gguf:q4_0"):
        best = []
        for _ in range(runs + 1):
            started = time.perf_counter()
            wp.quantize(weight, to, threads=1)
            best.append(time.perf_counter() - started)
        results[to] = statistics.median(best[1:]) / (weight.nbytes / 1e9)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--one-tensor-megabytes", type=int, default=0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where the files are made")
    parser.add_argument("--record", type=Path, default=None)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="weightpack-bench-", dir=options.folder))
    try:
        result = bench(options, folder)
    finally:
        shutil.rmtree(folder)
    text = json.dumps(result, indent=2)
    print(text)
    if options.record:
        options.record.write_text(text + "\n")


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source = folder / "model.safetensors"
    make_checkpoint(source, options.megabytes)
    size = source.stat().st_size
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpu": cpu_name(), "threads": os.cpu_count(), "system": platform.platform(terse=True)},
        "source_bytes": size,
        "runs": options.runs,
        "equal_to": check_equality(source, folder),
    }
    target = folder / "copy.bin"

    def copy_once() -> float:
        remove(target)
        return copy_file(source, target)

    conversions = [
        ("nf4", "nf4.safetensors", ["--to", "nf4"]),
        ("nf4 double quant", "dq.safetensors", ["--to", "nf4", "--double-quant"]),
        ("int8", "int8.safetensors", ["--to", "bitsandbytes:int8"]),
        ("q8_0", "q8_0.gguf", ["--to", "q8_0"]),
        ("q4_0", "q4_0.gguf", ["--to", "q4_0"]),
        ("nf4, no verify", "nv.safetensors", ["--to", "nf4", "--no-verify"]),
        ("nf4, 1 thread", "one.safetensors", ["--to", "nf4", "--threads", "1"]),
    ]
    rows: dict[str, list[tuple[float, float, int]]] = {label: [] for label, _, _ in conversions}
    copy_once()
    for _ in range(options.runs):
        for label, name, more in conversions:
            # Each conversion stands beside a copy made just before: the ratio survives a noisy machine.
            # The faster of two copies counts. The copy's bytes are dropped before the system writes
            # them, so that the conversion, which does write its own to the disk, waits for no others.
            copied = min(copy_once(), copy_once())
            remove(target)
            out = folder / name
            command = [sys.executable, "-m", "weightpack", "convert", str(source), str(out), *more]
            seconds, peak = run_process([*command, "--layers", "names"])
            rows[label].append((copied, seconds, peak))
            remove(out)
    result["copy_seconds"] = spread([copied for row in rows.values() for copied, _, _ in row])
    result["conversions"] = {
        label: {
            "seconds": spread([seconds for _, seconds, _ in row]),
            "gigabytes_per_second": round(size / 1e9 / statistics.median(seconds for _, seconds, _ in row), 2),
            "times_a_copy": spread([seconds / copied for copied, seconds, _ in row]),
            "peak_anonymous_megabytes": round(max(peak for _, _, peak in row) / 1e6, 1),
        }
        for label, row in rows.items()
    }
    result["encode_one_thread_seconds_per_gigabyte"] = array_encode(options.runs)
    result["peers"] = peers(source, folder)
    if options.one_tensor_megabytes:
        single = folder / "single.safetensors"
        make_single_tensor(single, options.one_tensor_megabytes)
        for to in (["nf4"], ["nf4", "--double-quant"], ["q8_0"]):
            out = folder / ("single-out.gguf" if to[0] == "q8_0" else "single-out.safetensors")
            seconds, peak = run_process(convert_command(single, out, to[0], *to[1:]))
            result.setdefault("one_tensor", {})[" ".join(to)] = {
                "seconds": round(seconds, 3),
                "peak_anonymous_megabytes": round(peak / 1e6, 1),
            }
            remove(out)
    return result


def spread(values: list[float]) -> dict[str, float]:
    """Least, median and largest."""
    figures = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, 3) for name, value in figures.items()}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
