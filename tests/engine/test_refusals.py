"""What cannot be done is refused with one clear message, and nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from .conftest import digest, layers, normal, run


def assert_nothing_written(tmp_path: Path) -> None:
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("to", ["nf4", "bitsandbytes:int8", "q8_0"])
def test_nonfinite_weights_name_tensor_and_index(
    make_model: Callable[..., Path], tmp_path: Path, value: float, to: str
) -> None:
    weight = normal((64, 128), dtype=np.float32)
    weight[3, 5] = value
    source = make_model({"layers.0.up_proj.weight": weight})
    target = tmp_path / ("out.gguf" if to == "q8_0" else "out")
    done = run("convert", source.parent, target, "--to", to, "--layers", "names", code=3)
    assert '"layers.0.up_proj.weight"' in done.stderr
    assert str(3 * 128 + 5) in done.stderr
    assert_nothing_written(tmp_path)


def test_int8_names_weights_that_overflow_half_precision(make_model: Callable[..., Path], tmp_path: Path) -> None:
    weight = normal((64, 128), dtype=np.float32)
    weight[2, 1] = 1e6
    source = make_model({"layers.0.up_proj.weight": weight})
    done = run("convert", source.parent, tmp_path / "out", "--to", "bitsandbytes:int8", "--layers", "names", code=3)
    assert str(2 * 128 + 1) in done.stderr
    assert_nothing_written(tmp_path)


def test_existing_destination(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model(layers(1))
    words = ["convert", source.parent, tmp_path / "out", "--to", "nf4", "--layers", "names"]
    run(*words)
    before = digest(tmp_path / "out")
    done = run(*words, code=2)
    assert "--overwrite" in done.stderr
    assert digest(tmp_path / "out") == before
    run(*words, "--overwrite")
    assert digest(tmp_path / "out") == before


def test_destination_that_holds_the_source(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model(layers(1))
    before = digest(source)
    run("convert", source.parent, source.parent, "--to", "nf4", "--layers", "names", "--overwrite", code=2)
    run("convert", source, source, "--to", "nf4", "--layers", "names", "--overwrite", code=2)
    assert digest(source) == before
    assert not list(tmp_path.glob("*.partial-*"))


def test_full_disk_is_found_before_work_starts(make_model: Callable[..., Path], tmp_path: Path) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        source = make_model(layers(4))
        done = run("convert", source.parent, disk / "out", "--to", "bf16", "--layers", "names", code=1)
        assert "space" in done.stderr
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_malformed_sources(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model(layers(1))
    good = source.read_bytes()
    header = struct.unpack("<Q", good[:8])[0]
    for length in [0, 1, 7, 8, 9, header // 2, header + 7, header + 8, len(good) - 1]:
        source.write_bytes(good[:length])
        done = run("convert", source.parent, tmp_path / "out", "--to", "nf4", "--layers", "names", code=3)
        assert "model.safetensors" in done.stderr
        assert_nothing_written(tmp_path)


def test_fifo_device_and_missing_sources(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    fifo = tmp_path / "model" / "model.safetensors"
    os.mkfifo(fifo)
    for source in [fifo, fifo.parent, tmp_path / "absent", tmp_path / "absent.safetensors", Path("/dev/null")]:
        done = run("convert", source, tmp_path / "out", "--to", "nf4", "--layers", "names", code=3)
        assert done.stderr.startswith("error: ")
        assert_nothing_written(tmp_path)


def test_an_index_cannot_leave_its_folder(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model(layers(1), folder="secret")
    folder = tmp_path / "model"
    folder.mkdir()
    for shard in ["../secret/model.safetensors", str(source), "sub/model.safetensors", "..\\secret\\model.safetensors"]:
        index = {"metadata": {}, "weight_map": {"layers.0.mlp.up_proj.weight": shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        done = run("convert", folder, tmp_path / "out", "--to", "nf4", "--layers", "names", code=3)
        assert "index" in done.stderr
        assert_nothing_written(tmp_path)
