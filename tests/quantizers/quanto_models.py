"""Small models packed layer by layer, and what optimum-quanto itself makes of the same weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from weightpack.quantizers.auto import AutoQuantizer

WEIGHTS = ("int8", "int4", "int2", "float8")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ERROR = {"int8": 0.02, "float8": 0.05, "int4": 0.2, "int2": 0.9}
"""Relative error of normally distributed weights that each type stays below."""


class Net(torch.nn.Module):
    """Two linear layers and a norm."""

    def __init__(self, width: int = 80, inner: int = 48) -> None:
        super().__init__()
        self.up = torch.nn.Linear(width, inner)
        self.down = torch.nn.Linear(inner, width, bias=False)
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.down(torch.relu(self.up(x))))


def load(model: torch.nn.Module, config: Any, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """Packs `model` in place, with its weights, by the hooks of a quantizer; gives the quantizer."""
    quantizer = AutoQuantizer.from_config(config, pre_quantized=False)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    quantizer.validate_environment()
    quantizer.preprocess_model(model, **options)
    for name, value in weights.items():
        if quantizer.check_if_quantized_param(model, name):
            quantizer.create_quantized_param(model, name, value, device="cpu", dtype=dtype)
    return quantizer


def load_packed(model: torch.nn.Module, state: dict[str, torch.Tensor], config: Any, dtype: Any = None) -> Any:
    """Loads a packed state dict into `model`; gives the quantizer."""
    quantizer = AutoQuantizer.from_config(config)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        name, component = quantizer.component_of(key) or (key, "")
        parts.setdefault(name, {})[component] = value
    packed = {name for name, found in parts.items() if set(found) != {""}}
    quantizer.preprocess_model(model, packed=packed)
    for name, found in parts.items():
        if name in packed:
            quantizer.create_quantized_param(model, name, found, device="cpu", dtype=dtype)
    return quantizer


def by_library(layer: torch.nn.Module, weights: str) -> Any:
    """The same layer packed by optimum-quanto's own code, frozen."""
    from optimum.quanto import quantize_module

    theirs = quantize_module(layer, weights=f"q{weights}")
    theirs.freeze()
    return theirs


def with_library_unpack(monkeypatch: Any) -> None:
    """Lets the library unpack without the C++ that it would compile, by code of our own in numpy."""
    from optimum.quanto.tensor.packed import PackedTensor

    def unpack(packed: Any) -> torch.Tensor:
        data, bits = packed._data.cpu().numpy(), packed._bits
        codes = np.concatenate([(data >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)])
        return torch.from_numpy(codes)[: packed.shape[0]].to(packed._data.device)

    monkeypatch.setattr(PackedTensor, "unpack", unpack)


def bits(tensor: torch.Tensor) -> tuple[str, list[int], bytes]:
    """Type, shape and bytes: what a file would hold."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype), list(tensor.shape), data


def assert_equal_states(ours: Any, theirs: Any) -> None:
    """The same names in the same order, the same bytes."""
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert bits(ours[key]) == bits(value), key
