"""Anonymous memory does not grow with the model: measured as RssAnon of the whole process."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from .conftest import command, layers, normal, write_safetensors

LIMIT = 256 * 10**6


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


@pytest.mark.parametrize("options", [["--to", "nf4"], ["--to", "nf4", "--double-quant"], ["--to", "bitsandbytes:int8"]])
def test_many_tensors(make_model: Callable[..., Path], tmp_path: Path, options: list[str]) -> None:
    source = make_model(layers(150))
    assert source.stat().st_size > 300e6
    words = command("convert", source.parent, tmp_path / "out", *options, "--layers", "names", "--threads", "2")
    assert peak_anonymous(words) <= LIMIT / 2


@pytest.mark.parametrize("to", ["nf4", "q8_0"])
def test_one_tensor(make_model: Callable[..., Path], tmp_path: Path, to: str) -> None:
    source = make_model({"layers.0.up_proj.weight": normal((40_000, 4096))})
    target = tmp_path / ("out.gguf" if to == "q8_0" else "out")
    words = command("convert", source.parent, target, "--to", to, "--layers", "names")
    assert peak_anonymous(words) <= LIMIT / 2


@pytest.mark.large
@pytest.mark.parametrize("options", [["--to", "nf4"], ["--to", "nf4", "--double-quant"], ["--to", "bitsandbytes:int8"]])
@pytest.mark.parametrize("shape", ["checkpoint of 4 GB", "tensor of 2 GB"])
def test_gigabytes(tmp_path: Path, options: list[str], shape: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if shape == "checkpoint of 4 GB":
        tensors = layers(240, rows=4096, columns=2048)
    else:
        block = normal((1 << 20,), 3)
        tensors = {"layers.0.up_proj.weight": np.broadcast_to(block, (1024, 1 << 20)).reshape(1 << 18, 4096)}
    write_safetensors(folder / "model.safetensors", tensors)
    words = command("convert", folder, tmp_path / "out", *options, "--layers", "names")
    assert peak_anonymous(words) <= LIMIT


def test_the_plan_states_the_memory(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model({"layers.0.up_proj.weight": normal((512, 4096))})
    words = command(
        "convert", source.parent, tmp_path / "out", "--to", "nf4", "--layers", "names", "--max-memory", "1MB"
    )
    words += ["--dry-run", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan.get("plan", plan)["memory_bytes"] <= 1_000_000
    refused = [*words, "--max-memory", "1KB"]
    done = subprocess.run(refused, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--max-memory" in done.stderr
