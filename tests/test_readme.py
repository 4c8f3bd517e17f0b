"""The commands and the Python of README run as written, in order, beside a small model."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import weightpack as wp

from .conftest import write_safetensors as write_arrays
from .engine.conftest import normal, write_safetensors
from .engine.packed_sources import gptq, part
from .pipelines.tiny import save as save_pipeline

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def make_model(folder: Path) -> None:
    """A Llama of two layers, in the names and the config that transformers uses."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 160,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": normal((160, 128)), "model.norm.weight": normal((128,))}
    for layer in range(2):
        name = f"model.layers.{layer}"
        for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{name}.self_attn.{module}.weight"] = normal((128, 128), layer)
        tensors[f"{name}.mlp.gate_proj.weight"] = normal((256, 128), layer)
        tensors[f"{name}.mlp.up_proj.weight"] = normal((256, 128), layer)
        tensors[f"{name}.mlp.down_proj.weight"] = normal((128, 256), layer)
        tensors[f"{name}.input_layernorm.weight"] = normal((128,), layer)
        tensors[f"{name}.post_attention_layernorm.weight"] = normal((128,), layer)
    tensors["lm_head.weight"] = normal((160, 128), 9)
    write_safetensors(folder / "model.safetensors", tensors)


def make_gptq(model: Path, folder: Path) -> None:
    """The same model with its linear layers in GPTQ."""
    folder.mkdir()
    tensors, section = {}, None
    with wp.open_checkpoint(model) as checkpoint:
        for number, (name, entry) in enumerate(checkpoint.items()):
            if "_proj" in name:
                made = gptq(number, *entry.shape)
                module, section = name.removesuffix("weight"), made.section
                tensors |= {f"{module}{suffix}": array for suffix, array in made.arrays.items()}
            else:
                tensors[name] = part("F32", normal(entry.shape).astype("float32"))
    write_arrays(folder / "model.safetensors", tensors)
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))


def test_commands_and_code_run_as_written(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    make_gptq(tmp_path / "model", tmp_path / "model-gptq")
    save_pipeline(tmp_path / "pipeline")
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("weightpack ")]
    assert len(commands) > 8
    for line in commands:
        words = [sys.executable, "-m", *shlex.split(line)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    for code in blocks("python"):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{code}\n{done.stderr}"


def test_the_recipe_works(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    (recipe,) = blocks("toml")
    (tmp_path / "recipe.toml").write_text(recipe)
    words = ["convert", "model", "out.gguf", "--to", "q4_0", "--recipe", "recipe.toml", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "weightpack", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    to = {tensor["name"]: tensor["to"] for tensor in json.loads(done.stdout)["tensors"]}
    assert to["model.layers.0.self_attn.v_proj.weight"] == "gguf:q8_0"
    assert to["model.layers.0.self_attn.q_proj.weight"] == "gguf:q4_0"
