"""Small models for torchao, their folders, and comparisons of packed state dicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.conftest import find_peer
from weightpack.quantizers.auto import AutoQuantizer


class Net(nn.Module):
    """Three linear layers, one of a shape that fits no groups, and an embedding."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.odd = nn.Linear(width, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.odd(self.down(torch.relu(self.up(self.embed(tokens)))))


def pack(model: nn.Module, config: Any, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """Packs `model` in place, with its own weights, by the hooks in their order; gives the quantizer."""
    quantizer = AutoQuantizer.from_config(config, pre_quantized=False)
    quantizer.validate_environment(torch_dtype=dtype, device_map={"": "cpu"})
    dtype = quantizer.update_torch_dtype(dtype)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    quantizer.preprocess_model(model.to("meta"), **options)
    for name, value in weights.items():
        if quantizer.check_if_quantized_param(model, name):
            quantizer.create_quantized_param(model, name, value, device="cpu", dtype=dtype)
        else:
            model.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]] = nn.Parameter(
                value.to(dtype), requires_grad=False
            )
    quantizer.postprocess_model(model)
    return quantizer


def arrays(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A state dict as torchao writes it to a file: packed tensors by their arrays."""
    support = find_peer("torchao.prototype.safetensors.safetensors_support")
    plain = {name: value.detach() for name, value in state.items()}
    flat: dict[str, torch.Tensor] = support.flatten_tensor_state_dict(plain)[0]
    return flat


def assert_same(one: nn.Module, other: nn.Module) -> int:
    """Both hold the same tensors, bit by bit; gives the number of packed ones."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    kinds = {name: (type(mine[name]), type(theirs[name])) for name in mine}
    assert not {name: pair for name, pair in kinds.items() if pair[0] is not pair[1]}
    flat, expected = arrays(mine), arrays(theirs)
    assert list(flat) == list(expected)
    for name, value in flat.items():
        assert value.dtype == expected[name].dtype, name
        assert value.shape == expected[name].shape, name
        left, right = (array.contiguous().reshape(-1).view(torch.uint8) for array in (value, expected[name]))
        assert torch.equal(left, right), name
    return sum(kind is not torch.Tensor for kind, _ in kinds.values())


def llama(*, tied: bool = False, seed: int = 0) -> Any:
    """A tiny Llama in bfloat16."""
    transformers = find_peer("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).bfloat16().eval()


def saved(model: Any, folder: Path, *, shard: str = "50KB", **options: Any) -> Path:
    """A model folder in several shards."""
    model.save_pretrained(folder, max_shard_size=shard, **options)
    return folder


TOKENS = torch.arange(12).reshape(2, 6)
