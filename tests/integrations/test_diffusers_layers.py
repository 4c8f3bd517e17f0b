"""What the diffusers adapter says of a model, against what diffusers itself does with it."""

from __future__ import annotations

import pytest

from weightpack.entry import Entry, Part
from weightpack.errors import BackendError
from weightpack.layers import find_layers

CONFIGS = {
    "flux": {
        "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 16, "num_layers": 1,
        "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 32,
        "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8],
    },
    "wan": {
        "_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4,
        "out_channels": 4, "text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2,
    },
}  # fmt: skip


def build(diffusers, torch, config):
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)


@pytest.fixture(scope="module")
def answers(peer):
    torch, diffusers = peer("torch"), peer("diffusers")
    models = {name: build(diffusers, torch, config) for name, config in CONFIGS.items()}
    asked = []
    for name, model in models.items():
        entries = [
            Entry(
                key, tuple(t.shape), "BF16", "bf16", 2 * t.numel(), t.numel(), (Part(key, "BF16", tuple(t.shape), 0),)
            )
            for key, t in model.state_dict().items()
        ]
        asked.append((CONFIGS[name], entries))
    return dict(zip(CONFIGS, find_layers(asked, "host"), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_linear_is_what_diffusers_replaces(peer, answers, name):
    bnb, diffusers, torch = peer("bitsandbytes"), peer("diffusers"), peer("torch")
    replace = peer("diffusers.quantizers.bitsandbytes.utils").replace_with_bnb_linear
    layers = answers[name]
    assert layers.exact
    fresh = build(diffusers, torch, CONFIGS[name])
    config = diffusers.BitsAndBytesConfig(load_in_4bit=True)
    replace(fresh, modules_to_not_convert=list(fresh._keep_in_fp32_modules or []), quantization_config=config)
    replaced = {path for path, module in fresh.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert {layer.module for layer in layers.tensors.values() if layer.kind == "linear"} == replaced
    assert len(replaced) > 10


def test_what_stays_in_float32_is_told(answers):
    layers = answers["wan"]
    assert "time_embedder" in layers.fixed
    kept = [layer for layer in layers.tensors.values() if layer.kind == "skipped"]
    assert kept
    assert all("time_embedder" in layer.module for layer in kept)


def test_a_class_that_does_not_exist_is_refused(peer):
    peer("diffusers")
    with pytest.raises(BackendError, match="diffusers has no model class NoSuchModel"):
        find_layers([({"_class_name": "NoSuchModel"}, [])], "host")
