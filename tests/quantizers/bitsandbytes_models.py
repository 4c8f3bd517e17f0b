"""Small models packed layer by layer, and what bitsandbytes makes of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from weightpack.quantizers.auto import AutoQuantizer


class Net(torch.nn.Module):
    """Two linear layers with shapes that are not whole blocks, and a norm."""

    def __init__(self, inner: int = 48, width: int = 80) -> None:
        super().__init__()
        self.up = torch.nn.Linear(width, inner)
        self.down = torch.nn.Linear(inner, 33, bias=False)
        self.norm = torch.nn.LayerNorm(33)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(torch.relu(self.up(x))))


class Conv1D(torch.nn.Module):
    """As GPT-2 has it in transformers: the weight is [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.nx = nx
        self.weight = torch.nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = torch.nn.Parameter(torch.zeros(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).reshape(*x.shape[:-1], self.nf)


def load(
    model: torch.nn.Module, config: Any, *, dtype: torch.dtype | None = None, device: str = "cpu", **options: Any
) -> Any:
    """Packs `model` in place, with its weights, by the hooks of a quantizer; gives the quantizer."""
    quantizer = AutoQuantizer.from_config(config, pre_quantized=False)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    quantizer.validate_environment()
    quantizer.torch_dtype = dtype
    quantizer.update_device_map({"": device})
    quantizer.preprocess_model(model, **options)
    for name, value in weights.items():
        if quantizer.check_if_quantized_param(model, name):
            quantizer.create_quantized_param(model, name, value, device=device, dtype=dtype)
    quantizer.postprocess_model(model)
    return quantizer


def bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of each tensor: what a file would hold."""
    return {
        name: (
            str(value.dtype),
            list(value.shape),
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, value in tensors.items()
    }


def parts_of(model: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The components of one packed parameter in the state dict of a model, by component."""
    state = model.state_dict()
    return {key[len(name) + 1 :]: value for key, value in state.items() if key == name or key.startswith(f"{name}.")}
