"""Plain modules, packed while they are loaded and loaded packed: what the loader does for every backend.

bitsandbytes stands for all of them.
"""

from __future__ import annotations

import warnings

import pytest

torch = pytest.importorskip("torch")
nets = pytest.importorskip("tests.loading.nets")

import weightpack as wp  # noqa: E402
from weightpack.errors import CheckpointError, ConfigError, FormatError  # noqa: E402

NF4 = wp.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.fixture(autouse=True)
def bitsandbytes(peer):
    return peer("bitsandbytes")


def packed_bytes(model, path):
    """The main array and the scales of a packed layer."""
    weight = model.get_submodule(path).weight
    return weight.data.reshape(-1), weight.quant_state.absmax


def expected(weight):
    parts = wp.quantize(weight, "bitsandbytes:nf4")
    return parts[""].reshape(-1), parts["absmax"]


def assert_packed(model, path, weight):
    for found, wanted in zip(packed_bytes(model, path), expected(weight), strict=True):
        assert torch.equal(found.view(-1), wanted.view(-1)), path


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("threads", [None, 1])
def test_packed_while_loading(tmp_path, shards, threads):
    net = nets.make(width=48)
    folder = nets.save(tmp_path / "net", net, shards=shards, width=48)
    model = wp.from_pretrained(nets.Net, folder, quantization_config=NF4, threads=threads)
    for path in ("blocks.0.up", "blocks.1.down", "head"):
        assert_packed(model, path, net.get_submodule(path).weight.detach())
    assert torch.equal(model.embed.weight, net.embed.weight)
    assert torch.equal(model.conv.weight, net.conv.weight)
    reference = net(nets.TOKENS)
    assert ((model(nets.TOKENS) - reference).norm() / reference.norm()).item() < 0.2
    assert model.is_quantized


def test_back_to_ordinary_layers(tmp_path):
    net = nets.make()
    folder = nets.save(tmp_path / "net", net)
    model = wp.from_pretrained(nets.Net, folder, quantization_config=NF4)
    assert wp.quantizer_of(model).name == "bitsandbytes_4bit"
    assert model.dequantize() is model
    weight = net.blocks[0].up.weight.detach()
    decoded = wp.dequantize(wp.quantize(weight, "nf4"), "nf4", shape=weight.shape)
    assert torch.equal(model.blocks[0].up.weight, decoded)
    assert type(model.blocks[0].up) is torch.nn.Linear
    assert wp.quantizer_of(model) is None
    assert not model.is_quantized
    assert "quantization_config" not in model.config
    with pytest.raises(ConfigError, match="the model is not packed"):
        nets.make().dequantize()
    assert wp.quantizer_of(nets.make()) is None


def test_a_packed_folder_needs_no_config(tmp_path):
    net = nets.make(dtype=torch.bfloat16)
    folder = nets.save(tmp_path / "net", net, shards=2)
    wp.convert(folder, tmp_path / "packed", to="nf4", max_shard_size="20KB", keep=["head"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = wp.from_pretrained(nets.Net, tmp_path / "packed")
    assert_packed(model, "blocks.0.up", net.blocks[0].up.weight.detach())
    assert torch.equal(model.head.weight, net.head.weight)
    fresh = wp.from_pretrained(
        nets.Net, folder, quantization_config={**NF4.to_dict(), "llm_int8_skip_modules": ["head"]}
    )
    found, wanted = model.state_dict(), fresh.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_parts_of_a_weight_in_different_files(tmp_path):
    """huggingface/transformers#40327: a shard boundary inside a weight's group."""
    net = nets.make()
    folder = nets.save(tmp_path / "net", net)
    wp.convert(folder, tmp_path / "packed", to="nf4")
    from safetensors.torch import load_file

    state = load_file(tmp_path / "packed" / "model.safetensors")
    config = {"quantization_config": NF4.to_dict()}
    scattered = nets.write(tmp_path / "scattered", state, config, shards=7)
    model = wp.from_pretrained(nets.Net, scattered)
    assert_packed(model, "blocks.0.up", net.blocks[0].up.weight.detach())


def test_a_weight_without_its_scales_is_refused(tmp_path):
    folder = nets.save(tmp_path / "net", nets.make())
    wp.convert(folder, tmp_path / "packed", to="nf4")
    from safetensors.torch import load_file

    state = load_file(tmp_path / "packed" / "model.safetensors")
    state.pop("blocks.0.up.weight.absmax")
    broken = nets.write(tmp_path / "broken", state, {"quantization_config": NF4.to_dict()})
    with pytest.raises(CheckpointError, match=r"blocks\.0\.up\.weight"):
        wp.from_pretrained(nets.Net, broken)


def test_codes_without_scales_are_no_weight(tmp_path):
    net = nets.make()
    state = {**net.state_dict(), "head.weight": torch.ones(50, 64, dtype=torch.int8)}
    int8 = wp.BitsAndBytesConfig(load_in_8bit=True).to_dict()
    for config in ({}, {"quantization_config": int8}):
        folder = nets.write(tmp_path / f"net{len(config)}", state, config)
        with pytest.raises(
            CheckpointError, match=r'"head.weight" holds I8, and "head.weight" of the model is a floating'
        ):
            wp.from_pretrained(nets.Net, folder)


def test_a_packed_weight_of_another_shape_is_refused(tmp_path):
    folder = nets.save(tmp_path / "net", nets.make(width=32), width=32)
    wp.convert(folder, tmp_path / "packed", to="nf4")
    with pytest.raises(CheckpointError, match=r"in the checkpoint, and"):
        wp.from_pretrained(nets.Net, tmp_path / "packed", config={"width": 64, "quantization_config": NF4.to_dict()})


def test_packed_weights_without_a_config_are_decoded(tmp_path):
    net = nets.make()
    wp.convert(nets.save(tmp_path / "net", net), tmp_path / "packed", to="nf4")
    model = wp.from_pretrained(nets.Net, tmp_path / "packed", config={}, torch_dtype="float32")
    weight = net.blocks[0].up.weight.detach()
    decoded = wp.dequantize(wp.quantize(weight, "nf4"), "nf4", shape=weight.shape)
    assert torch.equal(model.blocks[0].up.weight, decoded)


def test_what_a_checkpoint_lacks_is_packed_too(tmp_path):
    state = nets.make().state_dict()
    state.pop("blocks.0.up.weight")
    folder = nets.write(tmp_path / "net", state, {})
    with pytest.warns(UserWarning, match=r"lacks blocks\.0\.up\.weight"):
        model = wp.from_pretrained(nets.Net, folder, quantization_config=NF4)
    assert model.blocks[0].up.weight.quant_state is not None
    assert model(nets.TOKENS).isfinite().all()


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    net = nets.make()
    with torch.no_grad():
        net.blocks[1].down.weight[3, 5] = float("nan")
    folder = nets.save(tmp_path / "net", net)
    with pytest.raises(FormatError, match=r"blocks\.1\.down\.weight"):
        wp.from_pretrained(nets.Net, folder, quantization_config=NF4)


def test_tied_layers_are_not_cut_apart(tmp_path):
    net = nets.make(tied=True)
    folder = nets.save(tmp_path / "net", net, tied=True)
    config = wp.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["blocks.0"])
    model = wp.from_pretrained(nets.Net, folder, quantization_config=config)
    assert model.head.weight is model.embed.weight
    assert type(model.head) is torch.nn.Linear
    assert list(model.hf_quantizer.quantized) == ["blocks.1.up", "blocks.1.down"]


class Twice(wp.ModelMixin, torch.nn.Module):
    """One layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(64, 64)
        self.second = self.first

    def forward(self, x):
        """[..., 64] to the same."""
        return self.second(self.first(x))


@pytest.mark.parametrize("stored", ["first", "second", "both"])
def test_a_layer_in_two_places_is_packed_once(tmp_path, stored):
    torch.manual_seed(0)
    net = Twice()
    state = {k: v for k, v in net.state_dict().items() if stored in ("both", k.split(".")[0])}
    folder = nets.write(tmp_path / "net", state, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = wp.from_pretrained(Twice, folder, quantization_config=NF4)
    assert model.first is model.second
    assert_packed(model, "second", net.first.weight.detach())


def test_a_skip_list_that_names_nothing_is_told(tmp_path):
    folder = nets.save(tmp_path / "net", nets.make())
    config = wp.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["haed"])
    with pytest.warns(UserWarning, match='entry "haed" of the skip list names no layer'):
        wp.from_pretrained(nets.Net, folder, quantization_config=config)


def test_modules_kept_in_float32_are_not_packed(tmp_path):
    folder = nets.save(tmp_path / "net", nets.make(dtype=torch.bfloat16))
    model = wp.from_pretrained(nets.Net, folder, quantization_config=NF4, keep_in_fp32_modules=["blocks.0"])
    assert model.blocks[0].up.weight.dtype == torch.float32
    assert list(model.hf_quantizer.quantized) == ["blocks.1.up", "blocks.1.down", "head"]


def test_packing_wants_a_skeleton(tmp_path):
    folder = nets.save(tmp_path / "net", nets.make())
    with pytest.raises(ConfigError, match="low_cpu_mem_usage=False"):
        wp.from_pretrained(nets.Net, folder, quantization_config=NF4, low_cpu_mem_usage=False)
    assert wp.from_pretrained(nets.Net, folder, low_cpu_mem_usage=False).head.weight.device.type == "cpu"


def test_a_single_file_is_packed_too(tmp_path):
    """diffusers' from_single_file takes a config and packs nothing."""
    net = nets.make()
    folder = nets.save(tmp_path / "net", net)
    file = (folder / "model.safetensors").rename(tmp_path / "net.safetensors")
    model = wp.from_pretrained(nets.Net, file, quantization_config=NF4)
    assert_packed(model, "head", net.head.weight.detach())
    assert len(model.hf_quantizer.quantized) == 5


def test_from_a_state_dict_and_from_torchs_own_files(tmp_path):
    net = nets.make()
    model = wp.from_pretrained(nets.Net, tmp_path, state_dict=net.state_dict(), quantization_config=NF4)
    assert_packed(model, "head", net.head.weight.detach())
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    model = wp.from_pretrained(nets.Net, tmp_path, quantization_config=NF4, config={})
    assert_packed(model, "head", net.head.weight.detach())


@pytest.mark.parametrize("packed", [False, True])
def test_mapped_files_give_the_same_model(tmp_path, packed):
    net = nets.make(dtype=torch.bfloat16)
    folder = nets.save(tmp_path / "net", net, shards=2)
    if packed:
        wp.convert(folder, tmp_path / "packed", to="nf4", max_shard_size="20KB")
        folder = tmp_path / "packed"
    for config in (None, NF4):
        options = {} if packed or config is None else {"quantization_config": config}
        read = wp.from_pretrained(nets.Net, folder, **options).state_dict()
        mapped = wp.from_pretrained(nets.Net, folder, mmap=True, **options).state_dict()
        assert list(read) == list(mapped)
        assert all(torch.equal(value, mapped[name]) for name, value in read.items())


def test_a_mapped_model_can_be_written_to(tmp_path):
    net = nets.make()
    folder = nets.save(tmp_path / "net", net)
    before = (folder / "model.safetensors").read_bytes()
    model = wp.from_pretrained(nets.Net, folder, mmap=True)
    with torch.no_grad():
        model.embed.weight.zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    assert torch.equal(wp.from_pretrained(nets.Net, folder).embed.weight, net.embed.weight)


def test_a_packed_model_in_torchs_own_files(tmp_path):
    net = nets.make()
    wp.convert(nets.save(tmp_path / "net", net), tmp_path / "packed", to="nf4")
    from safetensors.torch import load_file

    torch.save(load_file(tmp_path / "packed" / "model.safetensors"), tmp_path / "packed" / "pytorch_model.bin")
    (tmp_path / "packed" / "model.safetensors").unlink()
    model = wp.from_pretrained(nets.Net, tmp_path / "packed")
    assert_packed(model, "blocks.0.up", net.blocks[0].up.weight.detach())


def test_auto_sizes_are_those_of_the_packed_weights(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("sizes are shown on a machine where the CPU is the only device")
    net = nets.make(width=256, depth=4)
    folder = nets.save(tmp_path / "net", net, width=256, depth=4)
    plain = sum(value.nbytes for value in net.state_dict().values())
    # Enough for the packed model, by far not enough for the plain one.
    model = wp.from_pretrained(
        nets.Net, folder, quantization_config=NF4, device_map="auto", max_memory={"cpu": plain // 2}
    )
    assert set(model.hf_device_map.values()) == {"cpu"}
    assert all(value.device.type == "cpu" for value in model.state_dict().values())


def test_modules_on_disk_are_left_as_they_are(tmp_path):
    net = nets.make()
    folder = nets.save(tmp_path / "net", net)
    model = wp.from_pretrained(
        nets.Net,
        folder,
        quantization_config={**NF4.to_dict(), "llm_int8_enable_fp32_cpu_offload": True},
        device_map={"": "cpu", "blocks.1": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert list(model.hf_quantizer.quantized) == ["blocks.0.up", "blocks.0.down", "head"]
    reference = net(nets.TOKENS)
    assert ((model(nets.TOKENS) - reference).norm() / reference.norm()).item() < 0.2


def test_a_budget_that_sends_packed_layers_to_disk(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("sizes are shown on a machine where the CPU is the only device")
    net = nets.make(width=256, depth=4)
    folder = nets.save(tmp_path / "net", net, width=256, depth=4)
    model = wp.from_pretrained(
        nets.Net,
        folder,
        quantization_config={**NF4.to_dict(), "llm_int8_enable_fp32_cpu_offload": True},
        device_map="sequential",
        max_memory={"cpu": 1_200_000},
        offload_folder=tmp_path / "offload",
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    reference = net(nets.TOKENS)
    assert ((model(nets.TOKENS) - reference).norm() / reference.norm()).item() < 0.2
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert (path in model.hf_quantizer.quantized) == (module.weight.device.type == "cpu"), path


def test_nothing_is_left_open_or_behind_after_an_error(tmp_path):
    folder = nets.save(tmp_path / "net", nets.make())
    before = sorted(tmp_path.rglob("*"))
    register = torch.nn.Module.register_parameter
    with pytest.raises(CheckpointError):
        wp.from_pretrained(nets.Net, folder, config={"width": 32}, quantization_config=NF4)
    assert sorted(tmp_path.rglob("*")) == before
    assert torch.nn.Module.register_parameter is register
    assert torch.get_default_dtype() == torch.float32
