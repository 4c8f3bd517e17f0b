"""What kind of layer a module is, for the rules of conversion."""

from __future__ import annotations

from typing import Any


def kind_of(torch: Any, module: Any) -> str:
    """`embedding`, `norm`, `convolution` or `other`. What counts as `linear` is for each host to say."""
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    if "norm" in type(module).__name__.lower():
        return "norm"
    return "convolution" if isinstance(module, torch.nn.modules.conv._ConvNd) else "other"
