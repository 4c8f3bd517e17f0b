"""Small modules that belong to no host, and their folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import weightpack as wp


class Block(nn.Module):
    """Two layers and a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] to the same."""
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(wp.ModelMixin, nn.Module):
    """An embedding, blocks, a convolution, buffers of both kinds, and a head that may be tied."""

    _no_split_modules = ("Block",)

    def __init__(self, width: int = 64, depth: int = 2, tokens: int = 50, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.head = nn.Linear(width, tokens, bias=False)
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("shift", torch.arange(width) / width)
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("wave", torch.sin(torch.arange(width) / 3), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token numbers [batch, length] to logits [batch, length, tokens]."""
        x = self.embed(tokens) * self.scale + self.shift.to(self.scale.dtype) + self.wave.to(self.scale.dtype)
        for block in self.blocks:
            x = block(x)
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x)


TOKENS = torch.arange(12).reshape(2, 6)


def make(seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Net:
    """A net with random weights."""
    torch.manual_seed(seed)
    return Net(**options).to(dtype).eval()


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], *, shards: int = 1) -> Path:
    """A model folder as hosts write it, in one file or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        own = names[number::shards]
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save(folder: Path, net: Net, *, shards: int = 1, **options: Any) -> Path:
    """A net's own folder."""
    state = net.state_dict()
    if net.head.weight is net.embed.weight:
        state.pop("head.weight")
    return write(folder, state, options, shards=shards)
