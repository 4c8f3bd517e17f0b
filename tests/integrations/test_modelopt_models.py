"""ModelOpt through `from_pretrained` in models of both hosts: layers, sizes, outputs, and back from disk."""

from __future__ import annotations

import pytest

import weightpack as wp
from tests.conftest import find_peer
from weightpack.quantizers.base import quantizer_of

torch = find_peer("torch")

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPE = torch.bfloat16
LIMITS = {"FP8": (0.1, 0.63), "INT8": (0.1, 0.63), "INT4": (0.35, 0.75), "NF4": (0.4, 0.45), "NVFP4": (0.3, 0.75)}
"""Of each type: relative error of the output, and bytes in bfloat16's."""


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(DTYPE)


def llama():
    transformers = find_peer("transformers")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config), lambda model: model(torch.arange(12).reshape(1, 12)).logits


def bert():
    transformers = find_peer("transformers")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 64}
    model = transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=4))
    return model, lambda model: model(torch.arange(12).reshape(1, 12)).last_hidden_state


def flux():
    diffusers = find_peer("diffusers")
    sizes = {"in_channels": 64, "joint_attention_dim": 128, "pooled_projection_dim": 64, "axes_dims_rope": [8, 24, 32]}
    layers = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 64, "num_attention_heads": 2}
    model = diffusers.FluxTransformer2DModel(patch_size=1, **sizes, **layers)

    def run(model):
        return model(
            hidden_states=random(1, 16, 64),
            encoder_hidden_states=random(1, 8, 128),
            pooled_projections=random(1, 64),
            timestep=torch.ones(1, dtype=DTYPE),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
            return_dict=False,
        )[0]

    return model, run


def unet():
    diffusers = find_peer("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    return model, lambda model: model(random(1, 4, 8, 8), torch.tensor([1]), random(1, 4, 32)).sample


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder, class, way to run and output of a model, made once."""
    done = {}

    def make(name):
        if name not in done:
            torch.manual_seed(0)
            model, run = globals()[name]()
            model = model.to(DTYPE).eval()
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            with torch.no_grad():
                done[name] = folder, type(model), run, run(model), sum(one.nbytes for one in model.parameters())
        return done[name]

    return make


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("name", ["llama", "bert", "flux", "unet"])
def test_models_of_both_hosts(saved, tmp_path, name, kind):
    find_peer("modelopt")
    folder, cls, run, expected, nbytes = saved(name)
    config = wp.NVIDIAModelOptConfig(kind)
    model = wp.from_pretrained(cls, folder, quantization_config=config, torch_dtype=DTYPE)
    # Of diffusers the type of a model is that of its first floating parameter.
    assert model.dtype == DTYPE
    assert quantizer_of(model).config == config
    with torch.no_grad():
        found = run(model)
    error, size = LIMITS[kind]
    assert (found - expected).norm() < error * expected.norm()
    assert sum(one.nbytes for one in model.state_dict().values()) < size * nbytes
    # By the host's own `save_pretrained`, and back with no other argument.
    model.save_pretrained(tmp_path / "packed")
    again = wp.from_pretrained(cls, tmp_path / "packed", torch_dtype=DTYPE)
    assert quantizer_of(again).pre_quantized
    assert quantizer_of(again).config == config
    with torch.no_grad():
        assert torch.equal(run(again), found)


def test_layers_that_modelopt_leaves_alone(saved):
    find_peer("modelopt")
    folder, cls, *_ = saved("flux")
    model = wp.from_pretrained(cls, folder, quantization_config=wp.NVIDIAModelOptConfig("INT8"), torch_dtype=DTYPE)
    left = {name for name, one in model.named_modules() if type(one) is torch.nn.Linear}
    assert left == {"proj_out", "single_transformer_blocks.0.proj_out"}
    everything = {"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8}}]}
    config = wp.NVIDIAModelOptConfig("INT8", modelopt_config=everything)
    model = wp.from_pretrained(cls, folder, quantization_config=config, torch_dtype=DTYPE)
    assert "single_transformer_blocks.0.proj_out" in quantizer_of(model).quantized
