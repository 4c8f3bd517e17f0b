"""Tiny random diffusers models, inputs for them, and diffusers' quantizers without their demand for a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": (
        "FluxTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 32,
            "num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 64,
            "axes_dims_rope": (8, 12, 12),
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
            "joint_attention_dim": 64, "caption_projection_dim": 64, "pooled_projection_dim": 32, "out_channels": 4,
            "pos_embed_max_size": 8,
        },
    ),
    "dit": (
        "DiTTransformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "num_layers": 2, "sample_size": 8,
         "num_embeds_ada_norm": 10, "norm_num_groups": 8},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 8, "num_layers": 2,
         "sample_size": 8, "cross_attention_dim": 64, "caption_channels": 32, "norm_num_groups": 8},
    ),
    "wide flux": (
        "FluxTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 64,
            "num_attention_heads": 2, "joint_attention_dim": 128, "pooled_projection_dim": 64,
            "axes_dims_rope": (8, 24, 32),
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "text_dim": 64,
         "freq_dim": 64, "ffn_dim": 128, "num_layers": 2},
    ),
    "unet": (
        "UNet2DConditionModel",
        {
            "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 8, "in_channels": 4,
            "out_channels": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 32, "norm_num_groups": 8,
        },
    ),
    "vae": (
        "AutoencoderKL",
        {"block_out_channels": (32,), "norm_num_groups": 8, "sample_size": 8, "latent_channels": 4},
    ),
}  # fmt: skip


def make(name: str, diffusers: Any, *, dtype: Any = None, **changes: Any) -> Any:
    """The tiny model of a name, its parameters random, rounded to `dtype`."""
    import torch

    kind, config = CONFIGS[name]
    torch.manual_seed(7)
    model = getattr(diffusers, kind)(**{**config, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.05 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn_like(parameter) * spread + (1 if parameter.dim() == 1 else 0))
    return model.to(dtype or torch.float32).eval()


def save(name: str, diffusers: Any, folder: Path, *, dtype: Any = None, **options: Any) -> Any:
    """Saves the tiny model of a name; gives its class."""
    model = make(name, diffusers, dtype=dtype)
    model.save_pretrained(folder, **options)
    return type(model)


def run(name: str, model: Any) -> Any:
    """What a tiny model makes of fixed inputs."""
    import torch

    torch.manual_seed(3)
    found = {parameter.dtype for parameter in model.parameters()}
    dtype = next(dtype for dtype in (torch.bfloat16, torch.float16, torch.float32) if dtype in found)

    def noise(*shape: int) -> Any:
        return torch.randn(*shape).to(dtype)

    time = torch.tensor([7.0]).to(dtype)
    device = "cpu" if model.device.type == "meta" else model.device
    time = time.to(device)
    with torch.no_grad(), torch.device(device):
        if name in ("flux", "wide flux"):
            ids = torch.zeros(4, 3), torch.arange(18).reshape(6, 3).float()
            return model(
                hidden_states=noise(1, 6, model.config.in_channels),
                encoder_hidden_states=noise(1, 4, model.config.joint_attention_dim),
                pooled_projections=noise(1, 64), timestep=time, img_ids=ids[1], txt_ids=ids[0],
            ).sample  # fmt: skip
        if name == "pixart":
            return model(
                noise(1, 4, 8, 8), encoder_hidden_states=noise(1, 3, 32), timestep=time,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample  # fmt: skip
        if name == "sd3":
            return model(
                hidden_states=noise(1, 4, 8, 8), encoder_hidden_states=noise(1, 3, 64),
                pooled_projections=noise(1, 32), timestep=time,
            ).sample  # fmt: skip
        if name == "dit":
            return model(noise(1, 4, 8, 8), timestep=torch.tensor([7]), class_labels=torch.tensor([3])).sample
        if name == "wan":
            return model(
                hidden_states=noise(1, 4, 1, 8, 8), timestep=torch.tensor([7]), encoder_hidden_states=noise(1, 5, 64)
            ).sample
        if name == "unet":
            return model(noise(1, 4, 8, 8), 7, encoder_hidden_states=noise(1, 3, 32)).sample
        return model(noise(1, 3, 8, 8)).sample


def assert_same_state(ours: Any, theirs: Any) -> None:
    """Equal names, types and bytes; what is of a tensor subclass is of the same one."""
    import torch

    own, other = ours.state_dict(), theirs.state_dict()
    assert set(own) == set(other)
    for key, tensor in other.items():
        assert type(own[key]) is type(tensor), key
        assert own[key].dtype == tensor.dtype, key
        assert own[key].shape == tensor.shape, key
        assert own[key].device == tensor.device, key
        for a, b in zip(parts(own[key]), parts(tensor), strict=True):
            assert a.dtype == b.dtype, key
            assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), key


def parts(tensor: Any) -> list[Any]:
    """The plain tensors that a tensor is made of."""
    import torch

    if type(tensor) in (torch.Tensor, torch.nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.detach().contiguous()]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts(getattr(tensor, name))]


def digests(model: Any) -> dict[str, str]:
    """For each name in a model's state its class, types, shapes and bytes, in one digest."""
    import hashlib

    import torch

    found = {}
    for name, tensor in model.state_dict().items():
        digest = hashlib.sha256(type(tensor).__name__.encode())
        for part in parts(tensor):
            digest.update(f"{part.dtype} {list(part.shape)}".encode())
            digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        found[name] = digest.hexdigest()
    return found


def lift_gpu_check(peer: Any, monkeypatch: Any) -> None:
    """diffusers refuses bitsandbytes where there is no GPU; only that is lifted."""
    peer("bitsandbytes")
    quantizers = peer("diffusers.quantizers.bitsandbytes.bnb_quantizer")
    for name in ("BnB4BitDiffusersQuantizer", "BnB8BitDiffusersQuantizer"):
        cls = getattr(quantizers, name)
        monkeypatch.setattr(cls, "validate_environment", lambda self, *args, **options: None)
        monkeypatch.setattr(cls, "update_device_map", lambda self, device_map: {"": "cpu"})
