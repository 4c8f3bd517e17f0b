"""Plain modules through `from_pretrained`: files, types, keys that do not fit, devices."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest

torch = pytest.importorskip("torch")
nets = pytest.importorskip("tests.loading.nets")

import weightpack as wp  # noqa: E402
from weightpack.errors import CheckpointError, ConfigError  # noqa: E402


def same(model, net, dtype=None):
    """Whether both hold the same tensors, those of `net` cast to `dtype`."""
    expected = net.state_dict()
    found = model.state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        wanted = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        assert found[name].dtype == wanted.dtype, name
        assert torch.equal(found[name], wanted), name


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [None, "auto", torch.float32, "float16", "bf16"])
def test_a_model_comes_back_as_it_was(tmp_path, shards, stored, wanted):
    net = nets.make(dtype=stored)
    folder = nets.save(tmp_path / "net", net, shards=shards)
    model = wp.from_pretrained(nets.Net, folder, torch_dtype=wanted)
    names = {None: stored, "auto": stored, "float16": torch.float16, "bf16": torch.bfloat16}
    same(model, net, names.get(wanted, wanted))
    assert not model.training
    assert all(value.device.type == "cpu" for value in model.state_dict().values())
    # What the constructor computes is not touched.
    assert torch.equal(model.wave, nets.Net().wave)
    assert model.wave.dtype == torch.float32


def test_outputs_are_the_same(tmp_path):
    net = nets.make()
    model = nets.Net.from_pretrained(nets.save(tmp_path / "net", net))
    assert torch.equal(model(nets.TOKENS), net(nets.TOKENS))
    assert all(p.requires_grad == q.requires_grad for p, q in zip(model.parameters(), net.parameters(), strict=True))


def test_arguments_come_from_the_config(tmp_path):
    net = nets.make(width=32, depth=1, tokens=20)
    folder = nets.save(tmp_path / "net", net, width=32, depth=1, tokens=20, _private=3, note="x")
    model = wp.from_pretrained(nets.Net, folder)
    same(model, net)
    assert model.config["depth"] == 1
    other = wp.from_pretrained(nets.Net, folder / "model.safetensors", config={"width": 32, "depth": 1, "tokens": 20})
    same(other, net)


def test_a_class_with_arguments_wants_a_config(tmp_path):
    folder = nets.write(tmp_path / "net", nets.Block(8).state_dict(), {})
    with pytest.raises(ConfigError, match="Block takes width"):
        wp.from_pretrained(nets.Block, folder)
    assert wp.from_pretrained(nets.Block, folder, config={"width": 8}).up.in_features == 8


def test_subfolders_and_variants(tmp_path):
    net = nets.make()
    folder = nets.save(tmp_path / "top" / "inner", net)
    other = nets.make(seed=1)
    nets.save(tmp_path / "other", other)
    shutil.move(tmp_path / "other" / "model.safetensors", folder / "model.fp16.safetensors")
    same(wp.from_pretrained(nets.Net, tmp_path / "top", subfolder="inner"), net)
    same(wp.from_pretrained(nets.Net, folder, variant="fp16"), other)
    with pytest.raises(CheckpointError, match='of variant "bf16"'):
        wp.from_pretrained(nets.Net, folder, variant="bf16")


def test_torchs_own_files(tmp_path):
    net = nets.make()
    folder = nets.save(tmp_path / "net", net)
    (folder / "model.safetensors").unlink()
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    same(wp.from_pretrained(nets.Net, folder), net)
    same(wp.from_pretrained(nets.Net, folder, use_safetensors=False, torch_dtype="bfloat16"), net, torch.bfloat16)
    with pytest.raises(CheckpointError, match="only as pickles"):
        wp.from_pretrained(nets.Net, folder, use_safetensors=True)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    folder = nets.save(tmp_path / "net", nets.make())
    (folder / "model.safetensors").unlink()

    torch.save({"embed.weight": _Trap(tmp_path / "sprung")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read as tensors alone"):
        wp.from_pretrained(nets.Net, folder)
    assert not (tmp_path / "sprung").exists()


class _Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_state_dict_in_place_of_files(tmp_path):
    net = nets.make()
    model = wp.from_pretrained(nets.Net, tmp_path, state_dict=net.state_dict(), torch_dtype="bfloat16")
    same(model, net, torch.bfloat16)


def test_tied_weights_stay_one(tmp_path):
    net = nets.make(tied=True)
    folder = nets.save(tmp_path / "net", net, tied=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = wp.from_pretrained(nets.Net, folder)
    assert model.head.weight is model.embed.weight
    same(model, net)
    # The same weight stored under both names is fine as well.
    twice = nets.write(tmp_path / "twice", net.state_dict(), {"tied": True})
    model = wp.from_pretrained(nets.Net, twice)
    assert model.head.weight is model.embed.weight


def test_missing_keys_are_told_and_never_left_on_meta(tmp_path):
    net = nets.make()
    state = net.state_dict()
    for name in ("blocks.0.up.weight", "blocks.0.up.bias", "blocks.1.norm.weight", "scale"):
        state.pop(name)
    folder = nets.write(tmp_path / "net", state, {})
    with pytest.warns(UserWarning, match="the checkpoint lacks .*blocks.0.up.weight"):
        model, info = wp.from_pretrained(nets.Net, folder, output_loading_info=True)
    assert sorted(info.missing) == ["blocks.0.up.bias", "blocks.0.up.weight", "blocks.1.norm.weight", "scale"]
    assert all(value.device.type == "cpu" and value.isfinite().all() for value in model.state_dict().values())
    assert model.blocks[0].up.weight.abs().sum() > 0
    assert torch.equal(model.blocks[1].norm.weight, torch.ones(64))
    model(nets.TOKENS)


def test_unexpected_keys_are_told(tmp_path):
    net = nets.make()
    folder = nets.write(tmp_path / "net", {**net.state_dict(), "extra.weight": torch.ones(3)}, {})
    with pytest.warns(UserWarning, match="no place for extra.weight"):
        model, info = wp.from_pretrained(nets.Net, folder, output_loading_info=True)
    assert info.unexpected == ["extra.weight"]
    same(model, net)


def test_other_shapes_are_refused_or_made_anew(tmp_path):
    net = nets.make()
    folder = nets.write(tmp_path / "net", {**net.state_dict(), "head.weight": torch.ones(7, 64)}, {})
    with pytest.raises(CheckpointError, match=r'"head.weight" has shape \[7, 64\] in the checkpoint, and \[50, 64\]'):
        wp.from_pretrained(nets.Net, folder)
    with pytest.warns(UserWarning, match="in another shape, head.weight"):
        model, info = wp.from_pretrained(nets.Net, folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert info.mismatched == [("head.weight", (7, 64), (50, 64))]
    assert model.head.weight.shape == (50, 64)
    assert model.head.weight.abs().sum() > 0


def test_a_missing_shard_is_named(tmp_path):
    folder = nets.save(tmp_path / "net", nets.make(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises((OSError, CheckpointError), match="model-00002-of-00003"):
        wp.from_pretrained(nets.Net, folder)


def test_a_shard_that_lacks_its_key_is_refused(tmp_path):
    folder = nets.save(tmp_path / "net", nets.make(), shards=2)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["blocks.9.up.weight"] = "model-00001-of-00002.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"blocks\.9\.up\.weight"):
        wp.from_pretrained(nets.Net, folder)


def test_a_file_cut_short_is_refused(tmp_path):
    folder = nets.save(tmp_path / "net", nets.make())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        wp.from_pretrained(nets.Net, folder)


def test_what_is_not_there_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="neither a model folder nor a file"):
        wp.from_pretrained(nets.Net, tmp_path / "nothing")


@pytest.mark.parametrize("name", ["blocks", "conv", "scale"])
def test_modules_kept_in_float32(tmp_path, name):
    net = nets.make()
    folder = nets.save(tmp_path / "net", net)
    model = wp.from_pretrained(nets.Net, folder, torch_dtype="bfloat16", keep_in_fp32_modules=[name])
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            kept = name in key.split(".")
            assert value.dtype == (torch.float32 if kept else torch.bfloat16), key


def test_a_type_that_is_none(tmp_path):
    folder = nets.save(tmp_path / "net", nets.make())
    for wrong in ("bfloat17", torch.int8, 3):
        with pytest.raises(ConfigError):
            wp.from_pretrained(nets.Net, folder, torch_dtype=wrong)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto", "sequential", torch.device("cpu")])
def test_everything_on_the_cpu(tmp_path, device_map):
    if torch.cuda.is_available() and isinstance(device_map, str) and device_map != "cpu":
        pytest.skip("there is an accelerator to choose")
    net = nets.make()
    model = wp.from_pretrained(nets.Net, nets.save(tmp_path / "net", net), device_map=device_map)
    same(model, net)
    assert torch.equal(model(nets.TOKENS), net(nets.TOKENS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_on_disk(tmp_path, dtype):
    net = nets.make(dtype=dtype)
    folder = nets.save(tmp_path / "net", net)
    places = {"": "cpu", "blocks.1": "disk", "conv": "disk"}
    with pytest.raises(ConfigError, match="stay on disk"):
        wp.from_pretrained(nets.Net, folder, device_map=places)
    model = wp.from_pretrained(nets.Net, folder, device_map=places, offload_folder=tmp_path / "offload")
    assert model.blocks[1].up.weight.device.type == "meta"
    assert model.blocks[1].up.weight.dtype == dtype
    assert torch.equal(model(nets.TOKENS), net(nets.TOKENS))


def test_a_budget_sends_modules_to_disk(tmp_path):
    net = nets.make(width=128, depth=6)
    folder = nets.save(tmp_path / "net", net, width=128, depth=6)
    whole = sum(value.nbytes for value in net.state_dict().values())
    model = wp.from_pretrained(
        nets.Net,
        folder,
        device_map="sequential",
        max_memory={"cpu": whole // 2},
        offload_folder=tmp_path / "offload",
    )
    held = sum(value.nbytes for value in model.state_dict().values() if value.device.type != "meta")
    assert 0 < held <= whole // 2
    assert torch.equal(model(nets.TOKENS), net(nets.TOKENS))


@pytest.mark.parametrize("device_map", ["nowhere", -1, True, {"": -2}])
def test_a_device_that_is_none(tmp_path, device_map):
    folder = nets.save(tmp_path / "net", nets.make())
    with pytest.raises(ConfigError):
        wp.from_pretrained(nets.Net, folder, device_map=device_map)


def test_a_map_that_leaves_modules_out(tmp_path):
    folder = nets.save(tmp_path / "net", nets.make())
    with pytest.raises(ConfigError, match='the device map has no device for "'):
        wp.from_pretrained(nets.Net, folder, device_map={"blocks": "cpu"})


def test_progress_is_told(tmp_path):
    net = nets.make()
    seen = []
    wp.from_pretrained(nets.Net, nets.save(tmp_path / "net", net), on_progress=lambda *told: seen.append(told))
    assert [name for *_, name in seen] == sorted(net.state_dict(), key=[name for *_, name in seen].index)
    assert seen[-1][0] == seen[-1][1] == sum(value.nbytes for value in net.state_dict().values())


def test_unknown_and_missing_methods(tmp_path):
    folder = nets.save(tmp_path / "net", nets.make())
    for wrong, told in (({"quant_method": "nf9"}, "is none of bitsandbytes"), ({"bits": 4}, "has no quant_method")):
        with pytest.raises(ValueError, match=told):
            wp.from_pretrained(nets.Net, folder, quantization_config=wrong)
    nets.save(tmp_path / "other", nets.make(), quantization_config={"quant_method": "nf9"})
    with pytest.raises(ValueError, match="is none of bitsandbytes"):
        wp.from_pretrained(nets.Net, tmp_path / "other")
