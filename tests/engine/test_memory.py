"""Anonymous memory does not grow with the model: measured as RssAnon of the whole process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def write_fp8(folder: Path, shapes: dict[str, tuple[int, int]], config: dict[str, Any] | None = None) -> Path:
    """Weights in blocks of 128 rows and columns, as DeepSeek stores them."""
    codes = np.random.default_rng(0).integers(0, 0x7E, 1 << 22, np.uint8)
    header, offset = {}, 0
    for name, (rows, columns) in shapes.items():
        scales = (-(-rows // 128), -(-columns // 128))
        for array, dtype, shape in ((name, "F8_E4M3", (rows, columns)), (f"{name}_scale_inv", "F32", scales)):
            end = offset + np.prod(shape, dtype=int) * (1 if dtype == "F8_E4M3" else 4)
            header[array] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, int(end)]}
            offset = int(end)
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for row in header.values():
            first, end = row["data_offsets"]
            if row["dtype"] == "F32":
                file.write(np.full((end - first) // 4, 1e-4, np.float32).data)
                continue
            for start in range(first, end, codes.size):
                file.write(codes[: end - start].data)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("to", ["bf16", "q4_k", "modelopt:nvfp4"])
def test_one_tensor_in_fp8(tmp_path: Path, to: str) -> None:
    """300 MB."""
    model = write_fp8(tmp_path / "model", {"a.up_proj.weight": (42_000, 7168)})
    target = tmp_path / ("out.gguf" if to == "q4_k" else "out")
    words = command("convert", model, target, "--to", to, "--layers", "names")
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


@pytest.mark.parametrize("to", ["bf16", "q4_k_m"])
def test_a_llama_in_fp8(tmp_path: Path, to: str) -> None:
    """200 MB, of which queries and keys get another order of rows."""
    hidden, inner, layers = 2048, 8192, 3
    shapes = {"model.embed_tokens.weight": (128, hidden), "lm_head.weight": (128, hidden)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"model.layers.{layer}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (hidden, inner)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 512,
        "vocab_size": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model = write_fp8(tmp_path / "model", shapes, {**config, "quantization_config": section})
    norms = [f"model.layers.{n}.{name}_layernorm.weight" for n in range(layers) for name in ("input", "post_attention")]
    write_safetensors(model / "norms.safetensors", {name: normal((hidden,)) for name in (*norms, "model.norm.weight")})
    files = {**dict.fromkeys(shapes, "model.safetensors"), **dict.fromkeys(norms, "norms.safetensors")}
    files |= {f"{name}_scale_inv": "model.safetensors" for name in shapes} | {"model.norm.weight": "norms.safetensors"}
    (model / "model.safetensors").rename(model / "weights.safetensors")
    files = {name: file.replace("model.", "weights.") for name, file in files.items()}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert peak_anonymous(command("convert", model, tmp_path / "out.gguf", "--to", to)) <= LIMIT


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
