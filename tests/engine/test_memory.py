"""Anonymous memory does not grow with the model: measured as RssAnon of the whole process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from .conftest import command, layers, normal, peak_anonymous, write_safetensors

LIMIT = 256 * 10**6


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


@pytest.mark.parametrize("to", ["bf16", "q4_k", "modelopt:nvfp4"])
def test_one_tensor_in_fp8(tmp_path: Path, to: str) -> None:
    """300 MB in blocks of 128 rows and columns, as DeepSeek stores them."""
    rows, columns = 42_000, 7168
    codes = np.random.default_rng(0).integers(0, 0x7E, (rows // 100, columns), np.uint8)
    scales = np.full((-(-rows // 128), columns // 128), 1e-4, np.float32)
    parts = {"a.up_proj.weight": ("F8_E4M3", (rows, columns)), "a.up_proj.weight_scale_inv": ("F32", scales.shape)}
    header, offset = {}, 0
    for name, (dtype, shape) in parts.items():
        end = offset + (rows * columns if dtype == "F8_E4M3" else scales.nbytes)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    (tmp_path / "model").mkdir()
    with (tmp_path / "model" / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(100):
            file.write(codes.data)
        file.write(scales.data)
    target = tmp_path / ("out.gguf" if to == "q4_k" else "out")
    words = command("convert", tmp_path / "model", target, "--to", to, "--layers", "names")
    assert peak_anonymous(words) <= LIMIT


def test_a_stack_of_experts(tmp_path: Path) -> None:
    """200 MB of gpt-oss, as decoded 800 MB."""
    experts, rows, columns = 24, 2880, 5760
    codes = np.random.default_rng(0).integers(0, 256, (columns, rows // 2), np.uint8)
    scales = np.full((columns, rows // 32), 120, np.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    middle, end = experts * codes.nbytes, experts * (codes.nbytes + scales.nbytes)
    header = {
        f"{name}_blocks": {
            "dtype": "U8",
            "shape": [experts, columns, rows // 32, 16],
            "data_offsets": [0, middle],
        },
        f"{name}_scales": {"dtype": "U8", "shape": [experts, columns, rows // 32], "data_offsets": [middle, end]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model").mkdir()
    with (tmp_path / "model" / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in (codes, scales):
            for _ in range(experts):
                file.write(array.data)
    words = command("convert", tmp_path / "model", tmp_path / "out", "--to", "bf16")
    assert peak_anonymous(words) <= LIMIT


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


FILL = """
import sys
import numpy as np
import weightpack as wp
from weightpack.streaming import Job, fill, layout

checkpoint = wp.open_checkpoint(sys.argv[1])
format, double_quant, transpose = sys.argv[2], sys.argv[3] == "double_quant", sys.argv[3] == "transpose"
types = {"U8": "u1", "I8": "i1", "F32": "f4", "BF16": "u2"}
jobs, out = [], []
for name, entry in checkpoint.items():
    if len(entry.shape) == 2:
        jobs.append(Job(name, format, {"double_quant": True} if double_quant else {}, transpose=transpose))
    else:
        jobs.append(Job(name, "f32"))
    out.append([np.empty(shape, types[kind]) for _, _, shape, kind, _ in layout(jobs[-1], entry)])
if sys.argv[4] == "all":
    fill(checkpoint, jobs, out, threads=2)
else:
    fill(checkpoint, jobs[1:3], out[1:3], threads=2)
"""


@pytest.mark.parametrize(
    ("shape", "format", "how", "bits"),
    [
        ("many tensors", "bitsandbytes:nf4", "", 4.5),
        ("many tensors", "bitsandbytes:nf4", "double_quant", 4.127),
        ("many tensors", "copy", "", 16),
        ("one tensor", "bitsandbytes:int8", "", 8.008),
        ("one tensor", "bitsandbytes:nf4", "transpose", 4.5),
    ],
)
def test_filling_arrays(make_model: Callable[..., Path], shape: str, format: str, how: str, bits: float) -> None:
    weights = layers(150) if shape == "many tensors" else {"a.weight": np.tile(normal((1000, 4096)), (40, 1))}
    source = make_model(weights)
    assert source.stat().st_size > 300e6
    packed = sum(array.size * (bits / 8 if array.ndim == 2 else 4) for array in weights.values())
    words = [sys.executable, "-c", FILL, str(source), format, how]
    assert peak_anonymous([*words, "all"]) - peak_anonymous([*words, "few"]) <= packed + 64e6


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
