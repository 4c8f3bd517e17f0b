"""A small model for ModelOpt, packed through the loader and by ModelOpt as a whole."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import weightpack as wp


class Net(nn.Module):
    """Layers with rows of many lengths, a convolution, a norm, and a head that ModelOpt leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(256, 130)
        self.odd = nn.Linear(130, 64)
        self.norm = nn.LayerNorm(64)
        self.up = nn.Linear(64, 512, bias=False)
        self.lm_head = nn.Linear(512, 32)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[batch, 256] to logits [batch, 32], and the image that its first 64 numbers make."""
        image = self.conv(x[:, :64].reshape(-1, 4, 4, 4))
        return self.lm_head(self.up(self.norm(self.odd(self.wide(x))))), image


def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    """A net with random weights."""
    torch.manual_seed(seed)
    return Net().to(dtype).eval()


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Three rows of 256."""
    return torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).to(dtype)


def save(folder: Path, tensors: Any, config: dict[str, Any] | None = None) -> Path:
    """A model folder; `config` is its `quantization_config`."""
    folder.mkdir(parents=True)
    tensors = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
    plain = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    return folder


def load(folder: Path, config: Any = None, *, kind: type = Net, **options: Any) -> Any:
    """The model of a folder through `from_pretrained`."""
    return wp.from_pretrained(kind, folder, quantization_config=config, **options)


def whole(net: nn.Module, config: Any, packed: list[str]) -> nn.Module:
    """`net` in place as ModelOpt quantizes and compresses all of it, but for layers not in `packed`."""
    import modelopt.torch.quantization as mtq

    others = [name for name, module in net.named_modules() if hasattr(module, "weight") and name not in packed]
    entries = [*config.entries(), *({"quantizer_name": f"{name}.*", "enable": False} for name in others)]
    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(net, {"quant_cfg": entries, "algorithm": "max"})
        mtq.compress(net)
    return net


def raw(value: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor."""
    return value.detach().contiguous().reshape(-1).view(torch.uint8)
