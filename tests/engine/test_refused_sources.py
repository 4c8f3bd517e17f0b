"""Packed sources that are damaged, or laid out in a way that is not decoded: what is said of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

import weightpack as wp
from weightpack.errors import CheckpointError, FormatError, UnsupportedError, WeightpackError

torch = pytest.importorskip("torch")

from .packed_folders import KINDS, MODULE, write  # noqa: E402

NVFP4, MXFP4 = "compressed-tensors nvfp4", "compressed-tensors mxfp4"
INT8, FP8 = "compressed-tensors int8, rows, zeros", "compressed-tensors fp8, blocks"


@pytest.fixture(scope="module")
def made():
    """A kind of source, made once."""
    done = {}
    return lambda kind: done[kind] if kind in done else done.setdefault(kind, KINDS[kind]())


def without(*names):
    return lambda arrays: {key: value for key, value in arrays.items() if key not in names}


def changed(name, change):
    return lambda arrays: {**arrays, name: change(arrays[name])}


@pytest.mark.parametrize(
    ("kind", "damage", "error", "message"),
    [
        (NVFP4, without("weight_scale"), CheckpointError, r'weight_scale" is missing'),
        (NVFP4, without("weight_global_scale"), CheckpointError, r'weight_global_scale" is missing'),
        (NVFP4, changed("weight_scale", lambda s: s[:-1]), CheckpointError, r"shape \[63, 16\], which fits no codes"),
        (NVFP4, changed("weight_scale", lambda s: s[0]), CheckpointError, r"shape \[16\], which fits no codes"),
        (NVFP4, changed("weight_scale", lambda s: s.double()), UnsupportedError, "scales of type F64"),
        (NVFP4, changed("weight_packed", lambda c: c[:, :-1]), CheckpointError, "fits no codes of shape"),
        (NVFP4, changed("weight_packed", lambda c: c.reshape(-1)), CheckpointError, "fits no codes of shape"),
        (NVFP4, changed("weight_packed", lambda c: c.to(torch.int16)), UnsupportedError, "in a format that is not"),
        (NVFP4, changed("weight_global_scale", lambda g: g.repeat(2)), CheckpointError, "has 8 bytes"),
        (NVFP4, changed("weight_global_scale", lambda g: g.int()), CheckpointError, "expected one number of F32"),
        (NVFP4, changed("weight_global_scale", lambda g: g * 0), FormatError, "NaN|inf"),
        (MXFP4, changed("weight_packed", lambda c: c.repeat(1, 2)[:, :192]), UnsupportedError, "of 6 bits are not"),
        (MXFP4, lambda arrays: {**arrays, "weight_zero_point": torch.zeros(1)}, UnsupportedError, "floats with zeros"),
        (INT8, changed("weight_scale", lambda s: s[:3]), CheckpointError, r"shape \[3, 1\], which fits no codes"),
        (INT8, changed("weight_scale", lambda s: s.int()), UnsupportedError, "scales of type I32"),
        (INT8, changed("weight_zero_point", lambda z: z.int()), CheckpointError, r"is I32 \[64, 1\], expected I8"),
        (INT8, changed("weight_zero_point", lambda z: z[:2]), CheckpointError, r"is I8 \[2, 1\], expected I8"),
        (INT8, changed("weight", lambda c: c.reshape(-1)), CheckpointError, r"fits no codes of shape \[16384\]"),
        (FP8, changed("weight_scale", lambda s: s.repeat(3, 1)), CheckpointError, r"shape \[3, 2\], which fits"),
    ],
)  # fmt: skip
def test_a_damaged_source_is_refused(made, tmp_path, kind, damage, error, message):
    packed = made(kind)
    folder = write(replace(packed, arrays=damage(packed.arrays)), tmp_path / "model")
    with pytest.raises(error, match=message) as told:
        wp.convert(folder, tmp_path / "new", to="nf4", layers="names")
    assert f'tensor "{MODULE}.weight' in str(told.value) or f'"{MODULE}.weight' in str(told.value)
    if error is not FormatError:
        assert str(folder / "model.safetensors") in str(told.value)
    assert not (tmp_path / "new").exists()


def test_a_damaged_source_is_exit_code_3(command_line, made, tmp_path):
    packed = made(INT8)
    arrays = {**packed.arrays, "weight_scale": packed.arrays["weight_scale"][:3]}
    folder = write(replace(packed, arrays=arrays), tmp_path / "model")
    done = command_line("convert", folder, tmp_path / "new", "--to", "nf4")
    assert done.returncode == 3
    assert f'(tensor "{MODULE}.weight_scale", file "{folder / "model.safetensors"}")' in done.stderr


TURNED = {"config_groups": {"R4": {"type": "hadamard", "apply": [{"targets": ["down_proj"], "location": "input"}]}}}


@pytest.mark.parametrize(
    ("kind", "section", "message"),
    [
        (
            "gptq",
            {"checkpoint_format": "marlin"},
            'checkpoint_format "marlin" is not decoded by this version, only gptq',
        ),
        ("gptq", {"format": "bitblas"}, 'format "bitblas" is not decoded'),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format is not decoded"),
        ("awq", {"version": "GEMV"}, 'version "gemv" is not decoded by this version, only gemm'),
        ("awq", {"version": "gemv_fast"}, 'version "gemv_fast" is not decoded'),
        (INT8, {"format": "marlin-24"}, 'as "marlin-24", which is not decoded'),
        (INT8, {"sparsity_config": {"format": "sparse-24-bitmask"}}, 'as "sparse-24-bitmask", which is not decoded'),
        (INT8, {"transform_config": TURNED}, r'turns its activations \(transform_config, at "input"\)'),
    ],
)
def test_a_layout_that_is_not_decoded_is_named(made, tmp_path, kind, section, message):
    packed = made(kind)
    folder = write(replace(packed, section={**packed.section, **section}), tmp_path / "model")
    with pytest.raises(UnsupportedError, match=message) as told:
        wp.convert(folder, tmp_path / "new", to="bf16")
    assert "convert" in told.value.hint


def test_codes_of_a_kernel_are_told_by_their_shape(made, tmp_path):
    packed = made("gptq")
    codes = packed.arrays["qweight"].reshape(16, -1)
    folder = write(replace(packed, arrays={**packed.arrays, "qweight": codes}), tmp_path / "model")
    with pytest.raises(UnsupportedError, match="neither GPTQ's nor AWQ's layout") as told:
        wp.open_checkpoint(folder)
    assert "Marlin" in told.value.hint


def test_the_second_version_of_gptq_has_two_names(made, tmp_path):
    packed = made("gptq v2")
    section = {**packed.section, "format": packed.section["checkpoint_format"]}
    del section["checkpoint_format"]
    folder = write(replace(packed, section=section), tmp_path / "model")
    with wp.open_checkpoint(folder) as checkpoint:
        found = torch.from_numpy(checkpoint.read(f"{MODULE}.weight", dtype="float32"))
    assert torch.equal(found, packed.weight)


def test_weights_that_a_part_of_low_rank_belongs_to_are_refused(made, tmp_path):
    packed = made("modelopt nvfp4")
    arrays = {**packed.arrays, "svdquant_lora_a": torch.zeros(4, 256)}
    with pytest.raises(WeightpackError, match=r"svdquant_lora_a\" is a part of the weight"):
        wp.open_checkpoint(write(replace(packed, arrays=arrays), tmp_path / "model"))
