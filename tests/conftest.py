"""What all tests share: peer libraries, small models, and running the command line."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# No test may reach the network, and hosts should not try.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")


def find_peer(name: str) -> ModuleType:
    """Imports a peer library. Where it is missing the test is skipped, and fails in CI."""
    top = name.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        reason = f"peer library {top} is not installed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return importlib.import_module(name)


def interrupt_at_work(command: Sequence[str], destination: Path) -> tuple[int, str]:
    """Starts a conversion and interrupts it once its workspace is there; gives its exit code and
    what it wrote to standard error."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, interrupts are ignored unless asked for.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not list(destination.parent.glob(f"{destination.name}.partial-*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    return process.returncode, told


@pytest.fixture(scope="session")
def peer() -> Callable[[str], ModuleType]:
    """`peer("bitsandbytes")` imports a peer library, or skips with a reason (fails in CI)."""
    return find_peer


Tensor = tuple[str, list[int], bytes]
"""Stored type, shape and bytes."""


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Writes a safetensors file with tensors in the order given."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))
    return path


@pytest.fixture
def safetensors_file() -> Callable[..., Path]:
    """The function `write_safetensors`, for tests that only need one file."""
    return write_safetensors


class CommandLine:
    """Runs `python -m weightpack` in a process of its own."""

    def __call__(
        self, *words: object, env: Mapping[str, str] | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "weightpack", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "NO_COLOR": "1", **(env or {})},
            check=False,
        )

    def json(self, *words: object) -> dict[str, Any]:
        """Runs with `--json`, expects success and gives the object."""
        done = self(*words, "--json")
        assert done.returncode == 0, done.stderr
        value: dict[str, Any] = json.loads(done.stdout)
        return value


@pytest.fixture(scope="session")
def command_line() -> CommandLine:
    """`command_line("inspect", path)` gives the finished process."""
    return CommandLine()


def bf16(values: Iterable[float] | Any) -> bytes:
    """Bytes of bfloat16 numbers."""
    import ml_dtypes
    import numpy as np

    return bytes(np.asarray(values).astype(ml_dtypes.bfloat16).tobytes())


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A small Llama with two shards, an index and its configs."""
    from weightpack.demo import make_model

    folder = tmp_path / "llama"
    make_model(folder)
    return folder
