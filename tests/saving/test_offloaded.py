"""Models whose weights accelerate keeps elsewhere, saved as if they were all there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import find_peer

torch = find_peer("torch")
accelerate = find_peer("accelerate")

import weightpack as wp  # noqa: E402
from tests.loading import nets  # noqa: E402
from tests.quantizers.test_contract import BACKENDS, storage  # noqa: E402
from weightpack.errors import FormatError  # noqa: E402

WIDTH = 256
CPU = torch.device("cpu")
ON_DISK = {"": "cpu", "blocks.1": "disk", "embed": "disk"}
pytestmark = pytest.mark.filterwarnings("ignore")


def source(tmp_path, **options):
    net = nets.make(dtype=torch.bfloat16, width=WIDTH, **options)
    return net, nets.save(tmp_path / "net", net, width=WIDTH, **options)


def content(folder):
    """The bytes of all files, but for the mark of the run in an index."""
    found = {}
    for file in sorted(folder.iterdir()):
        found[file.name] = file.read_bytes()
        if file.name.endswith(".index.json"):
            found[file.name] = json.loads(file.read_text())["weight_map"]
    return found


def offload(model, kind, folder):
    """Has accelerate take all weights away."""
    if kind == "disk":
        accelerate.disk_offload(model, str(folder), execution_device=CPU)
    else:
        accelerate.cpu_offload(model, execution_device=CPU)
    assert any(value.device.type == "meta" for value in model.parameters())


@pytest.mark.parametrize("safe", [True, False])
def test_a_device_map_with_disk_changes_nothing(tmp_path, safe):
    _, folder = source(tmp_path)
    options = {"safe_serialization": safe, "max_shard_size": "100KB"}
    nets.Net.from_pretrained(folder).save_pretrained(tmp_path / "whole", **options)
    model = nets.Net.from_pretrained(folder, device_map=ON_DISK, offload_folder=tmp_path / "off")
    with torch.no_grad():
        before = model(nets.TOKENS)
    model.save_pretrained(tmp_path / "saved", **options)
    assert content(tmp_path / "saved") == content(tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(model(nets.TOKENS), before)
    assert model.blocks[1].up.weight.device.type == "meta"
    assert "_save_to_state_dict" not in model.blocks[1].up.__dict__


def test_tied_weights_that_were_parted_come_back_as_one(tmp_path):
    net, folder = source(tmp_path, tied=True)
    model = nets.Net.from_pretrained(folder, device_map=ON_DISK, offload_folder=tmp_path / "off")
    assert model.embed.weight.device != model.head.weight.device
    model.save_pretrained(tmp_path / "saved")
    again = nets.Net.from_pretrained(tmp_path / "saved")
    assert again.head.weight is again.embed.weight
    assert storage(again) == storage(net)


@pytest.mark.parametrize(("kind", "run"), [("cpu", False), ("cpu", True), ("disk", True)])
@pytest.mark.parametrize("name", ["plain", *(name for name in BACKENDS if not name.startswith(("gguf", "quanto")))])
def test_packed_models_that_accelerate_offloads(tmp_path, peer, name, kind, run):
    # accelerate 1.15 makes no parameter of quanto's tensors anew.
    needs, make = BACKENDS.get(name, (None, lambda: None))
    if needs is not None:
        peer(needs)
    if needs == "torchao" and kind == "disk":
        pytest.skip("accelerate writes no tensors of torchao to disk")
    if needs == "bitsandbytes" and name != "int8":
        run = False  # accelerate loses the statistics that these layers need to run.
    _, folder = source(tmp_path)
    model = nets.Net.from_pretrained(folder, quantization_config=make(), torch_dtype="bfloat16")
    model.save_pretrained(tmp_path / "whole", max_shard_size="50KB")
    offload(model, kind, tmp_path / "off")
    if run:
        with torch.no_grad():
            model(nets.TOKENS)
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    assert content(tmp_path / "saved") == content(tmp_path / "whole")


def test_some_layers_packed_and_others_on_disk(tmp_path, peer):
    peer("optimum.quanto")
    net, folder = source(tmp_path)
    model = nets.Net.from_pretrained(
        folder, quantization_config=wp.QuantoConfig("int8"), device_map=ON_DISK, offload_folder=tmp_path / "off"
    )
    model.save_pretrained(tmp_path / "saved")
    again = nets.Net.from_pretrained(tmp_path / "saved")
    found, wanted = storage(again), storage(net)
    assert found["blocks.1.up.weight"] == wanted["blocks.1.up.weight"]
    assert found["embed.weight"] == wanted["embed.weight"]
    with torch.no_grad():
        assert torch.equal(again(nets.TOKENS), model(nets.TOKENS))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("by_host", [False, True])
def test_transformers_models(tmp_path, peer, by_host, tied):
    transformers = peer("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
        tie_word_embeddings=tied,
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "llama")
    others = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(others, "cpu"), "model.layers.1": "disk"}
    options = {"device_map": places, "offload_folder": str(tmp_path / "off")}
    for dtype in (torch.bfloat16, torch.float32):
        whole = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=dtype)
        wp.save_pretrained(whole, tmp_path / f"whole {dtype}")
        if by_host:
            model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama", dtype=dtype, **options)
        else:
            model = wp.from_pretrained(transformers.LlamaForCausalLM, tmp_path / "llama", torch_dtype=dtype, **options)
        assert model.model.layers[1].mlp.up_proj.weight.device.type == "meta"
        wp.save_pretrained(model, tmp_path / f"saved {dtype}")
        assert content(tmp_path / f"saved {dtype}") == content(tmp_path / f"whole {dtype}")


def test_the_embedding_of_a_tied_model_on_disk(tmp_path, peer):
    transformers = peer("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    whole = transformers.LlamaForCausalLM(config)
    wp.save_pretrained(whole, tmp_path / "whole")
    for number, places in enumerate(
        ({"": "cpu", "model.embed_tokens": "disk", "lm_head": "disk"}, {"model": "disk", "lm_head": "disk"})
    ):
        model = wp.from_pretrained(
            transformers.LlamaForCausalLM, tmp_path / "whole", device_map=places, offload_folder=tmp_path / f"{number}"
        )
        wp.save_pretrained(model, tmp_path / f"saved {number}")
        assert content(tmp_path / f"saved {number}") == content(tmp_path / "whole")


def test_diffusers_models(tmp_path, peer):
    diffusers = peer("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    wp.save_pretrained(unet, tmp_path / "whole", max_shard_size="100KB")
    places = {**{name: "cpu" for name, _ in unet.named_children()}, "mid_block": "disk"}
    for number, load in enumerate((diffusers.UNet2DModel.from_pretrained, wp.from_pretrained)):
        first = () if number == 0 else (diffusers.UNet2DModel,)
        model = load(*first, tmp_path / "whole", device_map=places, offload_folder=str(tmp_path / f"off{number}"))
        assert model.mid_block.resnets[0].conv1.weight.device.type == "meta"
        wp.save_pretrained(model, tmp_path / f"saved{number}", max_shard_size="100KB")
        assert content(tmp_path / f"saved{number}") == content(tmp_path / "whole")


def test_content_that_is_nowhere_is_refused(tmp_path):
    _, folder = source(tmp_path)
    model = nets.Net.from_pretrained(folder)
    model.blocks[1].to("meta")
    with pytest.raises(FormatError, match=r'"blocks\.1\.norm\.weight" is not in memory'):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_is_on_disk_is_not_gathered(tmp_path):
    folder = tmp_path / "net"
    wide, depth = 1024, 8
    nets.save(folder, nets.make(width=wide, depth=depth), width=wide, depth=depth)
    code = f"""
import weightpack as wp
from tests.loading import nets

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

places = {{"": "cpu", **{{f"blocks.{{number}}": "disk" for number in range({depth})}}}}
model = wp.from_pretrained(nets.Net, {str(folder)!r}, device_map=places, offload_folder={str(tmp_path / "off")!r})
before = peak = anonymous()

def look(*done):
    global peak
    peak = max(peak, anonymous())

model.save_pretrained({str(tmp_path / "saved")!r}, on_progress=look)
look()
print(peak - before)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, cwd=root, capture_output=True, text=True
    )
    size = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert size > 130e6
    assert int(done.stdout.split()[-1]) < 64e6
