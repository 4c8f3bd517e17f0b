"""Models saved to torch's own files: what is in them, and who loads them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import find_peer

torch = find_peer("torch")

import weightpack as wp  # noqa: E402
from tests.loading import nets  # noqa: E402
from tests.quantizers.test_contract import BACKENDS, storage  # noqa: E402
from weightpack.errors import CheckpointError, FormatError  # noqa: E402
from weightpack.saving.parts import part_of  # noqa: E402
from weightpack.saving.pickle import shards, split  # noqa: E402
from weightpack.stored import Stored  # noqa: E402

WIDTH = 256
pytestmark = pytest.mark.filterwarnings("ignore")


def source(tmp_path, **options):
    net = nets.make(dtype=torch.bfloat16, width=WIDTH, **options)
    return net, nets.save(tmp_path / "net", net, width=WIDTH, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def read(folder, pattern="*.bin"):
    """All tensors of a folder, as torch reads them."""
    found = {}
    for file in sorted(folder.glob(pattern)):
        found |= torch.load(file, weights_only=True)
    return found


@pytest.mark.parametrize("size", ["5GB", "100KB", 1])
def test_a_plain_module_goes_there_and_back(tmp_path, size):
    net, folder = source(tmp_path)
    model = nets.Net.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved", max_shard_size=size, safe_serialization=False)
    files = sorted((tmp_path / "saved").glob("*.bin"))
    if size == "5GB":
        assert names(tmp_path / "saved") == ["config.json", "pytorch_model.bin"]
    else:
        index = json.loads((tmp_path / "saved" / "pytorch_model.bin.index.json").read_text())
        assert set(index["weight_map"]) == set(net.state_dict())
        assert set(index["weight_map"].values()) == {file.name for file in files}
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in net.state_dict().values())
    assert not list(tmp_path.glob("saved.partial-*"))
    stored = read(tmp_path / "saved")
    assert all(type(value) is torch.Tensor for value in stored.values())
    assert {name: True for name in stored} == {
        name: torch.equal(value, stored[name]) for name, value in net.state_dict().items()
    }
    for options in ({}, {"use_safetensors": False}):
        assert storage(nets.Net.from_pretrained(tmp_path / "saved", **options)) == storage(net)


@pytest.mark.parametrize("name", [name for name in BACKENDS if not name.startswith("gguf")])
def test_packed_modules_come_back_bit_for_bit(tmp_path, peer, name):
    needs, make = BACKENDS[name]
    if needs is not None:
        peer(needs)
    _, folder = source(tmp_path)
    model = nets.Net.from_pretrained(folder, quantization_config=make(), torch_dtype="bfloat16")
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB", safe_serialization=False)
    assert read(tmp_path / "saved")
    again = nets.Net.from_pretrained(tmp_path / "saved", torch_dtype="bfloat16")
    assert storage(again) == storage(model)
    with torch.no_grad():
        assert torch.equal(again(nets.TOKENS), model(nets.TOKENS))
    again.save_pretrained(tmp_path / "twice", max_shard_size="50KB", safe_serialization=False)
    assert names(tmp_path / "twice") == names(tmp_path / "saved")
    for file in (tmp_path / "saved").glob("*.bin"):
        assert file.stat().st_size == (tmp_path / "twice" / file.name).stat().st_size


@pytest.mark.parametrize("size", ["5GB", "100KB"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_hosts_read_the_files(tmp_path, peer, size, variant):
    transformers = peer("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    diffusers = peer("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    for model, stem in ((llama, "pytorch_model"), (unet, "diffusion_pytorch_model")):
        folder = tmp_path / stem
        wp.save_pretrained(model, folder, max_shard_size=size, variant=variant, safe_serialization=False)
        infix = f".{variant}" if variant else ""
        index = f"{stem}.bin.index{infix}.json"
        assert (folder / (index if size == "100KB" else f"{stem}{infix}.bin")).is_file()
        assert not list(folder.glob("*.safetensors*"))
        again = type(model).from_pretrained(folder, variant=variant, use_safetensors=False)
        assert storage(again) == storage(model)
        if model is llama or size == "5GB":
            # Of torch's shards diffusers 0.42 looks for the index only if use_safetensors is False.
            assert storage(type(model).from_pretrained(folder, variant=variant)) == storage(model)
        assert storage(wp.from_pretrained(type(model), folder, variant=variant)) == storage(model)


@pytest.mark.parametrize("kind", ["bitsandbytes", "torchao", "quanto"])
def test_hosts_read_packed_weights(tmp_path, peer, kind):
    transformers = peer("transformers")
    config = {
        "bitsandbytes": lambda: wp.BitsAndBytesConfig(load_in_4bit=True),
        "torchao": lambda: wp.TorchAoConfig("int8"),
        "quanto": lambda: wp.QuantoConfig("int8"),
    }[kind]
    peer({"quanto": "optimum.quanto"}.get(kind, kind))
    torch.manual_seed(0)
    made = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, vocab_size=100
    )
    transformers.LlamaForCausalLM(made).bfloat16().save_pretrained(tmp_path / "llama")
    options = {"torch_dtype": "bfloat16"}
    model = wp.from_pretrained(
        transformers.LlamaForCausalLM, tmp_path / "llama", quantization_config=config(), **options
    )
    wp.save_pretrained(model, tmp_path / "saved", safe_serialization=False)
    again = wp.from_pretrained(transformers.LlamaForCausalLM, tmp_path / "saved", **options)
    assert storage(again) == storage(model)
    if kind == "quanto":
        return  # transformers reads no saved quanto model of its own.
    with torch.no_grad():
        expected = model(nets.TOKENS).logits
        host = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
        assert torch.allclose(host(nets.TOKENS).logits, expected, rtol=0.02, atol=0.02)


def test_views_are_stored_as_what_they_show(tmp_path):
    wide = torch.arange(1000.0).reshape(10, 100)
    net = torch.nn.Module()
    net.register_buffer("part", wide[:, :2])
    net.register_buffer("row", wide[3])
    net.weight = torch.nn.Parameter(wide[:2].t())
    wp.save_pretrained(net, tmp_path / "saved", safe_serialization=False)
    stored = read(tmp_path / "saved")
    assert sum(value.untyped_storage().nbytes() for value in stored.values()) == 4 * (20 + 100 + 200)
    assert torch.equal(stored["part"], wide[:, :2])
    assert torch.equal(stored["weight"], wide[:2].t())


def test_the_other_kind_gives_way(tmp_path):
    net, folder = source(tmp_path)
    (folder / "notes.txt").write_text("mine")
    net.save_pretrained(folder, safe_serialization=False, max_shard_size="100KB", overwrite=True)
    assert not list(folder.glob("*.safetensors"))
    assert (folder / "notes.txt").read_text() == "mine"
    net.save_pretrained(folder, overwrite=True)
    assert not list(folder.glob("*.bin*"))
    assert (folder / "model.safetensors").is_file()


def test_nothing_is_left_where_it_fails(tmp_path, monkeypatch):
    net, folder = source(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return save(*arguments)

    save = torch.save
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        net.save_pretrained(folder, safe_serialization=False, max_shard_size="100KB", overwrite=True)
    assert len(calls) == 2
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(OSError, match="and 10 are free"):
        net.save_pretrained(folder, safe_serialization=False, overwrite=True)
    monkeypatch.undo()
    net.register_buffer("lost", torch.empty(3, device="meta"))
    with pytest.raises(FormatError, match='"lost" is not in memory'):
        net.save_pretrained(folder, safe_serialization=False, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert names(tmp_path) == ["net"]


def test_files_are_those_of_the_other_kind(tmp_path):
    peer = find_peer("huggingface_hub")
    state = {f"t{number}": torch.zeros(size, dtype=torch.uint8) for number, size in enumerate([1, 9, 1, 2, 3, 0, 4])}
    for most in (1, 3, 5, 100):
        found = split([Stored(name, value) for name, value in state.items()], most)
        hub = peer.split_torch_state_dict_into_shards(state, max_shard_size=most, filename_pattern="m{suffix}.bin")
        assert [[stored.name for stored in group] for group in found] == list(hub.filename_to_tensors.values())
    together = [Stored("a", state["t1"]), Stored("a.s", state["t1"], with_previous=True), Stored("b", state["t1"])]
    assert [[one.name for one in group] for group in split(together, 9)] == [["a", "a.s"], ["b"]]


def test_a_part_says_its_files():
    net = nets.make(width=64)
    part = part_of(net, folder="unet", variant="ema", safe_serialization=False)
    files, index = shards(part, 20_000)
    assert next(iter(files)).startswith("pytorch_model.ema-00001-of-")
    assert list(index) == ["pytorch_model.bin.index.ema.json"]


class Shouting:
    def __reduce__(self):
        return (print, ("loaded",))


def test_files_with_more_than_tensors_are_refused(tmp_path):
    net, folder = source(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({**net.state_dict(), "head.weight": Shouting()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read as tensors alone"):
        nets.Net.from_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="cannot be read as tensors alone"):
        nets.Net.from_pretrained(folder)


def test_a_fresh_process_reads_what_torchao_packed(tmp_path, peer):
    peer("torchao")
    _, folder = source(tmp_path)
    for name in ("torchao float8", "torchao nvfp4"):
        model = nets.Net.from_pretrained(folder, quantization_config=BACKENDS[name][1](), torch_dtype="bfloat16")
        saved = tmp_path / name.partition(" ")[2]
        model.save_pretrained(saved, safe_serialization=False)
        code = (
            "import torch, sys\n"
            "from tests.loading import nets\n"
            "assert 'torchao' not in sys.modules\n"
            f"model = nets.Net.from_pretrained({str(saved)!r}, torch_dtype='bfloat16')\n"
            f"torch.save(model(nets.TOKENS), {str(tmp_path / 'out.pt')!r})\n"
        )
        root = Path(__file__).resolve().parents[2]
        paths = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(root)])
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths})
        with torch.no_grad():
            assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), model(nets.TOKENS))
