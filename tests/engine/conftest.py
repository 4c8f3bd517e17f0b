"""Checkpoints made with the standard library and numpy alone, and whole-process runs of the CLI."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64", "int8": "I8"}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    header: dict[str, Any] = {}
    offset = 0
    for name, array in tensors.items():
        stored = {"dtype": NAMES[str(array.dtype)], "shape": list(array.shape)}
        header[name] = {**stored, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    return path


def normal(shape: tuple[int, ...], seed: int = 0, dtype: Any = ml_dtypes.bfloat16) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32).astype(dtype)


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Writes `tensors` as `model.safetensors` in a new folder and gives the file."""

    def make(tensors: dict[str, np.ndarray], folder: str = "model") -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        return write_safetensors(tmp_path / folder / "model.safetensors", tensors)

    return make


def layers(count: int, rows: int = 512, columns: int = 2048) -> dict[str, np.ndarray]:
    """A model of `count` linear layers, a norm and a bias in each."""
    pool = normal((rows * columns + count * 64,), seed=5)
    tensors = {}
    for index in range(count):
        weight = pool[index * 64 : index * 64 + rows * columns].reshape(rows, columns)
        tensors[f"layers.{index}.mlp.up_proj.weight"] = weight
        tensors[f"layers.{index}.mlp.up_proj.bias"] = normal((rows,), index)
        tensors[f"layers.{index}.input_layernorm.weight"] = normal((columns,), index)
    return tensors


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "weightpack", *map(str, words)]


def run(*words: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs the CLI and checks its exit code."""
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr + done.stdout
    return done


def digest(path: Path) -> dict[str, str]:
    """Hash of every file at or below `path`."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def peak_anonymous(words: list[str]) -> int:
    """Largest RssAnon of a process, in bytes, sampled every 2 ms."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.002)
    assert process.returncode == 0, process.stderr.read() if process.stderr else ""
    return peak
