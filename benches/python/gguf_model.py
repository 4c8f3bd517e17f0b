"""A language model to GGUF: weightpack against llama.cpp's own `llama_model_quantize`, in one run.

    python benches/python/gguf_model.py --layers 12 --runs 3 --record benches/record/NAME.json

The source is a made llama of about 25 million weights per layer, as f16 GGUF and as a bf16
safetensors folder, in the page cache. Every run is a whole process, start-up included, and the two
files are compared tensor by tensor before anything is timed. Needs llama-cpp-python and gguf.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from conversion import cpu_name, run_process, write_safetensors

BF16 = np.dtype(ml_dtypes.bfloat16)
HIDDEN, FEED_FORWARD, HEADS, KEY_HEADS, TOKENS = 1536, 4096, 24, 8, 4096
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * KEY_HEADS // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * KEY_HEADS // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FEED_FORWARD, HIDDEN),
    "mlp.up_proj": (FEED_FORWARD, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED_FORWARD),
}
FILE_TYPES = {"q8_0_mix": 7, "q4_k_m": 15, "q6_k_mix": 18, "q2_k_mix": 10, "iq4_xs_mix": 30}
QUANTIZE = """
import sys, llama_cpp
choices = llama_cpp.llama_model_quantize_default_params()
choices.ftype, choices.nthread = int(sys.argv[3]), int(sys.argv[4])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), choices))
"""


def make_folder(folder: Path, layers: int) -> None:
    """A transformers folder without a tokenizer; weights are normal, sigma 0.02."""
    folder.mkdir()
    random = np.random.default_rng(4)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(0, 0.02, shape).astype(np.float32).astype(BF16)

    tensors = {"model.embed_tokens.weight": normal(TOKENS, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.{name}.weight": normal(*shape) for name, shape in SHAPES.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = np.ones(HIDDEN, BF16)
    tensors["model.norm.weight"] = np.ones(HIDDEN, BF16)
    tensors["lm_head.weight"] = normal(TOKENS, HIDDEN)
    write_safetensors(folder / "model.safetensors", tensors)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": 2048,
        "vocab_size": TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))


def convert(source: Path, target: Path, to: str, threads: int) -> list[str]:
    command = [sys.executable, "-m", "weightpack", "convert", str(source), str(target), "--to", to]
    return [*command, "--threads", str(threads), "--overwrite", "--json"]


def same_tensors(mine: Path, theirs: Path) -> None:
    import gguf

    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(theirs).tensors}
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(mine).tensors}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].tensor_type == tensor.tensor_type, name
        assert np.array_equal(found[name].data, tensor.data), name


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--types", default=",".join(FILE_TYPES))
    parser.add_argument("--folder", help="where to work; by default a temporary folder")
    parser.add_argument("--record")
    chosen = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=chosen.folder) as temporary:
        work = Path(temporary)
        make_folder(work / "model", chosen.layers)
        plain = work / "plain.gguf"
        run_process(convert(work / "model", plain, "f16", chosen.threads))
        source_bytes = plain.stat().st_size
        for name in chosen.types.split(","):
            mine, theirs, direct = (work / f"{kind}.gguf" for kind in ("mine", "theirs", "direct"))
            contenders = {
                "weightpack": convert(plain, mine, name, chosen.threads),
                "weightpack, folder": convert(work / "model", direct, name, chosen.threads),
                "llama.cpp": [
                    sys.executable, "-c", QUANTIZE, str(plain), str(theirs), str(FILE_TYPES[name]), str(chosen.threads)
                ],
            }  # fmt: skip
            taken: dict[str, list[tuple[float, int]]] = {key: [] for key in contenders}
            for run in range(chosen.runs):
                for key, command in contenders.items():
                    theirs.unlink(missing_ok=True)
                    taken[key].append(run_process(command))
                    if key == "llama.cpp" and run == 0:
                        same_tensors(mine, theirs)
            rows[name] = {
                key: {
                    "seconds": min(second for second, _ in runs),
                    "peak_anonymous_bytes": max(peak for _, peak in runs),
                }
                for key, runs in taken.items()
            }
            ratio = rows[name]["llama.cpp"]["seconds"] / rows[name]["weightpack"]["seconds"]
            print(name, json.dumps(rows[name]), f"{ratio:.1f} times as fast")
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "threads": chosen.threads,
        "source_bytes": source_bytes,
        "seconds": "least of the runs, a whole process",
        "conversions": rows,
    }
    if chosen.record:
        Path(chosen.record).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
