"""Packed models into GGUF in one step: the bytes are those of the plain model that they decode to, with the
architecture's names and order of rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weightpack as wp
from weightpack.errors import UnsupportedError

from ..conftest import bf16, write_safetensors
from ..language.models import make_model
from .packed_sources import DECODED_ONLY, float8, part

VECTORS = Path(__file__).parent.parent / "vectors"


def model(folder: Path, form: str) -> tuple[Path, Path]:
    """A small Llama packed in a format, and the same weights as plain numbers."""
    plain = make_model(folder / "llama", "llama2")
    packed, decoded = folder / "packed", folder / "decoded"
    maker = {**DECODED_ONLY, "fp8:block": float8("block")}.get(form)
    if maker is None:
        wp.convert(plain, packed, form, layers="names")
        wp.convert(packed, decoded, "f32")
        return packed, decoded
    arrays, weights, section = {}, {}, None
    with wp.open_checkpoint(plain) as checkpoint:
        for number, (name, entry) in enumerate(checkpoint.items()):
            if "_proj" not in name:
                values = checkpoint.read(name, dtype="float32")
                arrays[name] = weights[name] = part("F16", values.astype(np.float16))
                continue
            made = maker(number, *entry.shape)
            module = name.removesuffix("weight")
            arrays |= {f"{module}{suffix}": array for suffix, array in made.arrays.items()}
            weights[name] = part("F32", made.weights.astype(np.float32))
            section = made.section
    for place, tensors in ((packed, arrays), (decoded, weights)):
        shutil.copytree(plain, place)
        write_safetensors(place / "model.safetensors", tensors, {"format": "pt"})
    config = json.loads((packed / "config.json").read_text()) | {"quantization_config": section}
    (packed / "config.json").write_text(json.dumps(config))
    return packed, decoded


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    with wp.gguf.open(path) as file:
        return {name: (tensor.type, file.raw(name).tobytes()) for name, tensor in file.tensors.items()}


@pytest.mark.parametrize(
    ("form", "to"),
    [
        ("gptq:int", "q8_0"),
        ("awq:int", "q8_0"),
        ("hqq:int", "q4_k_m"),
        ("compressed-tensors:int", "q4_0"),
        ("fp8:block", "q4_k_m"),
        ("fp8:block", "bf16"),
        ("nf4", "q8_0"),
        ("quanto:int8", "q4_k"),
        ("torchao:int8", "q6_k"),
        ("modelopt:nvfp4", "q5_k_m"),
    ],
)
def test_a_packed_llama(tmp_path: Path, form: str, to: str) -> None:
    packed, decoded = model(tmp_path, form)
    plan = wp.convert(packed, tmp_path / "packed.gguf", to, dry_run=True)
    sizes = {tensor.name: tensor.bytes for tensor in wp.inspect(packed).tensors}
    formats = {tensor.name: tensor.format for tensor in wp.inspect(packed).tensors}
    assert plan.source_bytes == sum(sizes.values())
    # Queries and keys have another order of rows, and are told of like all others.
    assert all(tensor.source_format == formats[tensor.name] for tensor in plan.tensors)
    assert all(tensor.source_bytes == sizes[tensor.name] for tensor in plan.tensors)
    for source in (packed, decoded):
        wp.convert(source, tmp_path / f"{source.name}.gguf", to, verify=False)
    found, expected = (stored(tmp_path / f"{name}.gguf") for name in ("packed", "decoded"))
    assert found == expected
    assert len(found) == len(plan.tensors)


def deepseek(folder: Path) -> dict[str, np.ndarray]:
    """A layer of DeepSeek-V3 as its checkpoints hold it; gives the weights in float64."""
    shapes = {
        "self_attn.q_a_proj": (192, 256),
        "self_attn.kv_a_proj_with_mqa": (160, 256),
        "self_attn.o_proj": (256, 384),
        "mlp.experts.0.gate_proj": (256, 256),
        "mlp.experts.0.down_proj": (256, 256),
        "mlp.shared_experts.up_proj": (256, 256),
    }
    tensors: dict[str, Any] = {
        "model.embed_tokens.weight": ("BF16", [32, 256], bf16(np.random.default_rng(0).normal(0, 0.02, (32, 256)))),
        "model.layers.0.mlp.gate.weight": ("BF16", [1, 256], bf16(np.full((1, 256), 0.5))),
        "model.norm.weight": ("BF16", [256], bf16(np.ones(256))),
    }
    weights = {}
    for number, (name, shape) in enumerate(shapes.items()):
        made = float8("block")(number, *shape)
        module = f"model.layers.0.{name}."
        tensors |= {module + suffix: array for suffix, array in made.arrays.items()}
        weights[f"{module}weight"] = made.weights
    folder.mkdir()
    section = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    write_safetensors(folder / "model.safetensors", tensors)
    return weights


def test_deepseek_is_what_its_formula_says(tmp_path: Path) -> None:
    weights = deepseek(tmp_path / "model")
    wp.convert(tmp_path / "model", tmp_path / "plain", "bf16")
    wp.convert(tmp_path / "model", tmp_path / "model.gguf", "q4_k_m")
    with wp.open_checkpoint(tmp_path / "plain") as plain, wp.open_checkpoint(tmp_path / "model.gguf") as gguf:
        for name, wanted in weights.items():
            found = plain.read(name)
            assert found.dtype == ml_dtypes.bfloat16
            # The product is rounded to 32 bits before it is rounded to 16.
            np.testing.assert_array_equal(found, wanted.astype(np.float32).astype(ml_dtypes.bfloat16))
            packed = gguf.read(name, dtype="float32")
            assert gguf[name].format in ("gguf:q4_k", "gguf:q6_k", "gguf:q5_0", "gguf:q8_0")
            assert np.linalg.norm(packed - wanted) < 0.08 * np.linalg.norm(wanted)
        assert gguf["model.layers.0.mlp.gate.weight"].format == "bf16"


def flux(folder: Path, **types: str) -> Path:
    """A small Flux in float32, whose tensors of attention are stored in other types."""
    golden = json.loads((VECTORS / "keymaps" / "flux.json").read_text("utf-8"))
    random = np.random.default_rng(11)
    tensors = {}
    for name, shape in golden["source"].items():
        values = random.normal(0, 0.02, shape).astype(np.float32)
        kind = next((kind for part_of, kind in types.items() if f".{part_of}." in name), "F32")
        tensors[name] = part(kind, values.astype({"F32": np.float32, "F16": np.float16}[kind]))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": golden["class"]}))
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("to", ["q8_0", "bf16", "f32"])
def test_rows_in_different_formats_are_joined(tmp_path: Path, to: str) -> None:
    """Of attention, queries are packed, and keys and values are of two types."""
    source = flux(tmp_path / "flux", to_k="F16")
    wp.convert(source, tmp_path / "packed", "modelopt:int8", only=["to_q"], layers="names")
    wp.convert(tmp_path / "packed", tmp_path / "decoded", "f32")
    for name in ("packed", "decoded"):
        wp.convert(tmp_path / name, tmp_path / f"{name}.gguf", to)
    found, expected = (stored(tmp_path / f"{name}.gguf") for name in ("packed", "decoded"))
    assert found == expected
    plan = wp.convert(tmp_path / "packed", tmp_path / "no.gguf", to, dry_run=True)
    (joined,) = [tensor for tensor in plan.tensors if tensor.stored_as == "double_blocks.0.img_attn.qkv.weight"]
    assert joined.source_format == "modelopt:int8, f16, f32"


def test_rows_in_different_formats_are_decoded_where_they_are_kept(tmp_path: Path) -> None:
    source = flux(tmp_path / "flux", to_k="F16")
    report = wp.convert(source, tmp_path / "model.gguf", "q8_0", keep=["img_attn.qkv"])
    chosen = {tensor.stored_as: tensor for tensor in report.tensors}
    assert chosen["double_blocks.0.img_attn.qkv.weight"].format == "f32"
    assert chosen["double_blocks.0.img_attn.qkv.weight"].why.endswith("joined from several types")
    wp.convert(source, tmp_path / "plain", "f32")
    wp.convert(tmp_path / "plain", tmp_path / "plain.gguf", "q8_0", keep=["img_attn.qkv"])
    assert stored(tmp_path / "model.gguf") == stored(tmp_path / "plain.gguf")


def test_blocks_are_not_copied_beside_rows_of_another_type() -> None:
    from weightpack.assembly import joined
    from weightpack.decision import Target, keep
    from weightpack.entry import Entry, Part
    from weightpack.mapping import MappedTensor, Rows
    from weightpack.targets import find_format

    entries = {
        name: Entry(name, (4, 256), dtype, form, size, 1024, (Part(name, dtype, (4, 256), size),))
        for name, dtype, form, size in (("q", "Q8_0", "gguf:q8_0", 1088), ("k", "F32", "f32", 4096))
    }
    entry = joined(MappedTensor("qk", (Rows("q"), Rows("k", 1, 2))), entries)
    assert (entry.shape, entry.dtype, entry.nbytes, entry.is_mixed) == ((6, 256), "F32", 1088 + 2048, True)
    target = Target(find_format("q8_0"), "gguf", lambda name, shape, params: None)
    with pytest.raises(UnsupportedError, match='"qk" joins rows of several types, of which gguf:q8_0 is one'):
        keep(entry, target, "kept")
