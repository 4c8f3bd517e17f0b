"""Every kind of packed source, made by its own library, becomes plain numbers and other packings."""

from __future__ import annotations

import json

import pytest

import weightpack as wp

torch = pytest.importorskip("torch")

from .packed_folders import KINDS, MODULE, write  # noqa: E402

WEIGHT = f"{MODULE}.weight"


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_folder_becomes_anything(tmp_path, kind):
    packed = KINDS[kind]()
    folder = write(packed, tmp_path / "model")
    with wp.open_checkpoint(folder) as checkpoint:
        assert set(checkpoint) == {WEIGHT, "model.norm.weight"}
        assert checkpoint[WEIGHT].format.startswith((packed.form, "fp8:", "modelopt:mxfp8"))
        found = torch.from_numpy(checkpoint.read(WEIGHT, dtype="float32"))
    assert torch.isfinite(found).all()
    assert torch.equal(found.to(packed.weight.dtype), packed.weight)

    assert wp.inspect(folder).problems == ()
    for to, bound in (("bf16", 0.0), ("nf4", 0.12), ("q8_0", 0.01)):
        new = tmp_path / (f"{to}.gguf" if to == "q8_0" else to)
        report = wp.convert(folder, new, to=to, arch="none" if to == "q8_0" else None, layers="names")
        with wp.open_checkpoint(new) as checkpoint:
            assert set(checkpoint) == {WEIGHT, "model.norm.weight"}
            result = torch.from_numpy(checkpoint.read(WEIGHT, dtype="float32"))
            assert ("quantization_config" in (checkpoint.config or {})) == (to == "nf4")
        wanted = found.bfloat16().float() if to == "bf16" else found
        assert (result - wanted).norm() <= bound * wanted.norm()
        told = " ".join(report.warnings)
        is_kept = to == "nf4" and kind.startswith("bitsandbytes nf4")
        assert ("lose precision a second time" in told) == (to != "bf16" and not is_kept)


def test_a_command_warns_of_packing_twice(command_line, tmp_path):
    folder = write(KINDS["compressed-tensors nvfp4"](), tmp_path / "model")
    done = command_line("convert", folder, tmp_path / "new", "--to", "nf4", "--layers", "names")
    assert done.returncode == 0
    assert "1 tensors are packed already, and lose precision a second time" in done.stderr
    done = command_line("convert", folder, tmp_path / "plain", "--to", "bf16")
    assert "second time" not in done.stderr
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config == {"model_type": "x", "dtype": "bfloat16"}


@pytest.mark.parametrize("to", ["gguf:mxfp4", "modelopt:mxfp4"])
@pytest.mark.parametrize("kind", ["compressed-tensors mxfp4", "modelopt W4A8, mxfp4"])
def test_the_same_numbers_in_another_layout_lose_nothing(tmp_path, kind, to):
    packed = KINDS[kind]()
    new = tmp_path / ("new.gguf" if to.startswith("gguf") else "new")
    arch = "none" if to.startswith("gguf") else None
    report = wp.convert(write(packed, tmp_path / "model"), new, to=to, arch=arch, layers="names")
    assert "second time" not in " ".join(report.warnings)
    with wp.open_checkpoint(new) as checkpoint:
        assert checkpoint[WEIGHT].format == to
        assert torch.equal(torch.from_numpy(checkpoint.read(WEIGHT, dtype="float32")), packed.weight.float())


@pytest.mark.parametrize(
    ("kind", "to", "algorithm", "lost"),
    [
        # Readers of NVFP4 take blocks of 16 for granted.
        ("modelopt W4A8, nvfp4", "modelopt:nvfp4", "W4A16_NVFP4", True),
        ("modelopt W4A8, AWQ", "modelopt:int4", "W4A8_AWQ", False),
        ("modelopt int8, SmoothQuant", "modelopt:int8", "W8A8_SQ_PER_CHANNEL", False),
    ],
)
def test_layers_of_modelopt_are_left_where_their_config_can_say_so(tmp_path, kind, to, algorithm, lost):
    packed = KINDS[kind]()
    report = wp.convert(write(packed, tmp_path / "model"), tmp_path / "new", to=to, layers="names")
    with wp.open_checkpoint(tmp_path / "new") as checkpoint:
        shapes = {part.name.rpartition(".")[2]: part.shape for part in checkpoint[WEIGHT].parts}
        found = torch.from_numpy(checkpoint.read(WEIGHT, dtype="float32"))
        section = checkpoint.config["quantization_config"]
    assert section["quant_algo"] == algorithm
    assert torch.equal(found, packed.weight.float()) == (not lost)
    assert (found - packed.weight).norm() < 0.1 * found.norm()
    assert ("second time" in " ".join(report.warnings)) == lost
    if lost:
        assert shapes == {"weight": (64, 128), "weight_scale": (64, 16), "weight_scale_2": ()}
