"""Conversions into GGUF: recipes, fallbacks, importance, requantizing, names of architectures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import weightpack
from weightpack.errors import CheckpointError, ConfigError, UnsupportedError

from .conftest import normal, write_safetensors

VECTORS = Path(__file__).parent.parent / "vectors"
NAMES = [f"blk.{i}.{kind}.weight" for i in range(8) for kind in ("attn_q", "attn_v", "ffn_down")]


def source(path: Path, columns: int = 256, **more: tuple[int, ...]) -> Path:
    shapes = {name: (4, columns) for name in NAMES}
    shapes |= {"token_embd.weight": (8, columns), "output_norm.weight": (columns,), **more}
    return write_safetensors(path, {name: normal(shape, dtype=np.float32) for name, shape in shapes.items()})


def formats(report: weightpack.ConvertReport) -> dict[str, str]:
    return {tensor.name: tensor.format for tensor in report.tensors}


def whys(report: weightpack.ConvertReport) -> dict[str, str]:
    return {tensor.name: tensor.why for tensor in report.tensors}


def test_a_recipe(tmp_path):
    report = weightpack.convert(source(tmp_path / "m.safetensors"), tmp_path / "m.gguf", "q4_k_m")
    found = formats(report)
    assert {name for name in NAMES if found[name] == "gguf:q6_k"} == {
        f"blk.{i}.{kind}.weight" for i in (0, 3, 6, 7) for kind in ("attn_v", "ffn_down")
    }
    assert found["token_embd.weight"] == "gguf:q6_k"
    assert whys(report)["blk.3.ffn_down.weight"] == "q4_k_m: ffn_down, one of the layers with more bits"
    metadata = weightpack.inspect(tmp_path / "m.gguf").metadata
    assert (metadata["general.file_type"], metadata["general.quantization_version"]) == (15, 2)
    stored = {tensor.name: tensor.format for tensor in weightpack.inspect(tmp_path / "m.gguf").tensors}
    assert stored == found


def test_a_recipe_as_the_default_of_a_recipe_file(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('default = "q4_0_mix"\n[[rule]]\nmatch = "blk.1.attn_q"\nformat = "f16"\n')
    src = source(tmp_path / "m.safetensors")
    found = formats(weightpack.convert(src, tmp_path / "m.gguf", recipe=recipe, dry_run=True))
    assert (found["blk.1.attn_q.weight"], found["blk.2.attn_q.weight"]) == ("f16", "gguf:q4_0")


def test_a_recipe_is_no_format_of_a_tensor(tmp_path):
    with pytest.raises(ConfigError, match='unknown format "q4_k_m"'):
        weightpack.convert(source(tmp_path / "m.safetensors"), tmp_path / "m.gguf", "q8_0", assign=["attn_q=q4_k_m"])


@pytest.mark.parametrize(
    ("fallback", "expected"),
    [("auto", "gguf:q5_0"), ("q8_0", "gguf:q8_0"), ("f16", "f16"), ("keep", "f32")],
)
def test_rows_that_a_block_does_not_divide(tmp_path, fallback, expected):
    src = source(tmp_path / "m.safetensors", **{"odd.weight": (4, 288), "blk.0.attn_k.weight": (4, 288)})
    report = weightpack.convert(src, tmp_path / "m.gguf", "q4_k", fallback=fallback, dry_run=True)
    assert formats(report)["blk.0.attn_k.weight"] == expected
    taken = "kept" if fallback == "keep" else expected.removeprefix("gguf:")
    reason = f"row of 288 weights is not a multiple of block_size 256: {taken} instead of q4_k"
    assert whys(report)["blk.0.attn_k.weight"] == reason
    assert any("2 tensors fall back to another type" in warning for warning in report.warnings)


def test_rows_that_nothing_divides(tmp_path):
    src = source(tmp_path / "m.safetensors", **{"blk.0.attn_k.weight": (4, 33)})
    for fallback in ("auto", "q8_0"):
        found = formats(weightpack.convert(src, tmp_path / "m.gguf", "q4_k", fallback=fallback, dry_run=True))
        assert found["blk.0.attn_k.weight"] == "f16"


def test_falling_back_can_be_refused(tmp_path, command_line):
    src = source(tmp_path / "m.safetensors", **{"blk.0.attn_k.weight": (4, 33)})
    with pytest.raises(UnsupportedError, match=r'q8_0: row of 33 .*"blk\.0\.attn_k\.weight"') as caught:
        weightpack.convert(src, tmp_path / "m.gguf", "q8_0", fallback="error")
    assert caught.value.hint == "--fallback chooses what such tensors become"
    done = command_line("convert", src, tmp_path / "m.gguf", "--to", "q8_0", "--fallback", "error")
    assert done.returncode == 3
    assert not (tmp_path / "m.gguf").exists()


def test_packed_sources_are_packed_anew_only_when_asked(tmp_path):
    src = source(tmp_path / "m.safetensors")
    weightpack.convert(src, tmp_path / "q8.gguf", "q8_0")
    with pytest.raises(UnsupportedError, match="is packed as gguf:q8_0 already") as caught:
        weightpack.convert(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "q4_0")
    assert "--requantize" in caught.value.hint
    report = weightpack.convert(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "q4_0", requantize=True)
    assert formats(report)["blk.0.attn_q.weight"] == "gguf:q4_0"
    assert any("lose precision a second time" in warning for warning in report.warnings)
    same = weightpack.convert(tmp_path / "q8.gguf", tmp_path / "again.gguf", "q8_0")
    assert all(tensor.copied for tensor in same.tensors)
    plain = weightpack.convert(tmp_path / "q8.gguf", tmp_path / "plain.gguf", "bf16")
    assert formats(plain)["blk.0.attn_q.weight"] == "bf16"


def importance_file(path: Path, columns: int = 256, kind: str = "imatrix", sums: float | None = None) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "")
    writer.add_type(kind)
    random = np.random.default_rng(3)
    for name in [*NAMES, "blk.9.attn_q.weight"]:
        values = random.random((1, columns), np.float32) * 100 if sums is None else np.full((1, columns), sums)
        writer.add_tensor(f"{name}.in_sum2", values.astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 50, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_importance(tmp_path):
    src, vectors = source(tmp_path / "m.safetensors"), importance_file(tmp_path / "i.gguf")
    weightpack.convert(src, tmp_path / "plain.gguf", "q4_k")
    report = weightpack.convert(src, tmp_path / "m.gguf", "q4_k", importance=vectors)
    assert '1 vector of the importance file has no tensor in the model (first "blk.9.attn_q.weight")' in report.warnings
    assert '1 packed tensor has no importance vector (first "token_embd.weight")' in report.warnings
    for name, differs in (("blk.1.attn_q.weight", True), ("token_embd.weight", False)):
        same = np.array_equal(stored_bytes(tmp_path / "m.gguf", name), stored_bytes(tmp_path / "plain.gguf", name))
        assert same is not differs


def test_recipes_know_whether_there_is_importance(tmp_path):
    src, vectors = source(tmp_path / "m.safetensors"), importance_file(tmp_path / "i.gguf")
    plain = weightpack.convert(src, tmp_path / "m.gguf", "q4_0_mix", dry_run=True)
    weighed = weightpack.convert(src, tmp_path / "m.gguf", "q4_0_mix", importance=vectors, dry_run=True)
    kinds = [formats(report)["blk.0.ffn_down.weight"] for report in (plain, weighed)]
    assert kinds == ["gguf:q4_0", "gguf:q4_1"]


def test_the_weighted_search_counts_all_columns_alike(tmp_path):
    src, ones = source(tmp_path / "m.safetensors"), importance_file(tmp_path / "i.gguf", sums=50)
    weightpack.convert(src, tmp_path / "plain.gguf", "q4_k")
    weightpack.convert(src, tmp_path / "ones.gguf", "q4_k", importance=ones)
    weightpack.convert(src, tmp_path / "weighted.gguf", "q4_k", search="weighted")
    found = [stored_bytes(tmp_path / f"{name}.gguf", "blk.1.attn_q.weight") for name in ("plain", "ones", "weighted")]
    assert np.array_equal(found[1], found[2])
    assert not np.array_equal(found[0], found[2])


def test_a_type_that_needs_importance(tmp_path):
    src, vectors = source(tmp_path / "m.safetensors"), importance_file(tmp_path / "i.gguf")
    with pytest.raises(UnsupportedError, match="written with an importance vector only") as caught:
        weightpack.convert(src, tmp_path / "m.gguf", "q2_k_s")
    assert "--importance" in caught.value.hint
    report = weightpack.convert(src, tmp_path / "m.gguf", "q2_k_s", importance=vectors)
    assert formats(report)["blk.1.attn_q.weight"] == "gguf:q2_k"


def stored_bytes(path: Path, name: str) -> np.ndarray:
    gguf = pytest.importorskip("gguf")
    (tensor,) = [tensor for tensor in gguf.GGUFReader(str(path)).tensors if tensor.name == name]
    return np.asarray(tensor.data).view(np.uint8).reshape(-1)


def test_importance_of_tensors_under_names_of_hosts(tmp_path):
    names = {f"model.layers.{i}.self_attn.q_proj.weight": normal((4, 256), dtype=np.float32) for i in range(8)}
    src = write_safetensors(tmp_path / "m.safetensors", names)
    report = weightpack.convert(src, tmp_path / "m.gguf", "q4_k", importance=importance_file(tmp_path / "i.gguf"))
    assert not any("no importance vector" in warning for warning in report.warnings)


def test_files_that_hold_no_importance(tmp_path):
    src = source(tmp_path / "m.safetensors")
    for path, match in (
        (importance_file(tmp_path / "model.gguf", kind="model"), "is no importance file: its general.type is 'model'"),
        (tmp_path / "imatrix.dat", "is not a .gguf"),
    ):
        with pytest.raises(CheckpointError, match=match):
            weightpack.convert(src, tmp_path / "m.gguf", "q4_0", importance=path)


def test_importance_of_another_model(tmp_path):
    vectors = importance_file(tmp_path / "i.gguf", columns=64)
    with pytest.raises(ConfigError) as caught:
        weightpack.convert(source(tmp_path / "m.safetensors"), tmp_path / "m.gguf", "q4_k", importance=vectors)
    assert caught.value.hint == "the importance file belongs to another model"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fallback": "no"}, 'fallback "no" is none of auto, error, q8_0, f16, keep'),
        ({"search": "no"}, 'search "no" is none of ref, weighted'),
        ({"arch": "fluks"}, 'unknown architecture "fluks"'),
    ],
)
def test_options_that_make_no_sense(tmp_path, options, match):
    with pytest.raises(ConfigError, match=match):
        weightpack.convert(source(tmp_path / "m.safetensors"), tmp_path / "m.gguf", "q8_0", **options)


def test_in_a_pipeline_an_architecture_is_that_of_one_component(tmp_path):
    golden = json.loads((VECTORS / "keymaps" / "ltxv.json").read_text("utf-8"))
    pipeline = tmp_path / "pipeline"
    models = {
        "transformer": ({"_class_name": golden["class"]}, golden["source"]),
        "text_encoder": ({"model_type": "t5"}, {"shared.weight": [8, 64], "encoder.final_layer_norm.weight": [64]}),
    }
    for name, (config, shapes) in models.items():
        (pipeline / name).mkdir(parents=True)
        (pipeline / name / "config.json").write_text(json.dumps(config))
        tensors = {key: normal(tuple(shape), dtype=np.float32) for key, shape in shapes.items()}
        write_safetensors(pipeline / name / "model.safetensors", tensors)
    parts = {name: ["library", "Class"] for name in models}
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **parts}))
    weightpack.convert(pipeline, tmp_path / "out", "q8_0", arch="ltxv")
    transformer = weightpack.inspect(next((tmp_path / "out" / "transformer").glob("*.gguf")))
    assert transformer.metadata["general.architecture"] == "ltxv"
    assert {tensor.name for tensor in transformer.tensors} == set(golden["reference"])
    encoder = weightpack.inspect(next((tmp_path / "out" / "text_encoder").glob("*.gguf")))
    assert {tensor.name for tensor in encoder.tensors} == set(models["text_encoder"][1])


def test_options_of_gguf_need_a_gguf_file(tmp_path):
    with pytest.raises(ConfigError, match="arch is an option of GGUF files"):
        weightpack.convert(source(tmp_path / "m.safetensors"), tmp_path / "out.safetensors", "bf16", arch="flux")


def test_recipes_are_listed(command_line):
    listed = command_line.json("formats")
    recipes = {row["short"]: row for row in listed["recipes"]}
    assert {"q4_k_m", "q3_k_l", "q2_k_mix", "q8_0_mix"} <= set(recipes)
    assert recipes["q4_k_m"]["reader"] == "llama.cpp, ComfyUI-GGUF"
    assert "gguf:q4_k_m" in command_line("formats").stdout


def test_the_command_line_takes_them(tmp_path, command_line):
    src = source(tmp_path / "m.safetensors")
    report = command_line.json(
        "convert", src, tmp_path / "m.gguf", "--to", "Q4_K_M", "--arch", "none", "--fallback", "f16", "--dry-run"
    )
    assert report["to"] == "gguf:q4_k_m"
    assert json.dumps(report).count("gguf:q6_k") >= 8
