"""Tiny random diffusion models, one for each architecture that has a map of names."""

from __future__ import annotations

from typing import Any

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": (
        "FluxTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "guidance_embeds": True,
            "axes_dims_rope": (8, 12, 12),
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 64,
            "num_attention_heads": 4,
            "joint_attention_dim": 256,
            "caption_projection_dim": 256,
            "pooled_projection_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 64,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 32,
            "ffn_dim": 512,
            "num_layers": 2,
            "image_dim": 32,
            "added_kv_proj_dim": 256,
        },
    ),
    "ltxv": (
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 4,
            "attention_head_dim": 64,
            "cross_attention_dim": 256,
            "num_layers": 2,
            "caption_channels": 32,
        },
    ),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 64,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "axes_dims_rope": (16, 24, 24),
        },
    ),
}


def make(name: str, diffusers: Any, **changes: Any) -> Any:
    """The tiny model of an architecture, with random weights that are no zeros or ones."""
    import torch

    kind, config = CONFIGS[name]
    torch.manual_seed(7)
    model = getattr(diffusers, kind)(**{**config, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.05 if parameter.dim() > 1 else 0.2
            parameter.copy_(torch.randn_like(parameter) * spread + (1 if parameter.dim() == 1 else 0))
    return model.eval()
