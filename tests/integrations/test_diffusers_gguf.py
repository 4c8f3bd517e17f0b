"""Diffusion models converted to GGUF, in unmodified diffusers: `from_single_file` reads them, and they
compute what the same model computes with the decoded weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import weightpack
from weightpack import keymaps

from ..diffusion_models import CONFIGS, make

SINGLE_FILE_FUNCTIONS = {
    "flux": "convert_flux_transformer_checkpoint_to_diffusers",
    "sd3": "convert_sd3_transformer_checkpoint_to_diffusers",
    "wan": "convert_wan_transformer_to_diffusers",
    "ltxv": "convert_ltx_transformer_checkpoint_to_diffusers",
}
LARGEST_ERROR = {"q8_0": 0.02, "q4_k": 0.2, "q4_k_m": 0.2}
"""Relative RMS error of the output, several times that of the weights."""


def inputs(name: str) -> dict[str, Any]:
    """What the tiny model of an architecture computes with."""
    import torch

    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    step = torch.tensor([0.5])
    if name == "flux":
        return {
            "hidden_states": normal(1, 16, 16),
            "encoder_hidden_states": normal(1, 8, 32),
            "pooled_projections": normal(1, 32),
            "timestep": step,
            "guidance": step,
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(8, 3),
        }
    if name == "sd3":
        return {
            "hidden_states": normal(1, 4, 8, 8),
            "encoder_hidden_states": normal(1, 8, 256),
            "pooled_projections": normal(1, 32),
            "timestep": step,
        }
    if name == "wan":
        return {
            "hidden_states": normal(1, 4, 2, 8, 8),
            "encoder_hidden_states": normal(1, 8, 32),
            "encoder_hidden_states_image": normal(1, 257, 32),
            "timestep": torch.tensor([5]),
        }
    if name == "ltxv":
        return {
            "hidden_states": normal(1, 16, 8),
            "encoder_hidden_states": normal(1, 8, 32),
            "encoder_attention_mask": torch.ones(1, 8),
            "timestep": torch.tensor([5]),
            "num_frames": 1,
            "height": 4,
            "width": 4,
        }
    return {
        "hidden_states": normal(1, 16, 16),
        "encoder_hidden_states": normal(1, 8, 32),
        "encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.bool),
        "timestep": step,
        "img_shapes": [(1, 4, 4)],
    }


def output(model: Any, name: str) -> Any:
    import torch

    with torch.no_grad():
        return model(**inputs(name), return_dict=False)[0].float()


def relative(found: Any, expected: Any) -> float:
    return float((found - expected).norm() / expected.norm())


CASES = [("flux", "q4_k"), *((name, to) for name in sorted(CONFIGS) for to in ("q8_0", "q4_k_m"))]


@pytest.mark.parametrize(("name", "to"), CASES)
def test_from_single_file_reads_it_and_computes_the_same(peer, tmp_path: Path, name: str, to: str) -> None:
    diffusers, torch = peer("diffusers"), peer("torch")
    peer("gguf")
    changes = {}
    if name == "flux":
        # diffusers takes the reference names of FLUX.1 at its full width only; see the test below.
        changes = {"num_attention_heads": 8}
    model = make(name, diffusers, **changes)
    if to == "q4_k_m":
        # What a layer reads that is no linear one must not be left in bfloat16.
        model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    model = model.float()
    target = tmp_path / "model.gguf"
    report = weightpack.convert(tmp_path / "model", target, to, arch="none" if name == "flux" else None)
    assert report.error is not None
    assert any(tensor.format.startswith("gguf:") for tensor in report.tensors)

    loaded = type(model).from_single_file(
        str(target),
        config=str(tmp_path / "model"),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    assert any(type(p).__name__ == "GGUFParameter" for p in loaded.parameters())
    found, reference = output(loaded, name), output(model, name)
    error = relative(found, reference)
    assert 0 < error < LARGEST_ERROR[to]

    with weightpack.open_checkpoint(target) as stored:
        decoded = {key: torch.from_numpy(stored.read(key, "float32")) for key in stored}
        plan = None if name == "flux" else keymaps.read_keymap(name).host_plan(list(stored.values()))
    if plan is not None:
        decoded = {tensor.name: joined(tensor, decoded) for tensor in plan.tensors}
    model.load_state_dict(decoded, strict=True)
    # diffusers decodes in half precision, which is a small part of the error.
    rounding = relative(found, output(model, name))
    assert rounding < error / 10


def joined(tensor: Any, sources: dict[str, Any]) -> Any:
    """What the engine does with the rows of a mapped tensor."""
    import torch

    parts = []
    for rows in tensor.sources:
        array = sources[rows.name]
        last = None if rows.count is None else rows.first + rows.count
        parts.append(array if rows.is_whole else array[rows.first : last])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_our_names_and_their_function_give_the_source_back(peer, tmp_path: Path, name: str, dtype: str) -> None:
    diffusers, torch, safetensors = peer("diffusers"), peer("torch"), peer("safetensors.torch")
    functions = peer("diffusers.loaders.single_file_utils")
    tensors = {key: value.to(getattr(torch, dtype)) for key, value in make(name, diffusers).state_dict().items()}
    if name == "flux":
        # Their function cuts fused rows at the width of FLUX.1, whatever the model's is.
        for block in range(2):
            rows = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 4 * 3072}
            for module, count in rows.items():
                key = f"single_transformer_blocks.{block}.{module}"
                tensors[f"{key}.weight"] = torch.randn(count, 8).to(getattr(torch, dtype))
                tensors[f"{key}.bias"] = torch.randn(count).to(getattr(torch, dtype))
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    short = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    weightpack.convert(tmp_path / "model.safetensors", tmp_path / "model.gguf", short, arch=name)

    with weightpack.open_checkpoint(tmp_path / "model.gguf") as stored:
        assert stored.metadata["general.architecture"] == name
        checkpoint = {key: torch.from_numpy(stored.read(key, "float32")) for key in stored}
    theirs = checkpoint
    if name in SINGLE_FILE_FUNCTIONS:
        theirs = getattr(functions, SINGLE_FILE_FUNCTIONS[name])(checkpoint)
    assert set(theirs) == set(tensors)
    for key, value in tensors.items():
        assert theirs[key].shape == value.shape, key
        assert torch.equal(theirs[key], value.float()), key


@pytest.mark.large
def test_flux_under_its_reference_names(peer, tmp_path: Path) -> None:
    diffusers, torch = peer("diffusers"), peer("torch")
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = make(
            "flux",
            diffusers,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=128,
            num_attention_heads=24,
            axes_dims_rope=(16, 56, 56),
        )
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(tmp_path / "model")
    report = weightpack.convert(tmp_path / "model", tmp_path / "model.gguf", "q8_0")
    assert "double_blocks.0.img_attn.qkv.weight" in {tensor.stored_as for tensor in report.tensors}
    loaded = type(model).from_single_file(
        str(tmp_path / "model.gguf"),
        config=str(tmp_path / "model"),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    found = output(loaded, "flux")
    assert relative(found, output(model.float(), "flux")) < LARGEST_ERROR["q8_0"]
