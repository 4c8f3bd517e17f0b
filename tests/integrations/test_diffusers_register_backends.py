"""quanto, torchao, ModelOpt and GGUF behind diffusers' own loaders."""

from __future__ import annotations

import json

import pytest

import weightpack as wp

from .tiny_diffusers import assert_same_state, make, parts, run, save


@pytest.fixture
def registered(peer):
    """Registers for one test."""
    peer("diffusers")
    wp.integrations.diffusers.register()
    yield wp.integrations.diffusers
    wp.integrations.diffusers.unregister()


def both(peer, cls, folder, theirs, ours, **options):
    """What diffusers makes by itself, and with weightpack behind it; weightpack's own loader makes the same."""
    direct = wp.from_pretrained(cls, folder, quantization_config=ours, **options)
    alone = cls.from_pretrained(folder, quantization_config=theirs, **options)
    wp.integrations.diffusers.register()
    try:
        together, info = cls.from_pretrained(folder, quantization_config=ours, output_loading_info=True, **options)
    finally:
        wp.integrations.diffusers.unregister()
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_state(direct, alone)
    return alone, together


def close(found, wanted, share=0.02):
    import torch

    return torch.linalg.norm(found.float() - wanted.float()) < share * torch.linalg.norm(wanted.float())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("name", "weights"), [("flux", "int8"), ("unet", "float8"), ("wan", "int8")])
def test_quanto(peer, tmp_path, name, weights):
    torch, diffusers = peer("torch"), peer("diffusers")
    peer("optimum.quanto")
    cls = save(name, diffusers, tmp_path / "source", dtype=torch.bfloat16)
    theirs = diffusers.QuantoConfig(weights_dtype=weights)
    given = theirs if name == "flux" else wp.QuantoConfig(weights)
    dtype = torch.bfloat16 if name == "wan" else torch.float32
    alone, together = both(peer, cls, tmp_path / "source", theirs, given, torch_dtype=dtype)
    assert_same_state(together, alone)
    if name == "wan":
        # Kept in float32, and packed by diffusers all the same.
        assert together.condition_embedder.time_embedder.linear_1.bias.dtype == torch.float32
        assert "condition_embedder.time_embedder.linear_1.weight._data" in together.state_dict()
    else:
        assert close(run(name, together), run(name, alone), 1e-3)
    together.save_pretrained(tmp_path / "packed", max_shard_size=1)
    assert_same_state(wp.from_pretrained(cls, tmp_path / "packed", torch_dtype=dtype), alone)
    if name == "wan":
        # The same numbers; diffusers reads the scales of these layers into float32.
        found = cls.from_pretrained(tmp_path / "packed", torch_dtype=dtype).state_dict()
        assert all(torch.equal(found[key].float(), value.float()) for key, value in alone.state_dict().items())
    wp.integrations.diffusers.register()
    try:
        again = cls.from_pretrained(tmp_path / "packed", torch_dtype=dtype)
    finally:
        wp.integrations.diffusers.unregister()
    assert_same_state(again, alone)


@pytest.mark.parametrize("given", ["theirs", "ours"])
def test_torchao(peer, tmp_path, given):
    torch, diffusers = peer("torch"), peer("diffusers")
    quantization = peer("torchao.quantization")
    cls = save("flux", diffusers, tmp_path / "source", dtype=torch.bfloat16)
    form = quantization.Int8WeightOnlyConfig(version=2)
    theirs = diffusers.TorchAoConfig(form, modules_to_not_convert=["proj_out"])
    config = theirs if given == "theirs" else wp.TorchAoConfig(form, modules_to_not_convert=("proj_out",))
    alone, together = both(peer, cls, tmp_path / "source", theirs, config, torch_dtype=torch.bfloat16)
    assert_same_state(together, alone)
    assert close(run("flux", together), run("flux", alone), 1e-3)
    together.save_pretrained(tmp_path / "packed", max_shard_size="100KB")
    assert_same_state(cls.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16), alone)
    wp.integrations.diffusers.register()
    try:
        # diffusers alone refuses a packed model with this device map.
        again = cls.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16, device_map={"": "cpu"})
    finally:
        wp.integrations.diffusers.unregister()
    assert_same_state(again, alone)


@pytest.mark.parametrize("quant_type", ["FP8", "NVFP4"])
def test_modelopt_with_a_release_for_which_diffusers_makes_no_config(peer, registered, tmp_path, quant_type):
    torch, diffusers = peer("torch"), peer("diffusers")
    peer("modelopt.torch.quantization")
    cls = save("flux", diffusers, tmp_path / "source", dtype=torch.bfloat16)
    config = wp.NVIDIAModelOptConfig(quant_type)
    options = {"torch_dtype": torch.bfloat16, "quantization_config": config}
    packed, info = cls.from_pretrained(tmp_path / "source", output_loading_info=True, **options)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert packed.quantization_method == "modelopt"
    direct = wp.from_pretrained(cls, tmp_path / "source", **options)
    assert_same_state(packed, direct)
    found = run("flux", packed)
    assert torch.equal(found, run("flux", direct))
    assert close(found, run("flux", make("flux", diffusers)), 0.3)
    packed.save_pretrained(tmp_path / "packed", max_shard_size="100KB")
    again = cls.from_pretrained(tmp_path / "packed", torch_dtype=torch.bfloat16)
    assert_same_state(again, packed)
    assert torch.equal(run("flux", again), found)
    assert_same_state(wp.from_pretrained(cls, tmp_path / "packed", torch_dtype=torch.bfloat16), packed)


def test_modules_on_disk_stay_unpacked(peer, registered, tmp_path):
    torch, diffusers = peer("torch"), peer("diffusers")
    peer("optimum.quanto")
    cls = save("flux", diffusers, tmp_path / "source")
    device_map = {path: "cpu" for path, _ in make("flux", diffusers).named_children()} | {"proj_out": "disk"}
    options = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
    packed = cls.from_pretrained(tmp_path / "source", quantization_config=wp.QuantoConfig("int8"), **options)
    assert type(packed.proj_out) is torch.nn.Linear
    assert packed.proj_out.weight.device.type == "meta"
    assert type(packed.x_embedder) is not torch.nn.Linear
    assert close(run("flux", packed), run("flux", make("flux", diffusers)), 0.05)


GGUF = {"num_attention_heads": 8}
"""diffusers takes the names of the original Flux for those of a wider model otherwise."""


def gguf_file(peer, tmp_path):
    torch, diffusers = peer("torch"), peer("diffusers")
    peer("gguf")
    make("flux", diffusers, dtype=torch.bfloat16, **GGUF).save_pretrained(tmp_path / "model")
    wp.convert(tmp_path / "model", tmp_path / "model.gguf", "q8_0", arch="none")
    return diffusers.FluxTransformer2DModel, str(tmp_path / "model.gguf"), str(tmp_path / "model")


def test_gguf_files_stay_with_diffusers(peer, tmp_path):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls, file, config = gguf_file(peer, tmp_path)
    options = {"config": config, "torch_dtype": torch.bfloat16}
    chosen = diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
    alone = cls.from_single_file(file, quantization_config=chosen, **options)
    wp.integrations.diffusers.register()
    try:
        together = cls.from_single_file(file, quantization_config=chosen, **options)
    finally:
        wp.integrations.diffusers.unregister()
    assert type(together.hf_quantizer) is type(alone.hf_quantizer)
    for key, tensor in alone.state_dict().items():
        assert torch.equal(parts(together.state_dict()[key])[0], parts(tensor)[0]), key
    assert torch.equal(run("flux", together), run("flux", alone))


def test_gguf_files_with_a_config_of_weightpack(peer, registered, tmp_path):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls, file, config = gguf_file(peer, tmp_path)
    chosen = wp.GGUFQuantizationConfig(compute_dtype=torch.float32, modules_to_not_convert=["proj_out"])
    packed = cls.from_single_file(file, config=config, quantization_config=chosen, torch_dtype=torch.float32)
    assert type(packed.proj_out) is torch.nn.Linear
    assert packed.context_embedder.weight.dtype == torch.uint8
    assert all(parameter.device.type == "cpu" for parameter in packed.parameters())
    wanted = make("flux", diffusers, dtype=torch.bfloat16, **GGUF).float()
    assert close(run("flux", packed), run("flux", wanted), 0.03)
    with pytest.raises(ValueError, match="not serializable"):
        packed.save_pretrained(tmp_path / "again")


def test_gguf_types_for_models_that_are_not_packed(peer, registered, tmp_path):
    torch, diffusers = peer("torch"), peer("diffusers")
    cls = save("flux", diffusers, tmp_path, dtype=torch.bfloat16)
    config = wp.GGUFQuantizationConfig(compute_dtype="float32", quant_type="q8_0")
    options = {"torch_dtype": torch.float32, "quantization_config": config}
    packed = cls.from_pretrained(tmp_path, **options)
    assert packed.proj_out.weight.dtype == torch.uint8
    assert close(run("flux", packed), run("flux", make("flux", diffusers)), 0.03)
    assert_same_state(packed, wp.from_pretrained(cls, tmp_path, **options))


def test_sections_that_diffusers_reads_for_something_else(peer, registered, tmp_path):
    """transformers calls diffusers' `weights_dtype` `weights`; diffusers alone takes int8 for it."""
    diffusers = peer("diffusers")
    auto = peer("diffusers.quantizers.auto").DiffusersAutoQuantizer
    section = {"quant_method": "quanto", "weights": "int4", "modules_to_not_convert": None}
    assert auto.from_dict(section).weights_dtype == "int4"
    registered.unregister()
    with pytest.warns(FutureWarning):
        assert auto.from_dict(section).weights_dtype == "int8"
    registered.register()
    assert auto.from_dict(json.loads(wp.NVIDIAModelOptConfig("FP8").to_json_string())).quant_type == "FP8"
    assert diffusers.BitsAndBytesConfig(load_in_4bit=True).to_dict()["load_in_4bit"]
