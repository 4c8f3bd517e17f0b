"""diffusers' own `from_pretrained` packing through weightpack, against what it does by itself."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest

import weightpack as wp
from weightpack.errors import CheckpointError, ConfigError

from .tiny_diffusers import CONFIGS, assert_same_state, lift_gpu_check, make, run, save


@pytest.fixture
def registered(peer):
    """Registers for one test."""
    peer("diffusers")
    wp.integrations.diffusers.register()
    yield wp.integrations.diffusers
    wp.integrations.diffusers.unregister()


BITSANDBYTES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "double quant": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "bf16 storage": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
    "skip list": {"load_in_4bit": True, "llm_int8_skip_modules": ["to_out", "attn2"]},
}


def packed_by_diffusers(peer, monkeypatch, cls, folder, options, dtype):
    """What diffusers itself makes, but for its demand for a GPU."""
    diffusers = peer("diffusers")
    with monkeypatch.context() as patch:
        lift_gpu_check(peer, patch)
        config = diffusers.BitsAndBytesConfig(**copy.deepcopy(options))
        return cls.from_pretrained(folder, torch_dtype=dtype, quantization_config=config)


@pytest.mark.parametrize("case", BITSANDBYTES)
@pytest.mark.parametrize(("name", "given"), [("flux", "theirs"), ("unet", "theirs"), ("wan", "ours")])
def test_bitsandbytes_on_a_machine_without_a_gpu(peer, monkeypatch, tmp_path, name, case, given):
    torch, diffusers = peer("torch"), peer("diffusers")
    bnb = peer("bitsandbytes")
    options = BITSANDBYTES[case]
    cls = save(name, diffusers, tmp_path, dtype=torch.bfloat16)
    theirs = packed_by_diffusers(peer, monkeypatch, cls, tmp_path, options, torch.bfloat16)
    wp.integrations.diffusers.register()
    try:
        kind = wp.BitsAndBytesConfig if given == "ours" else diffusers.BitsAndBytesConfig
        ours, info = cls.from_pretrained(
            tmp_path,
            torch_dtype=torch.bfloat16,
            quantization_config=kind(**copy.deepcopy(options)),
            output_loading_info=True,
        )
    finally:
        wp.integrations.diffusers.unregister()
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_state(ours, theirs)
    layers = {path for path, module in theirs.named_modules() if type(module) is not type(ours.get_submodule(path))}
    assert layers
    for path in layers:
        assert isinstance(ours.get_submodule(path), type(theirs.get_submodule(path)))
        assert isinstance(ours.get_submodule(path), bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    assert ours.config.quantization_config.to_dict().items() >= wp.BitsAndBytesConfig(**options).to_dict().items()
    assert ours.num_parameters() == theirs.num_parameters()
    found, wanted = run(name, ours).float(), run(name, decoded(torch, bnb, theirs)).float()
    assert torch.linalg.norm(found - wanted) < 0.02 * torch.linalg.norm(wanted)


def decoded(torch, bnb, model):
    """`model` with the weights that bitsandbytes decodes: its own CPU layers fail with fewer than 64 columns."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            continue
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        else:
            weight = module.weight.data.float() * module.weight.SCB.reshape(-1, 1) / 127
        dtype = torch.float32 if module.bias is None else module.bias.dtype
        dtype = torch.bfloat16 if dtype == torch.float32 else dtype
        plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, dtype=dtype)
        plain.weight.data.copy_(weight.reshape(plain.weight.shape))
        plain.bias = module.bias
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    return model


def test_types_by_default_are_those_of_diffusers(peer, monkeypatch, registered, tmp_path):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls = save("flux", diffusers, tmp_path, dtype=torch.bfloat16)
    options = {"load_in_4bit": True}
    ours = cls.from_pretrained(tmp_path, quantization_config=diffusers.BitsAndBytesConfig(**options))
    registered.unregister()
    assert_same_state(ours, packed_by_diffusers(peer, monkeypatch, cls, tmp_path, options, None))
    assert ours.norm_out.linear.bias.dtype == torch.float16


@pytest.mark.parametrize("case", ["nf4", "double quant", "int8"])
def test_saved_by_diffusers_and_read_by_all(peer, monkeypatch, registered, tmp_path, case):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls = save("unet", diffusers, tmp_path / "source", dtype=torch.bfloat16)
    config = wp.BitsAndBytesConfig(**BITSANDBYTES[case])
    packed = cls.from_pretrained(tmp_path / "source", torch_dtype=torch.bfloat16, quantization_config=config)
    before = run("unet", packed)
    packed.save_pretrained(tmp_path / "packed")
    again = cls.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16)
    assert_same_state(again, packed)
    assert torch.equal(run("unet", again), before)
    assert again.hf_quantizer.pre_quantized
    assert_same_state(wp.from_pretrained(cls, tmp_path / "packed", torch_dtype=torch.bfloat16), packed)
    registered.unregister()
    lift_gpu_check(peer, monkeypatch)
    assert_same_state(cls.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16), packed)


@pytest.mark.parametrize("case", ["nf4", "double quant", "int8"])
def test_components_of_a_weight_in_several_shards(peer, monkeypatch, registered, tmp_path, case):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls = save("flux", diffusers, tmp_path / "source", dtype=torch.bfloat16)
    config = wp.BitsAndBytesConfig(**BITSANDBYTES[case])
    packed = cls.from_pretrained(tmp_path / "source", torch_dtype=torch.bfloat16, quantization_config=config)
    # Each array is a file of its own.
    packed.save_pretrained(tmp_path / "packed", max_shard_size=1)
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 100
    again, info = cls.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_state(again, packed)
    registered.unregister()
    if case != "int8":
        lift_gpu_check(peer, monkeypatch)
        with pytest.raises(ValueError, match="does not contain `bitsandbytes__"):
            cls.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16)


def test_a_weight_that_is_not_whole_is_refused(peer, registered, tmp_path):
    torch, diffusers = peer("torch"), peer("diffusers")
    from safetensors.torch import load_file, save_file

    cls = save("flux", diffusers, tmp_path / "source", dtype=torch.bfloat16)
    config = wp.BitsAndBytesConfig(load_in_4bit=True)
    packed = cls.from_pretrained(tmp_path / "source", torch_dtype=torch.bfloat16, quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["proj_out.weight.absmax"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"proj_out\.weight"):
        cls.from_pretrained(tmp_path / "packed")


def test_a_weight_of_another_shape_is_refused(peer, registered, tmp_path):
    diffusers = peer("diffusers")
    cls = save("dit", diffusers, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention_head_dim": 16}))
    with pytest.raises(ValueError, match="shape"):
        cls.from_pretrained(tmp_path, quantization_config=diffusers.BitsAndBytesConfig(load_in_8bit=True))


def test_layers_smaller_than_a_block(peer, registered, tmp_path):
    torch, diffusers = peer("torch"), peer("diffusers")
    model = make("flux", diffusers, dtype=torch.bfloat16, in_channels=4, joint_attention_dim=24)
    model.save_pretrained(tmp_path)
    config = diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16, quantization_config=config)
    assert packed.x_embedder.weight.dtype == torch.uint8
    with torch.no_grad():
        for size, layer in ((4, "x_embedder"), (24, "context_embedder")):
            inputs = torch.randn(2, size, dtype=torch.bfloat16)
            wanted, found = (getattr(one, layer)(inputs).float() for one in (model, packed))
            assert torch.linalg.norm(found - wanted) < 0.2 * torch.linalg.norm(wanted)


def test_a_skip_list_that_diffusers_reads_otherwise_is_saved_in_its_words(peer, monkeypatch, registered, tmp_path):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls = save("flux", diffusers, tmp_path / "source", dtype=torch.bfloat16)
    given = ["attn.to_q", "re:^transformer_blocks"]
    config = diffusers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=given)
    packed = cls.from_pretrained(tmp_path / "source", torch_dtype=torch.bfloat16, quantization_config=config)
    assert given == ["attn.to_q", "re:^transformer_blocks"]
    assert type(packed.single_transformer_blocks[0].attn.to_q) is torch.nn.Linear
    assert type(packed.transformer_blocks[0].ff.net[2]) is torch.nn.Linear
    assert type(packed.single_transformer_blocks[0].attn.to_k) is not torch.nn.Linear
    packed.save_pretrained(tmp_path / "packed")
    assert_same_state(cls.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16), packed)
    registered.unregister()
    lift_gpu_check(peer, monkeypatch)
    assert_same_state(cls.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16), packed)


def test_a_list_that_diffusers_has_no_words_for(peer, registered, tmp_path):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls = save("flux", diffusers, tmp_path, dtype=torch.bfloat16)
    # Of the same name stands a layer in each single block.
    config = diffusers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["re:^proj_out$"])
    packed = cls.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, quantization_config=config)
    assert type(packed.proj_out) is torch.nn.Linear
    for model in (packed, wp.from_pretrained(cls, tmp_path, quantization_config=config)):
        with pytest.warns(UserWarning, match=r"it takes single_transformer_blocks\.0\.proj_out for one of them"):
            model.save_pretrained(tmp_path / "packed")


def test_dequantize(peer, registered, tmp_path):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls = save("flux", diffusers, tmp_path, dtype=torch.bfloat16)
    config = diffusers.BitsAndBytesConfig(load_in_8bit=True)
    packed = cls.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, quantization_config=config)
    plain = packed.dequantize()
    assert type(plain.proj_out) is torch.nn.Linear
    assert not plain.is_quantized
    wanted = make("flux", diffusers).proj_out.weight
    assert torch.linalg.norm(plain.proj_out.weight.float() - wanted) < 0.02 * torch.linalg.norm(wanted)
    # diffusers alone leaves the config as it was: what is saved then does not load.
    plain.save_pretrained(tmp_path / "plain")
    again = cls.from_pretrained(tmp_path / "plain", torch_dtype=torch.bfloat16)
    assert torch.equal(again.proj_out.weight, plain.proj_out.weight.to(torch.bfloat16))
    assert again.half().dtype == torch.float16


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_a_device_map_of_nothing_but_the_cpu(peer, registered, tmp_path, device_map):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls = save("flux", diffusers, tmp_path, dtype=torch.bfloat16)
    config = wp.BitsAndBytesConfig(load_in_4bit=True)
    options = {"torch_dtype": torch.bfloat16, "quantization_config": config}
    mapped = cls.from_pretrained(tmp_path, device_map=device_map, **options)
    assert_same_state(mapped, cls.from_pretrained(tmp_path, **options))


@pytest.mark.parametrize(("case", "share"), [("nf4", 0.8), ("int8", 1.0)])
def test_automatic_device_maps_count_packed_weights(peer, registered, tmp_path, case, share):
    """accelerate keeps room for the largest block besides: the model itself would not fit."""
    torch, diffusers = peer("torch"), peer("diffusers")
    model = make("flux", diffusers, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    budget = int(share * sum(2 * parameter.numel() for parameter in model.parameters()))
    options = {"torch_dtype": torch.bfloat16, "quantization_config": wp.BitsAndBytesConfig(**BITSANDBYTES[case])}
    mapped = {"device_map": "sequential", "offload_folder": tmp_path / "offload", **options}
    packed = type(model).from_pretrained(tmp_path, max_memory={"cpu": budget}, **mapped)
    assert_same_state(packed, type(model).from_pretrained(tmp_path, **options))
    with pytest.raises(ValueError, match="disk"):
        type(model).from_pretrained(tmp_path, max_memory={"cpu": budget // 2}, **mapped)


@pytest.mark.parametrize("backend", ["mapping of theirs", "mapping of ours", "backend"])
def test_pipelines(peer, registered, tmp_path, backend):
    torch, diffusers = peer("torch"), peer("diffusers")
    vae, transformer = make("vae", diffusers), make("dit", diffusers)
    diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "pipe")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    if backend == "backend":
        config = diffusers.PipelineQuantizationConfig(
            quant_backend="bitsandbytes_4bit", quant_kwargs=options, components_to_quantize=["transformer"]
        )
    else:
        kind = wp.BitsAndBytesConfig if "ours" in backend else diffusers.BitsAndBytesConfig
        config = diffusers.PipelineQuantizationConfig(quant_mapping={"transformer": kind(**options)})
    pipe = diffusers.DiTPipeline.from_pretrained(
        tmp_path / "pipe", quantization_config=config, torch_dtype=torch.bfloat16
    )
    single = wp.from_pretrained(
        type(transformer),
        tmp_path / "pipe",
        subfolder="transformer",
        torch_dtype=torch.bfloat16,
        quantization_config=wp.BitsAndBytesConfig(**options),
    )
    assert_same_state(pipe.transformer, single)
    assert not getattr(pipe.vae, "is_quantized", False)
    pipe.save_pretrained(tmp_path / "packed")
    again = diffusers.DiTPipeline.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16)
    assert_same_state(again.transformer, single)


def test_single_files_are_packed_too(peer, registered, tmp_path):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls = save("flux", diffusers, tmp_path, dtype=torch.bfloat16)
    config = wp.BitsAndBytesConfig(load_in_4bit=True)
    options = {"torch_dtype": torch.bfloat16, "quantization_config": config}
    packed = cls.from_single_file(
        str(tmp_path / "diffusion_pytorch_model.safetensors"), config=str(tmp_path), **options
    )
    assert_same_state(packed, cls.from_pretrained(tmp_path, **options))


@pytest.mark.cuda
@pytest.mark.parametrize("device_map", [None, "auto"])
@pytest.mark.parametrize("case", ["nf4", "double quant", "int8"])
def test_on_a_gpu_diffusers_gets_the_same_layers(peer, registered, tmp_path, case, device_map):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls = save("flux", diffusers, tmp_path, dtype=torch.bfloat16)
    options = {"torch_dtype": torch.bfloat16, "device_map": device_map}
    config = diffusers.BitsAndBytesConfig(**BITSANDBYTES[case])
    ours = cls.from_pretrained(tmp_path, quantization_config=config, **options)
    registered.unregister()
    theirs = cls.from_pretrained(tmp_path, quantization_config=config, **options)
    assert {name: (p.device, p.dtype, p.shape) for name, p in ours.named_parameters()} == {
        name: (p.device, p.dtype, p.shape) for name, p in theirs.named_parameters()
    }
    assert ours.proj_out.weight.device.type == "cuda"
    found, wanted = run("flux", ours).float(), run("flux", theirs).float()
    assert torch.linalg.norm(found - wanted) < 0.02 * torch.linalg.norm(wanted)


def test_unregister_leaves_diffusers_as_it_was(peer):
    auto = peer("diffusers.quantizers.auto")
    tables = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    before = [list(table.items()) for table in tables]
    host = wp.integrations.diffusers
    host.unregister()
    assert [list(table.items()) for table in tables] == before
    host.register()
    host.register()
    assert host.is_registered()
    assert all(list(table.items()) != was for table, was in zip(tables, before, strict=True))
    host.unregister()
    host.unregister()
    assert not host.is_registered()
    assert [list(table.items()) for table in tables] == before


def test_nothing_is_registered_by_importing():
    code = (
        "import weightpack as wp, sys\n"
        "assert not wp.integrations.diffusers.is_registered()\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_backend_of_ones_own(peer, tmp_path):
    """One that diffusers has never heard of: weights are stored as they are, in float16."""
    torch, diffusers = peer("torch"), peer("diffusers")
    from dataclasses import dataclass
    from typing import ClassVar

    from weightpack.quantizers.auto import unregister_quantizer

    @dataclass(frozen=True)
    class HalvesConfig(wp.QuantizationConfig):
        quant_method: ClassVar[str] = "halves"

    class Halves(wp.Quantizer):
        name = "halves"
        is_serializable = True

        def replace_layer(self, path, module):
            return module

        def create_quantized_param(self, model, name, value, *, device, dtype=None):
            layer = model.get_submodule(name.rpartition(".")[0])
            if not torch.is_tensor(value):
                value = value[""]
            layer.weight = torch.nn.Parameter(value.to(device, torch.float16), requires_grad=False)

    cls = save("dit", diffusers, tmp_path)
    wp.register_quantizer("halves", Halves, HalvesConfig)
    wp.integrations.diffusers.register()
    try:
        packed = cls.from_pretrained(tmp_path, quantization_config=HalvesConfig())
        packed.save_pretrained(tmp_path / "packed")
        section = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
        assert section == {"quant_method": "halves"}
    finally:
        wp.integrations.diffusers.unregister()
        unregister_quantizer("halves")
    assert packed.proj_out_1.weight.dtype == torch.float16
    assert packed.proj_out_1.bias.dtype == torch.float32
    assert "halves" not in peer("diffusers.quantizers.auto").AUTO_QUANTIZER_MAPPING


def test_configs_that_contradict_each_other(peer, registered, tmp_path):
    diffusers = peer("diffusers")
    cls = save("dit", diffusers, tmp_path)
    with pytest.raises(ConfigError, match="load_in_4bit and load_in_8bit"):
        cls.from_pretrained(tmp_path, quantization_config=diffusers.BitsAndBytesConfig())
    assert CONFIGS["dit"]
