"""GGUF files as diffusers' `from_single_file` reads them: blocks as parameters that know their type."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from ...entry import Entry, Part
from ...gguf import dequantize


def entries_of(state_dict: Mapping[str, Any]) -> dict[str, Entry]:
    """The packed tensors of a state dict with diffusers' names and fused or split weights, described as
    those of a checkpoint."""
    entries = {}
    for name, value in state_dict.items():
        kind = getattr(value, "quant_type", None)
        if kind is not None:
            shape, nbytes = tuple(value.quant_shape), int(value.numel())
            part = Part(name, "U8", tuple(value.shape), nbytes)
            entries[name] = Entry(name, shape, "U8", f"gguf:{kind.name.lower()}", nbytes, prod(shape), (part,))
    return entries


def blocks_of(value: Any) -> Any:
    """The bytes of one of diffusers' parameters as an ordinary tensor, in memory of its own."""
    return value.as_tensor().detach().clone()


def decoded(value: Any) -> Any:
    """The weights of one of diffusers' parameters, float32."""
    return dequantize(value.as_tensor().detach().contiguous(), value.quant_type.name, shape=tuple(value.quant_shape))
