"""Whole conversions through the library: what comes out is a model, whatever went in."""

from __future__ import annotations

import json

import numpy as np
import pytest

import weightpack
from weightpack.errors import CheckpointError, ConfigError, FormatError, UnsupportedError

from .conftest import normal, write_safetensors

NF4_RMS, FP4_RMS = 0.092, 0.122
INT8_RMS = 0.0072
"""For rows of 256 weights; longer rows have larger scales."""


def names(**options):
    return {"layers": "names", **options}


def test_a_sharded_folder_becomes_a_folder(llama_folder, tmp_path):
    (llama_folder / "tokenizer.json").write_text('{"a": 1}')
    (llama_folder / "pytorch_model.bin").write_bytes(b"pickle")
    (llama_folder / "1_Pooling").mkdir()
    (llama_folder / "1_Pooling" / "config.json").write_text("{}")
    report = weightpack.convert(llama_folder, tmp_path / "out", max_shard_size="700KB", **names())
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert set(files) - set(shards) == {
        "1_Pooling/config.json",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    }
    assert report.left_out == ("pytorch_model.bin",)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head", "model.embed_tokens"]
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert {key: value for key, value in config.items() if key != "quantization_config"} == json.loads(
        (llama_folder / "config.json").read_text()
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)


def test_the_same_file_whatever_the_way_it_is_named(llama_folder, tmp_path):
    by_folder = weightpack.convert(llama_folder, tmp_path / "a.safetensors", **names())
    by_index = weightpack.convert(llama_folder / "model.safetensors.index.json", tmp_path / "b.safetensors", **names())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert [t.format for t in by_folder.tensors] == [t.format for t in by_index.tensors]


def test_packing_and_back(llama_folder, tmp_path):
    for to, rms in (("nf4", NF4_RMS), ("bitsandbytes:int8", INT8_RMS), ("fp4", FP4_RMS)):
        packed = tmp_path / to.rpartition(":")[2]
        weightpack.convert(llama_folder, packed, to, **names())
        report = weightpack.convert(packed, tmp_path / f"{packed.name}-back", "bf16")
        config = json.loads((tmp_path / f"{packed.name}-back" / "config.json").read_text())
        assert "quantization_config" not in config
        assert config["dtype"] == "bfloat16"
        assert {t.source_format for t in report.tensors} == {f"bitsandbytes:{packed.name}", "bf16"}
        assert {t.format for t in report.tensors} == {"bf16"}
        difference = weightpack.diff(llama_folder, tmp_path / f"{packed.name}-back")
        q_proj = next(pair for pair in difference.tensors if "q_proj" in pair.name)
        assert q_proj.error.relative_rms == pytest.approx(rms, rel=0.05)
        assert next(p for p in difference.tensors if p.name == "lm_head.weight").error.noise == 0


def test_packing_a_packed_model_again_copies_it(llama_folder, tmp_path):
    weightpack.convert(llama_folder, tmp_path / "one", double_quant=True, **names())
    again = weightpack.convert(tmp_path / "one", tmp_path / "two", **names())
    assert all(tensor.copied for tensor in again.tensors)
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    assert one == two
    assert one["quantization_config"]["bnb_4bit_use_double_quant"] is True


def test_gguf_and_back(llama_folder, tmp_path):
    weightpack.convert(llama_folder, tmp_path / "m.gguf", "q8_0", arch="none")
    info = weightpack.inspect(tmp_path / "m.gguf")
    assert info.metadata["general.architecture"] == "llama"
    assert info.metadata["general.file_type"] == 7
    assert info.metadata["general.name"] == "llama"
    formats = {tensor.name: tensor.format for tensor in info.tensors}
    assert formats["model.embed_tokens.weight"] == "gguf:q8_0"
    assert formats["model.norm.weight"] == "f32"
    report = weightpack.convert(tmp_path / "m.gguf", tmp_path / "back", "bf16")
    assert (tmp_path / "back" / "model.safetensors").is_file()
    assert not report.warnings
    assert weightpack.diff(llama_folder, tmp_path / "back").error.snr_db > 40
    weightpack.convert(tmp_path / "m.gguf", tmp_path / "nf4.safetensors", "nf4")
    with pytest.raises(UnsupportedError, match="would lose precision a second time"):
        weightpack.convert(tmp_path / "m.gguf", tmp_path / "again.gguf", "q4_0")
    weightpack.convert(tmp_path / "m.gguf", tmp_path / "again.gguf", "q4_0", requantize=True)
    again = weightpack.inspect(tmp_path / "again.gguf").metadata
    assert (again["general.architecture"], again["general.file_type"]) == ("llama", 2)


def test_a_folder_needs_a_file_name_for_gguf(llama_folder, tmp_path):
    with pytest.raises(ConfigError) as caught:
        weightpack.convert(llama_folder, tmp_path / "out", "q8_0")
    assert caught.value.hint == f"end the destination in .gguf: {tmp_path / 'out'}.gguf"


def test_a_dry_run_says_what_the_run_does(llama_folder, tmp_path):
    plan = weightpack.convert(llama_folder, tmp_path / "out", dry_run=True, **names())
    done = weightpack.convert(llama_folder, tmp_path / "out", **names())
    assert plan.plan_id == done.plan_id
    assert [(t.name, t.format, t.why, t.output_bytes) for t in plan.tensors] == [
        (t.name, t.format, t.why, t.output_bytes) for t in done.tensors
    ]
    paths = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    written = {path.relative_to(tmp_path / "out").as_posix() for path in paths}
    assert {file.path for file in plan.files} == written
    for file in plan.files:
        if file.bytes is not None:
            assert (tmp_path / "out" / file.path).stat().st_size == file.bytes
    assert {file.path: file.bytes for file in done.files} == {
        path.relative_to(tmp_path / "out").as_posix(): path.stat().st_size for path in paths
    }
    assert done.output_bytes == sum(path.stat().st_size for path in paths)


def test_progress_is_called_and_may_stop_everything(make_model, tmp_path):
    source = make_model({f"l.{i}.weight": normal((1024, 4096), i) for i in range(12)})
    calls = []
    weightpack.convert(source, tmp_path / "a.safetensors", on_progress=lambda *call: calls.append(call), **names())
    assert calls
    assert all(read <= total for read, total, _, _ in calls)

    def stop(*_: object) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        weightpack.convert(source, tmp_path / "b.safetensors", on_progress=stop, **names())
    assert not (tmp_path / "b.safetensors").exists()


def test_patterns_reach_the_file(llama_folder, tmp_path):
    report = weightpack.convert(
        llama_folder, tmp_path / "out", keep=["layers.0"], assign=["v_proj=f32"], only=["layers"], **names()
    )
    formats = {tensor.name: tensor.format for tensor in report.tensors}
    assert formats["model.layers.0.mlp.up_proj.weight"] == "bf16"
    assert formats["model.layers.1.self_attn.v_proj.weight"] == "f32"
    assert formats["model.layers.1.mlp.up_proj.weight"] == "bitsandbytes:nf4"
    skipped = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert "model.layers.0.mlp.up_proj" in skipped
    assert "model.layers.1.self_attn.v_proj" in skipped
    assert "model.layers.1.mlp.up_proj" not in skipped


def test_a_recipe_decides(llama_folder, tmp_path):
    (tmp_path / "r.toml").write_text(
        'default = "fp4"\nkeep = ["layers.0"]\n[[rule]]\nmatch = "v_proj"\nformat = "bf16"\nwhy = "sensitive"\n'
    )
    report = weightpack.convert(llama_folder, tmp_path / "out", recipe=tmp_path / "r.toml", **names())
    tensors = {tensor.name: tensor for tensor in report.tensors}
    assert tensors["model.layers.1.mlp.up_proj.weight"].format == "bitsandbytes:fp4"
    assert tensors["model.layers.1.self_attn.v_proj.weight"].why == "sensitive"
    assert tensors["model.layers.0.mlp.up_proj.weight"].copied
    with pytest.raises(ConfigError, match="recipe's default is bitsandbytes:fp4"):
        weightpack.convert(llama_folder, tmp_path / "no", "bf16", recipe=tmp_path / "r.toml")


def test_block_sizes_are_recorded(llama_folder, tmp_path):
    weightpack.convert(llama_folder, tmp_path / "out", block_size=128, **names())
    with weightpack.open_checkpoint(tmp_path / "out") as checkpoint:
        entry = checkpoint["model.layers.0.self_attn.q_proj.weight"]
        absmax = next(part for part in entry.parts if part.name.endswith(".absmax"))
        assert absmax.shape == (256 * 256 // 128,)
    with pytest.raises((ConfigError, FormatError)):
        weightpack.convert(llama_folder, tmp_path / "bad", block_size=100, **names())
    assert not (tmp_path / "bad").exists()


def test_weights_that_are_not_finite(make_model, tmp_path):
    weight = normal((64, 128), 1, np.float32)
    weight[3, 5] = np.inf
    source = make_model({"a.weight": weight})
    with pytest.raises(FormatError, match=r'tensor "a\.weight"'):
        weightpack.convert(source, tmp_path / "out.safetensors", **names())
    assert not list(tmp_path.glob("out*"))
    report = weightpack.convert(source, tmp_path / "out.safetensors", on_nonfinite="keep", **names())
    json.loads(report.to_json_string())
    with pytest.raises(ConfigError, match='on_nonfinite "zero"'):
        weightpack.convert(source, tmp_path / "no.safetensors", on_nonfinite="zero", **names())


def test_without_a_config_the_person_is_told(make_model, tmp_path):
    source = make_model({"a.weight": normal((64, 128))})
    report = weightpack.convert(source.parent, tmp_path / "out", **names())
    assert any("no config.json" in warning for warning in report.warnings)
    assert not (tmp_path / "out" / "config.json").exists()


def test_statistics_without_their_weight_are_seen(tmp_path):
    path = write_safetensors(tmp_path / "x.safetensors", {"a.weight.absmax": np.zeros(4, np.float32)})
    (problem,) = weightpack.inspect(path).problems
    assert problem == "1 array of bitsandbytes without a packed weight: a.weight.absmax"


def test_reading_tensors(llama_folder, tmp_path):
    import ml_dtypes

    weightpack.convert(llama_folder, tmp_path / "out", **names())
    with weightpack.open_checkpoint(llama_folder) as source, weightpack.open_checkpoint(tmp_path / "out") as packed:
        assert set(source) == set(packed)
        name = "model.layers.0.mlp.up_proj.weight"
        assert packed[name].format == "bitsandbytes:nf4"
        assert packed[name].shape == (768, 256)
        read = packed.read(name)
        assert read.dtype == ml_dtypes.bfloat16
        exact = packed.read(name, dtype="float32")
        assert exact.dtype == np.float32
        np.testing.assert_array_equal(exact.astype(ml_dtypes.bfloat16), read)
        original = source.read(name, dtype="float32")
        assert np.sqrt(((exact - original) ** 2).mean() / (original**2).mean()) == pytest.approx(NF4_RMS, rel=0.03)
        out = np.empty((768, 256), np.float16)
        assert packed.read(name, dtype="float16", out=out) is out
        np.testing.assert_array_equal(out, exact.astype(np.float16))
        with pytest.raises(ConfigError, match="out is float16"):
            packed.read(name, dtype="float32", out=out)
        with pytest.raises(ConfigError, match='dtype "int3"'):
            packed.read(name, dtype="int3")
        with pytest.raises(ConfigError, match="out is float32"):
            packed.read(name, dtype="float32", out=np.empty((256, 768), np.float32).T)
        with pytest.raises(KeyError):
            packed.read("nothing")
        streamed = dict(packed.stream("float32"))
        assert list(streamed) == list(packed)
        np.testing.assert_array_equal(streamed[name], exact)
    with pytest.raises(CheckpointError, match="is closed"):
        packed.read(name)


def test_a_source_that_cannot_be_held_by_gguf(make_model, tmp_path):
    source = make_model({"video.weight": normal((2, 2, 2, 2, 32))})
    with pytest.raises(UnsupportedError, match=r'at most 4 dimensions, got 5 \(tensor "video.weight"'):
        weightpack.convert(source, tmp_path / "out.gguf", "q8_0")
    assert not list(tmp_path.glob("out*"))


def test_what_a_file_says_about_itself_stays(llama_folder, tmp_path):
    from ..conftest import write_safetensors as write

    write(tmp_path / "x.safetensors", {"a.weight": ("F32", [64, 64], bytes(64 * 64 * 4))}, {"modelspec.title": "X"})
    weightpack.convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "bf16")
    metadata = weightpack.inspect(tmp_path / "y.safetensors").metadata
    assert (metadata["modelspec.title"], metadata["format"]) == ("X", "pt")


def test_reading_into_a_torch_tensor(peer, llama_folder):
    torch = peer("torch")
    with weightpack.open_checkpoint(llama_folder) as checkpoint:
        out = torch.empty(1024, 256, dtype=torch.bfloat16)
        assert checkpoint.read("lm_head.weight", out=out) is out
        np.testing.assert_array_equal(out.float().numpy(), checkpoint.read("lm_head.weight", "float32"))
        with pytest.raises(ConfigError, match="out is float32"):
            checkpoint.read("lm_head.weight", out=out.float())
