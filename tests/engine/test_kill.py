"""A kill at any moment: nothing half-made passes for a model, and `--resume` ends with the same bytes."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ..conftest import interrupt_at_work
from .conftest import command, digest, layers, run

KILLS = 50


def readable(path: Path) -> bool:
    """Whether an unmodified loader takes the file for a model."""
    if path.suffix == ".gguf":
        return path.read_bytes()[:4] == b"GGUF"
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return len(file.keys()) > 0
    except SafetensorError:
        return False


def kill_after(words: list[str], seconds: float) -> int:
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    return process.wait()


@pytest.mark.parametrize("to", ["nf4", "q8_0"])
def test_kill_and_resume(make_model: Callable[..., Path], tmp_path: Path, to: str) -> None:
    source = make_model(layers(24))
    kind = "gguf" if to == "q8_0" else "safetensors"
    options = ["--to", to, "--layers", "names", "--threads", "1", "--no-verify"]
    if kind == "safetensors":
        options += ["--double-quant", "--max-shard-size", "5MB"]
    target = tmp_path / ("out.gguf" if kind == "gguf" else "out")
    source_path = source if kind == "gguf" else source.parent
    run("convert", source_path, target, *options)
    expected = digest(target)
    remove(target)
    started = time.monotonic()
    run("convert", source_path, target, *options)
    undisturbed = time.monotonic() - started
    chance = random.Random(11)
    killed = attempts = 0
    # A kill that comes too late, on a machine whose speed varies, does not count.
    while killed < KILLS // 2:
        attempts += 1
        assert attempts <= 8 * KILLS
        remove(target)
        words = command("convert", source_path, target, *options, "--resume")
        killed += kill_after(words, chance.uniform(0.1, 1.0) * undisturbed) < 0
        if target.exists():
            assert digest(target) == expected
        for partial in tmp_path.glob("*.partial-*"):
            for file in partial.rglob(f"*.{kind}"):
                if readable(file):
                    whole = {digest_ for name, digest_ in expected.items() if name in (file.name, ".")}
                    assert set(digest(file).values()) <= whole
        if not target.exists() or list(tmp_path.glob("*.partial-*")):
            run("convert", source_path, target, *options, "--resume")
        assert digest(target) == expected
        assert not list(tmp_path.glob("*.partial-*"))


def test_kill_while_overwriting_leaves_the_old_or_the_new(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model(layers(12))
    target = tmp_path / "out"
    run("convert", source.parent, target, "--to", "bitsandbytes:int8", "--layers", "names")
    old = digest(target)
    words = ["convert", source.parent, target, "--to", "nf4", "--layers", "names", "--overwrite"]
    started = time.monotonic()
    run(*words)
    undisturbed = time.monotonic() - started
    new = digest(target)
    assert old != new
    chance = random.Random(12)
    for _ in range(KILLS // 2):
        remove(target)
        run("convert", source.parent, target, "--to", "bitsandbytes:int8", "--layers", "names")
        kill_after(command(*words), chance.uniform(0.3, 1.1) * undisturbed)
        assert digest(target) in (old, new)
        for partial in tmp_path.glob("*.partial-*"):
            remove(partial)


def remove(path: Path) -> None:
    import shutil

    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def test_interrupt_is_seen_at_once_and_can_be_resumed(make_model: Callable[..., Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    big = rng.normal(size=(20000, 4096)).astype(np.float32)
    source = make_model({"layers.0.up_proj.weight": big})
    target = tmp_path / "out"
    words = ["convert", source.parent, target, "--to", "nf4", "--layers", "names", "--threads", "1"]
    run(*words)
    expected = digest(target)
    remove(target)
    returncode, errors = interrupt_at_work(command(*words), target)
    if returncode == 130:
        assert "--resume" in errors
        assert not target.exists()
        run(*words, "--resume")
    assert digest(target) == expected
