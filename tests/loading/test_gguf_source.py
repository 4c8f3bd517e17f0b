"""GGUF files through `from_pretrained`: names, rows, shapes, devices, and what is not packed."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nets = pytest.importorskip("tests.loading.nets")

import weightpack as wp  # noqa: E402
from weightpack.errors import CheckpointError, ConfigError, UnsupportedError  # noqa: E402
from weightpack.loading.gguf_source import HostNamed, host_named  # noqa: E402
from weightpack.loading.plain import PlainHost  # noqa: E402
from weightpack.mapping import Interleave, MappedTensor, Rows  # noqa: E402
from weightpack.quantizers.gguf_layers import (  # noqa: E402
    GGUFConv1d,
    GGUFEmbedding,
    GGUFLayer,
    GGUFLinear,
    GGUFParameter,
)
from weightpack.streaming import Job, layout  # noqa: E402

GGUF = wp.GGUFQuantizationConfig()


class Net(nets.Net):
    """Without whole numbers, which `weightpack.gguf.write` does not take."""

    def __init__(self, **options):
        super().__init__(**options)
        del self.steps


def make(**options):
    torch.manual_seed(0)
    return Net(**options).eval()


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def packed_file(path, net, type="Q8_0", *, prefix="", left=()):
    """A file with a net's own names; kernels are rows of 256, and their shape stands beside them."""
    tensors, types, metadata = {}, {}, {"general.architecture": "unheard-of"}
    for name, value in net.state_dict().items():
        array = value.numpy()
        if name in left or array.ndim < 2:
            types[prefix + name] = "F32"
        else:
            types[prefix + name] = type
            if array.shape[-1] % 32:
                metadata[f"comfy.gguf.orig_shape.{prefix}{name}"] = np.array(array.shape, np.int32)
                array = array.reshape(-1, 256)
        tensors[prefix + name] = array
    wp.gguf.write(path, tensors, metadata, types=types)
    return path


def decoded(net, path):
    """The net with the weights that a file decodes to."""
    with wp.gguf.open(path) as file:
        state = {
            name: torch.from_numpy(np.array(file.read(name))).reshape(value.shape)
            for name, value in net.state_dict().items()
        }
    net.load_state_dict(state)
    return net


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_with_the_names_of_the_model(tmp_path, prefix):
    net = make()
    path = packed_file(tmp_path / "net.gguf", net, prefix=prefix)
    model = Net.from_pretrained(path, quantization_config=GGUF)
    assert {type(module) for module in model.modules() if isinstance(module, GGUFLayer)} == {
        GGUFLinear,
        GGUFEmbedding,
        GGUFConv1d,
    }
    packed = [value for value in model.parameters() if isinstance(value, GGUFParameter)]
    assert len(packed) == 7
    assert tuple(model.conv.weight.quant_shape) == (64, 64, 3)
    with wp.gguf.open(path) as file:
        for name, value in model.state_dict().items():
            raw = torch.from_numpy(np.array(file.raw(prefix + name)))
            if isinstance(value, GGUFParameter):
                assert torch.equal(value, raw)
            else:
                assert torch.equal(value.reshape(-1), raw.reshape(-1).view(value.dtype))
    if not prefix:
        with torch.no_grad():
            assert torch.equal(model(nets.TOKENS), decoded(net, path)(nets.TOKENS))
    assert model.config["quantization_config"]["compute_dtype"] == "float32"
    assert model.hf_quantizer.quantized.keys() == {
        "embed", "conv", "head", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down",
    }  # fmt: skip


def test_nothing_is_decoded_while_loading(tmp_path, monkeypatch):
    path = packed_file(tmp_path / "net.gguf", make())
    jobs = []
    fill = HostNamed.fill
    monkeypatch.setattr(HostNamed, "fill", lambda self, given, *rest: jobs.extend(given) or fill(self, given, *rest))
    Net.from_pretrained(path, quantization_config=GGUF)
    assert {job.format for job in jobs} == {"copy"}


def test_without_a_config_the_weights_are_decoded(tmp_path):
    net = make()
    path = packed_file(tmp_path / "net.gguf", net)
    model = Net.from_pretrained(path)
    assert not [module for module in model.modules() if isinstance(module, GGUFLayer)]
    with torch.no_grad():
        assert torch.equal(model(nets.TOKENS), decoded(net, path)(nets.TOKENS))


def test_another_backend_packs_what_is_decoded(tmp_path):
    net = make()
    path = packed_file(tmp_path / "net.gguf", net, left=[name for name in net.state_dict() if "up" not in name])
    model = Net.from_pretrained(path, quantization_config=wp.GGUFQuantizationConfig(quant_type="q4_0"))
    assert model.blocks[0].up.weight.quant_type == "Q4_0"
    expected = wp.gguf.quantize(decoded(net, path).blocks[0].up.weight.detach(), "Q4_0")
    assert torch.equal(model.blocks[0].up.weight, expected)


@pytest.mark.parametrize("type", ["q8_0", "q5_1", "tq2_0"])
def test_a_folder_is_packed_while_it_is_read(tmp_path, type):
    net = make(width=256)
    folder = nets.save(tmp_path / "net", net, width=256)
    config = wp.GGUFQuantizationConfig(quant_type=type, modules_to_not_convert=["head"])
    model = wp.from_pretrained(Net, folder, quantization_config=config)
    assert set(model.hf_quantizer.quantized) == {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"}
    for path in model.hf_quantizer.quantized:
        weight = net.get_submodule(path).weight
        expected = wp.gguf.quantize(weight.detach(), type)
        assert torch.equal(model.get_submodule(path).weight, expected)
        weight.data = wp.gguf.dequantize(expected, type)
    with torch.no_grad():
        assert torch.equal(model(nets.TOKENS), net(nets.TOKENS))


def test_tied_weights_share_their_blocks(tmp_path):
    net = make(tied=True)
    path = packed_file(tmp_path / "net.gguf", net)
    model = wp.from_pretrained(Net, path, config={"tied": True}, quantization_config=GGUF)
    assert model.head.weight is model.embed.weight
    with torch.no_grad():
        assert torch.equal(model(nets.TOKENS), decoded(net, path)(nets.TOKENS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types(tmp_path, dtype):
    path = packed_file(tmp_path / "net.gguf", make())
    config = wp.GGUFQuantizationConfig(compute_dtype=dtype, modules_to_not_convert=["blocks.1"])
    model = wp.from_pretrained(Net, path, quantization_config=config, torch_dtype=dtype)
    wanted = getattr(torch, dtype)
    assert model.scale.dtype == model.blocks[1].up.weight.dtype == model.embed(nets.TOKENS).dtype == wanted
    assert type(model.blocks[1].up) is torch.nn.Linear
    assert model.blocks[0].up.weight.dtype == torch.uint8
    assert model(nets.TOKENS).dtype == wanted


def test_modules_in_float32(tmp_path):
    path = packed_file(tmp_path / "net.gguf", make())
    model = wp.from_pretrained(
        Net, path, quantization_config=GGUF, torch_dtype="bfloat16", keep_in_fp32_modules=["blocks.0.up"]
    )
    assert type(model.blocks[0].up) is torch.nn.Linear
    assert model.blocks[0].up.weight.dtype == torch.float32
    assert type(model.blocks[0].down) is GGUFLinear


def test_a_parameter_that_no_layer_decodes_is_decoded(tmp_path):
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.zeros(4, 64))

    table = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    wp.gguf.write(tmp_path / "bare.gguf", {"table": table}, {"general.architecture": "x"}, types="Q4_1")
    with pytest.warns(UserWarning, match="as no layer does it when it runs: table"):
        model = wp.from_pretrained(Bare, tmp_path / "bare.gguf", quantization_config=GGUF)
    expected = wp.gguf.dequantize(wp.gguf.quantize(table, "Q4_1"), "Q4_1")
    assert np.array_equal(model.table.detach().numpy(), expected)


def test_disk_and_devices(tmp_path):
    net = make()
    path = packed_file(tmp_path / "net.gguf", net)
    options = {"quantization_config": GGUF, "offload_folder": tmp_path / "disk"}
    model = wp.from_pretrained(Net, path, device_map={"": "cpu", "blocks.1": "disk"}, **options)
    assert type(model.blocks[0].up) is GGUFLinear
    assert type(model.blocks[1].up) is torch.nn.Linear
    with torch.no_grad():
        assert torch.equal(model(nets.TOKENS), decoded(net, path)(nets.TOKENS))
    everywhere = wp.from_pretrained(Net, path, device_map="cpu", **options)
    assert everywhere.embed.weight.quant_type == "Q8_0"


def test_weights_that_are_brought_in_for_each_layer(tmp_path, peer):
    accelerate = peer("accelerate")
    net = make()
    path = packed_file(tmp_path / "net.gguf", net)
    model = Net.from_pretrained(path, quantization_config=GGUF)
    # accelerate makes parameters anew, and knows nothing of their types.
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.blocks[0].up.weight.device.type == "meta"
    with torch.no_grad():
        assert torch.equal(model(nets.TOKENS), decoded(net, path)(nets.TOKENS))


def test_a_device_map_counts_packed_bytes(tmp_path):
    net = make(width=256)
    path = packed_file(tmp_path / "net.gguf", net, "Q4_K")
    size = path.stat().st_size
    # Twice what is packed, a third of what is decoded.
    model = wp.from_pretrained(
        Net, path, config={"width": 256}, quantization_config=GGUF, device_map="auto",
        max_memory={"cpu": 2 * size}, offload_folder=tmp_path / "disk",
    )  # fmt: skip
    assert set(model.hf_device_map.values()) == {"cpu"}


def test_shapes_that_do_not_fit(tmp_path):
    path = packed_file(tmp_path / "net.gguf", make(width=64))
    with pytest.raises(CheckpointError, match=r"\"scale\" has shape \[64\] in the checkpoint, and \[32\] in the model"):
        wp.from_pretrained(Net, path, config={"width": 32}, quantization_config=GGUF)


def test_a_matrix_that_lies_the_other_way_round(tmp_path):
    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.line = torch.nn.Linear(64, 32, bias=False)

    weight = np.zeros((64, 32), np.float32)
    wp.gguf.write(tmp_path / "line.gguf", {"line.weight": weight}, {"general.architecture": "x"}, types="Q8_0")
    with pytest.raises(CheckpointError, match=r"has shape \[64, 32\] in the checkpoint, and \[32, 64\] in the model"):
        wp.from_pretrained(Line, tmp_path / "line.gguf", quantization_config=GGUF)


def test_names_that_nothing_knows(tmp_path):
    tensors = {"blk.0.attn_q.weight": np.zeros((32, 32), np.float32)}
    wp.gguf.write(tmp_path / "x.gguf", tensors, {"general.architecture": "mystery"}, types="Q8_0")
    with pytest.raises(UnsupportedError, match='architecture "mystery" are not known'):
        wp.from_pretrained(Net, tmp_path / "x.gguf", quantization_config=GGUF)


def test_missing_and_unknown_weights(tmp_path):
    net = make()
    state = net.state_dict()
    state["stranger.weight"] = torch.zeros(4, 32)
    del state["blocks.0.up.weight"]
    other = torch.nn.Module()
    other.state_dict = lambda: state
    path = packed_file(tmp_path / "net.gguf", other)
    with pytest.warns(UserWarning, match=r"lacks blocks\.0\.up\.weight|no place for stranger\.weight"):
        model, info = wp.from_pretrained(Net, path, quantization_config=GGUF, output_loading_info=True)
    assert info.missing == ["blocks.0.up.weight"]
    assert info.unexpected == ["stranger.weight"]
    assert type(model.blocks[0].up) is torch.nn.Linear


def test_low_cpu_mem_usage(tmp_path):
    path = packed_file(tmp_path / "net.gguf", make())
    with pytest.raises(ConfigError, match="low_cpu_mem_usage=False"):
        wp.from_pretrained(Net, path, quantization_config=GGUF, low_cpu_mem_usage=False)


def test_peak_memory_is_that_of_the_blocks(tmp_path):
    # Bytes that are read go straight into the parameter: it alone holds them.
    path = packed_file(tmp_path / "net.gguf", make())
    model = Net.from_pretrained(path, quantization_config=GGUF)
    for value in model.parameters():
        if isinstance(value, GGUFParameter):
            assert value.untyped_storage().nbytes() == value.nbytes


def test_weights_stay_in_the_mapped_file(tmp_path):
    net = make()
    path = packed_file(tmp_path / "net.gguf", net)
    before = path.read_bytes()
    model = Net.from_pretrained(path, quantization_config=GGUF, mmap=True)
    other = Net.from_pretrained(path, quantization_config=GGUF)
    for name, value in other.state_dict().items():
        mapped = model.state_dict()[name]
        assert mapped.untyped_storage().nbytes() == len(before), name
        assert torch.equal(mapped, value)
        assert type(mapped) is type(value)
        assert (mapped.shape, mapped.dtype) == (value.shape, value.dtype)
    with torch.no_grad():
        assert torch.equal(model(nets.TOKENS), other(nets.TOKENS))
        # What is written to the model does not reach the file.
        model.scale.fill_(3)
        model.embed.weight.zero_()
    assert path.read_bytes() == before


# Rows, as the engine is asked for them.


@pytest.fixture
def stored(tmp_path):
    random = np.random.default_rng(3)
    tensors = {
        "fused": random.standard_normal((12, 64)).astype(np.float32),
        "norm": np.arange(64, dtype=np.float32),
        "flat": random.standard_normal((9, 32)).astype(np.float32),
    }
    wp.gguf.write(
        tmp_path / "rows.gguf", tensors, {"general.architecture": "x"},
        types={"fused": "Q8_0", "norm": "F32", "flat": "Q8_0"},
    )  # fmt: skip
    with wp.open_checkpoint(tmp_path / "rows.gguf") as checkpoint:
        yield checkpoint, wp.gguf.open(tmp_path / "rows.gguf")


def read(view, job):
    out = [np.empty(part.shape, {"U8": "u1", "F32": "f4"}[part.dtype]) for part in layout(job, view.entries[job.name])]
    (found,) = view.fill([job], [out], None)
    return found[0]


def test_rows_of_blocks_are_gathered_without_decoding(stored):
    checkpoint, file = stored
    view = HostNamed(
        checkpoint,
        [
            MappedTensor("cut", (Rows("fused", 4, 6),)),
            MappedTensor("swapped", (Rows("fused", 6), Rows("fused", 0, 6))),
            MappedTensor("heads", (Rows("fused", interleave=Interleave(2, 3)),)),
            MappedTensor("kernel", (Rows("flat"),), (2, 16, 3, 3)),
        ],
    )
    raw = file.raw("fused")
    orders = {
        "cut": range(4, 10),
        "swapped": [*range(6, 12), *range(6)],
        "heads": [group * 6 + part * 2 + i for group in range(2) for i in range(2) for part in range(3)],
    }
    for name, rows in orders.items():
        assert view.entries[name].format == "gguf:q8_0"
        assert view.entries[name].shape == (len(rows), 64)
        assert view.entries[name].nbytes == len(rows) * 68
        assert np.array_equal(read(view, Job(name, "copy")), raw[list(rows)])
        assert np.array_equal(read(view, Job(name, "f32")), file.read("fused")[list(rows)])
    assert view.entries["kernel"].shape == (2, 16, 3, 3)
    assert np.array_equal(read(view, Job("kernel", "copy")), file.raw("flat"))
    assert np.array_equal(read(view, Job("kernel", "f32")), file.read("flat").reshape(2, 16, 3, 3))


def test_what_is_changed_in_value_is_decoded(stored):
    checkpoint, file = stored
    view = HostNamed(
        checkpoint,
        [MappedTensor("norm", (Rows("norm"),), add=-1.0), MappedTensor("packed", (Rows("fused"),), add=2.0)],
    )
    assert np.array_equal(read(view, Job("norm", "copy")), file.read("norm") - 1)
    assert view.entries["packed"].is_plain
    assert np.array_equal(read(view, Job("packed", "copy")), file.read("fused") + np.float32(2))


def test_rows_that_a_host_takes(stored):
    checkpoint, file = stored
    view = HostNamed(checkpoint, [MappedTensor("a", (Rows("fused"),)), MappedTensor("b", (Rows("fused", 0, 6),))])
    found = read(view, Job("a", "copy", rows=(Rows("a", 2, 3),)))
    assert np.array_equal(found, file.raw("fused")[2:5])
    with pytest.raises(UnsupportedError, match='rows of "b", which is put together itself'):
        read(view, Job("b", "copy", rows=(Rows("b", 2, 3),)))


def test_a_model_whose_names_most_tensors_have(stored):
    checkpoint, _ = stored
    view = host_named(checkpoint, PlainHost(), None, ["fused", "norm", "other"])
    assert list(view.entries) == ["fused", "norm", "flat"]
