"""The whole of weightpack on a small real model: make it, pack it, read it back, compare.

The model is a Llama of a few million weights with random values, in the files that transformers
writes: two safetensors shards with an index, `config.json`, `generation_config.json`. Only numpy is
needed. What the conversions are held to is the error that each format has on normally distributed
weights.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .convert_ import convert
from .diff_ import diff
from .errors import CheckpointError, ConfigError
from .inspect_ import inspect
from .report import Report
from .targets import format_table

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KEY_HEADS, VOCABULARY = 256, 768, 4, 8, 4, 1024
SEED = 20240229

EXPECTED_RMS = {
    "bitsandbytes:nf4": 0.092,
    "gguf:q8_0": 0.0054,
    "gguf:q4_k": 0.0713,
    "gguf:q4_0": 0.0861,
}
"""Relative RMS error of each format on normally distributed weights, block size 64 for nf4."""

TOLERANCE = 0.03
"""How far a measured error may be from the expected one, relative to it."""


@dataclass(frozen=True)
class Step(Report):
    """One conversion of the demo and what was found when it was read back.

    `relative_rms` is over the packed tensors, `expected_rms` what the format is known for; `checks`
    are sentences about what was checked, each with its outcome.
    """

    _derived: ClassVar[tuple[str, ...]] = ("passed",)

    format: str
    destination: str
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    seconds: float
    relative_rms: float
    snr_db: float
    expected_rms: float
    checks: tuple[tuple[str, bool], ...]

    @property
    def passed(self) -> bool:
        """Whether every check came out right."""
        return all(ok for _, ok in self.checks)


@dataclass(frozen=True)
class Demo(Report):
    """All steps of one demo."""

    _derived: ClassVar[tuple[str, ...]] = ("passed",)

    model: str
    weights: int
    steps: tuple[Step, ...]
    kept: bool

    @property
    def passed(self) -> bool:
        """Whether every check of every step came out right."""
        return all(step.passed for step in self.steps)


def run(keep: str | None = None, say: Callable[[str], None] = lambda text: None) -> Demo:
    """Makes the model, converts it to NF4, Q8_0 and the best 4-bit GGUF type, and checks the results.

    `keep` is a new folder in which everything stays; without it, a temporary one is removed. `say`
    is told what is being done.
    """
    folder = Path(keep) if keep is not None else Path(tempfile.mkdtemp(prefix="weightpack-demo-"))
    if keep is not None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f'"{keep}" exists and is not an empty folder')
        folder.mkdir(parents=True, exist_ok=True)
    try:
        model = folder / "model"
        say(f"making a small Llama in {model}")
        make_model(model)
        names = {row.name for row in format_table()}
        small = "gguf:q4_k" if "gguf:q4_k" in names else "gguf:q4_0"
        steps = []
        for name, destination in (
            ("bitsandbytes:nf4", folder / "model-nf4"),
            ("gguf:q8_0", folder / "model-q8_0.gguf"),
            (small, folder / f"model-{small.partition(':')[2]}.gguf"),
        ):
            say(f"converting it to {name}")
            steps.append(_step(model, destination, name))
        info = inspect(model)
        return Demo(str(model), info.weights, tuple(steps), keep is not None)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _step(model: Path, destination: Path, name: str) -> Step:
    # Names decide here, so that the demo shows the same with and without a host library.
    report = convert(model, destination, name, layers="names", arch="none" if destination.suffix == ".gguf" else None)
    compared = diff(model, destination)
    packed = {tensor.name for tensor in report.tensors if tensor.format == name}
    pairs = [pair for pair in compared.tensors if pair.name in packed]
    first, *rest = [pair.error for pair in pairs]
    error = sum(rest, first)
    expected = EXPECTED_RMS[name]
    agree = [t.error for t in report.tensors if t.name in packed and t.error is not None]
    told = sum(agree[1:], agree[0])
    checks = [
        ("every tensor is there", compared.is_complete and not compared.unequal),
        ("every packed tensor reads back", len(pairs) == len(packed) > 0),
        ("the error is that of the format", abs(error.relative_rms / expected - 1) <= TOLERANCE),
        ("the report and the files agree on it", abs(told.relative_rms - error.relative_rms) <= 1e-6),
    ]
    if destination.is_dir():
        checks.append(("config.json says how it is packed", _is_described(destination)))
    return Step(
        name,
        str(destination),
        report.source_bytes,
        report.output_bytes,
        report.bits_per_weight,
        report.seconds,
        error.relative_rms,
        error.snr_db,
        expected,
        tuple(checks),
    )


def _is_described(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return (
        config.get("quantization_config", {}).get("quant_method") == "bitsandbytes"
        and (folder / "generation_config.json").is_file()
    )


def make_model(folder: Path) -> None:
    """Writes the demo's model into a new folder `folder`."""
    if folder.exists():
        raise ConfigError(f'"{folder}" exists')
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KEY_HEADS,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", "utf-8")

    tensors = list(_tensors())
    half = len(tensors) // 2
    weight_map = {}
    for number, part in enumerate((tensors[:half], tensors[half:]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        _write_shard(folder / name, part)
        weight_map.update({tensor: name for tensor, _, _ in part})
    total = sum(len(data) for _, _, data in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _tensors() -> Iterator[tuple[str, list[int], bytes]]:
    """Name, shape and bfloat16 bytes of every tensor."""
    import ml_dtypes
    import numpy as np

    random = np.random.default_rng(SEED)

    def weights(*shape: int) -> tuple[list[int], bytes]:
        values = random.normal(0, 0.02, shape) if len(shape) > 1 else random.normal(1, 0.05, shape)
        return list(shape), values.astype(ml_dtypes.bfloat16).tobytes()

    key = KEY_HEADS * (HIDDEN // HEADS)
    yield "model.embed_tokens.weight", *weights(VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", *weights(HIDDEN)
        yield f"{prefix}.self_attn.q_proj.weight", *weights(HIDDEN, HIDDEN)
        yield f"{prefix}.self_attn.k_proj.weight", *weights(key, HIDDEN)
        yield f"{prefix}.self_attn.v_proj.weight", *weights(key, HIDDEN)
        yield f"{prefix}.self_attn.o_proj.weight", *weights(HIDDEN, HIDDEN)
        yield f"{prefix}.post_attention_layernorm.weight", *weights(HIDDEN)
        yield f"{prefix}.mlp.gate_proj.weight", *weights(INTERMEDIATE, HIDDEN)
        yield f"{prefix}.mlp.up_proj.weight", *weights(INTERMEDIATE, HIDDEN)
        yield f"{prefix}.mlp.down_proj.weight", *weights(HIDDEN, INTERMEDIATE)
    yield "model.norm.weight", *weights(HIDDEN)
    yield "lm_head.weight", *weights(VOCABULARY, HIDDEN)


def _write_shard(path: Path, tensors: list[tuple[str, list[int], bytes]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, data in tensors:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors:
            file.write(data)
    if path.stat().st_size != 8 + len(text) + offset:
        raise CheckpointError(f'"{path}" was not written whole')
