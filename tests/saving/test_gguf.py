"""GGUF models saved again: the same file, a folder that is loaded again, and what other readers make of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import weightpack as wp  # noqa: E402
from tests.diffusion_models import make as make_diffusion  # noqa: E402
from tests.integrations import tiny_diffusers  # noqa: E402
from tests.integrations.test_diffusers_gguf import output  # noqa: E402
from tests.language import models as language  # noqa: E402
from tests.loading import nets  # noqa: E402
from tests.loading.test_gguf_source import Net, packed_file  # noqa: E402
from tests.loading.test_gguf_source import make as make_net  # noqa: E402
from tests.quantizers.test_contract import storage  # noqa: E402
from weightpack.errors import CheckpointError, ConfigError, FormatError, UnsupportedError  # noqa: E402

GGUF = wp.GGUFQuantizationConfig()
IDS = torch.arange(24).reshape(2, 12)
pytestmark = pytest.mark.filterwarnings("ignore")


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def load_llama(transformers, path, dtype="float32", **options):
    return wp.from_pretrained(
        transformers.AutoModelForCausalLM, path, quantization_config=GGUF, torch_dtype=dtype, **options
    )


@pytest.fixture
def llama(peer, tmp_path):
    """A language model's folder and its GGUF file."""
    folder = language.make_model(tmp_path / "llama", "llama2")
    wp.convert(folder, tmp_path / "llama.gguf", "q4_k_m")
    return peer("transformers"), folder, tmp_path / "llama.gguf"


def changed(path):
    """The weights of a file, decoded, and their types."""
    with wp.gguf.open(path) as file:
        return {name: (row.type, torch.from_numpy(np.array(file.read(name)))) for name, row in file.tensors.items()}


# Back into the file.


@pytest.mark.parametrize(
    ("name", "to", "dtype"),
    [
        *((name, "q8_0", "float32") for name in sorted(language.CONFIGS)),
        *((name, "q4_k_m", "bfloat16") for name in ("llama2", "llama3", "gemma3", "qwen2")),
        ("llama3", "f16", "bfloat16"),
    ],
)
def test_language_models_become_the_same_file(peer, tmp_path, name, to, dtype):
    transformers = peer("transformers")
    folder = language.make_model(tmp_path / "model", name)
    path = tmp_path / "model.gguf"
    wp.convert(folder, path, to)
    whole = path.read_bytes()
    model = load_llama(transformers, path, dtype, config=folder)
    path.unlink()
    expected = logits(model)
    if dtype == "bfloat16":
        model = model.to("cpu").eval()
    wp.save_pretrained(model, tmp_path / "again.gguf", threads=1)
    assert (tmp_path / "again.gguf").read_bytes() == whole
    again = load_llama(transformers, tmp_path / "again.gguf", dtype, config=folder)
    assert torch.equal(logits(again), expected)
    wp.save_pretrained(again, tmp_path / "again.gguf", overwrite=True)
    assert (tmp_path / "again.gguf").read_bytes() == whole
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["again.gguf", "model"]


@pytest.mark.parametrize("mmap", [False, True])
def test_rows_that_were_joined_and_turned_come_back(peer, tmp_path, mmap):
    diffusers = peer("diffusers")
    for name, to in (("flux", "q8_0"), ("sd3", "q4_k"), ("wan", "q5_1"), ("ltxv", "q6_k"), ("qwen_image", "q8_0")):
        source = make_diffusion(name, diffusers)
        source.save_pretrained(tmp_path / name)
        path = tmp_path / f"{name}.gguf"
        wp.convert(tmp_path / name, path, to)
        model = wp.from_pretrained(
            type(source), path, config=tmp_path / name, quantization_config=GGUF, mmap=mmap,
            torch_dtype="bfloat16" if name in ("flux", "sd3") else "float32",
        )  # fmt: skip
        wp.save_pretrained(model, tmp_path / "again.gguf", overwrite=True)
        assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes(), name


def test_own_names_and_flattened_kernels(tmp_path):
    net = make_net()
    for prefix in ("", "model.diffusion_model."):
        path = packed_file(tmp_path / "net.gguf", net, "Q5_0", prefix=prefix)
        whole = path.read_bytes()
        model = Net.from_pretrained(path, quantization_config=GGUF)
        model.save_pretrained(path, overwrite=True)
        assert path.read_bytes() == whole
        path.unlink()


def test_all_kinds_of_pairs_are_kept(tmp_path):
    net = make_net()
    pairs = {
        "general.architecture": "unheard-of",
        "general.alignment": wp.gguf.Typed("u32", 64),
        "a.tokens": [f"token {number} ü" for number in range(70_000)],
        "a.scores": wp.gguf.Typed("[f32]", [0.1, 3e38, -0.0]),
        "a.none": wp.gguf.Typed("[str]", []),
        "a.exact": wp.gguf.Typed("f64", 0.1),
        "a.far": wp.gguf.Typed("u64", 2**63 + 1),
        "a.text": "two\nlines",
        "a.so": True,
    }
    path = tmp_path / "net.gguf"
    wp.gguf.write(
        path, {name: value.numpy() for name, value in net.state_dict().items()}, pairs, types={"embed.weight": "Q8_0"}
    )
    model = Net.from_pretrained(path, quantization_config=GGUF)
    model.save_pretrained(tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_a_split_model_becomes_one_file(llama, tmp_path):
    transformers, folder, path = llama
    gguf = pytest.importorskip("gguf")
    first, second = tmp_path / "x-00001-of-00002.gguf", tmp_path / "x-00002-of-00002.gguf"
    with wp.gguf.open(path) as file:
        names = list(file.tensors)
        for number, (part, own) in enumerate(((first, names[:9]), (second, names[9:]))):
            split = {
                "split.no": wp.gguf.Typed("u16", number),
                "split.count": wp.gguf.Typed("u16", 2),
                "split.tensors.count": wp.gguf.Typed("i32", len(names)),
            }
            tensors = {
                name: np.array(file.read(name))
                if file.tensors[name].type == "F32"
                else (np.array(file.raw(name)), file.tensors[name].type)
                for name in own
            }
            wp.gguf.write(part, tensors, split, metadata_from=file if number == 0 else None)
    model = load_llama(transformers, first, config=folder)
    wp.save_pretrained(model, tmp_path / "one.gguf")
    assert [tensor.name for tensor in gguf.GGUFReader(tmp_path / "one.gguf").tensors] == names
    assert (tmp_path / "one.gguf").read_bytes() == path.read_bytes()


def test_what_has_changed_is_written_as_it_is(llama, tmp_path):
    transformers, folder, path = llama
    before = changed(path)
    model = load_llama(transformers, path, "bfloat16", config=folder)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.input_layernorm.weight += 0.5
        # A merged adapter leaves an ordinary layer, which weightpack does not pack again.
        for projection in ("q_proj", "down_proj"):
            part = layer.self_attn if projection == "q_proj" else layer.mlp
            packed = getattr(part, projection)
            merged = torch.nn.Linear(packed.in_features, packed.out_features, bias=False, dtype=torch.bfloat16)
            merged.weight.copy_(packed.decoded_weight() + 0.25)
            setattr(part, projection, merged)
    expected = logits(model)
    wp.save_pretrained(model, tmp_path / "new.gguf")
    after = changed(tmp_path / "new.gguf")
    assert list(after) == list(before)
    different = {
        name for name in before if before[name][0] != after[name][0] or not torch.equal(before[name][1], after[name][1])
    }
    assert different == {"blk.0.attn_norm.weight", "blk.0.attn_q.weight", "blk.0.ffn_down.weight"}
    assert after["blk.0.attn_norm.weight"][0] == "F32"
    assert after["blk.0.attn_q.weight"][0] == after["blk.0.ffn_down.weight"][0] == "BF16"
    assert torch.equal(after["blk.0.attn_norm.weight"][1], layer.input_layernorm.weight.detach().float())
    assert torch.equal(after["blk.0.ffn_down.weight"][1], layer.mlp.down_proj.weight.detach().float())
    again = load_llama(transformers, tmp_path / "new.gguf", "bfloat16", config=folder)
    assert torch.equal(logits(again), expected)
    wp.save_pretrained(again, tmp_path / "twice.gguf")
    assert (tmp_path / "twice.gguf").read_bytes() == (tmp_path / "new.gguf").read_bytes()


def test_norms_that_the_file_has_one_higher(peer, tmp_path):
    transformers = peer("transformers")
    folder = language.make_model(tmp_path / "model", "gemma3")
    wp.convert(folder, tmp_path / "model.gguf", "q8_0")
    model = load_llama(transformers, tmp_path / "model.gguf", config=folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(0.5)
    wp.save_pretrained(model, tmp_path / "new.gguf")
    before, after = changed(tmp_path / "model.gguf"), changed(tmp_path / "new.gguf")
    assert torch.equal(after["output_norm.weight"][1], torch.full_like(before["output_norm.weight"][1], 1.5))
    assert [name for name in before if not torch.equal(before[name][1], after[name][1])] == ["output_norm.weight"]


def test_decoded_layers_are_written_as_plain_numbers(llama, tmp_path):
    transformers, folder, path = llama
    config = wp.GGUFQuantizationConfig(modules_to_not_convert=["embed_tokens", "gate_proj"])
    model = wp.from_pretrained(
        transformers.AutoModelForCausalLM, path, config=folder, quantization_config=config, torch_dtype="float32"
    )
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight *= 2
    wp.save_pretrained(model, tmp_path / "new.gguf")
    before, after = changed(path), changed(tmp_path / "new.gguf")
    # What is small is kept packed as well, and goes back as long as it has not changed.
    assert after["token_embd.weight"][0] == before["token_embd.weight"][0] != "F32"
    assert after["blk.1.ffn_gate.weight"][0] == "F32"
    assert torch.equal(after["blk.1.ffn_gate.weight"][1], 2 * before["blk.1.ffn_gate.weight"][1])


def test_a_part_of_a_joined_tensor_that_has_changed(peer, tmp_path):
    diffusers = peer("diffusers")
    source = make_diffusion("flux", diffusers, num_attention_heads=8)
    source.save_pretrained(tmp_path / "flux")
    path = tmp_path / "flux.gguf"
    wp.convert(tmp_path / "flux", path, "q4_k")
    model = wp.from_pretrained(type(source), path, config=tmp_path / "flux", quantization_config=GGUF)
    attention = model.transformer_blocks[0].attn
    merged = torch.nn.Linear(256, 256)
    merged.bias = attention.to_k.bias
    with torch.no_grad():
        merged.weight.copy_(attention.to_k.decoded_weight() * 2)
    attention.to_k = merged
    wp.save_pretrained(model, tmp_path / "new.gguf")
    before, after = changed(path), changed(tmp_path / "new.gguf")
    name = "double_blocks.0.img_attn.qkv.weight"
    assert [key for key in before if before[key][0] != after[key][0]] == [name]
    assert (before[name][0], after[name][0]) == ("Q4_K", "F32")
    expected = before[name][1].clone()
    expected[256:512] *= 2
    assert torch.equal(after[name][1], expected)


def test_a_parameter_that_the_file_lacks(llama, tmp_path):
    transformers, folder, path = llama
    model = load_llama(transformers, path, config=folder)
    model.model.more = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigError, match=r'"model.more" was not in the file'):
        wp.save_pretrained(model, tmp_path / "new.gguf")
    assert not (tmp_path / "new.gguf").exists()
    net = make_net()
    with_own = Net.from_pretrained(packed_file(tmp_path / "net.gguf", net), quantization_config=GGUF)
    with_own.more = torch.nn.Parameter(torch.ones(3))
    with_own.save_pretrained(tmp_path / "more.gguf")
    assert list(changed(tmp_path / "more.gguf")) == [*net.state_dict(), "more"]


def test_a_parameter_that_is_gone(llama, tmp_path):
    transformers, folder, path = llama
    model = load_llama(transformers, path, config=folder)
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(ConfigError, match=r'no "model.layers.1.mlp.up_proj.weight" any more'):
        wp.save_pretrained(model, tmp_path / "new.gguf")
    assert not (tmp_path / "new.gguf").exists()


def test_tensors_that_the_model_has_no_place_for(llama, tmp_path, monkeypatch):
    transformers, folder, path = llama
    model = wp.from_pretrained(transformers.LlamaModel, path, config=folder, quantization_config=GGUF)
    wp.save_pretrained(model, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()
    monkeypatch.setattr("weightpack.loading.gguf_origin.ALL_KEPT_BYTES", 1000)
    model = wp.from_pretrained(transformers.LlamaModel, path, config=folder, quantization_config=GGUF)
    with pytest.raises(ConfigError, match=r'holds "output.weight", \d+ bytes that the model has no place for'):
        wp.save_pretrained(model, tmp_path / "new.gguf")


def test_copies_of_a_model_remember_the_file(llama, tmp_path):
    import copy

    transformers, folder, path = llama
    model = copy.deepcopy(load_llama(transformers, path, config=folder))
    wp.save_pretrained(model, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


# Packed here.


def test_a_packed_language_model_gets_the_names_of_its_architecture(peer, tmp_path):
    transformers = peer("transformers")
    for name in ("llama3", "gemma3"):
        folder = language.make_model(tmp_path / name, name)
        config = wp.GGUFQuantizationConfig(quant_type="q8_0")
        model = wp.from_pretrained(
            transformers.AutoModelForCausalLM, folder, quantization_config=config, torch_dtype="float32"
        )
        path = tmp_path / f"{name}.gguf"
        wp.save_pretrained(model, path)
        wp.convert(folder, tmp_path / "converted.gguf", "q8_0", overwrite=True)
        ours, theirs = wp.gguf.open(path), wp.gguf.open(tmp_path / "converted.gguf")
        assert sorted(ours.tensors) == sorted(theirs.tensors)
        for key in theirs.metadata:
            if key not in ("general.name", "weightpack.source_dtype"):
                assert ours.metadata.type(key) == theirs.metadata.type(key)
                assert np.array_equal(ours.metadata[key], theirs.metadata[key]), key
        for tensor, row in ours.tensors.items():
            if row.type == "Q8_0":
                assert np.array_equal(ours.raw(tensor), theirs.raw(tensor)), tensor
        again = load_llama(transformers, path)
        assert torch.equal(logits(again), logits(model))
        wp.save_pretrained(again, tmp_path / "twice.gguf", overwrite=True)
        assert (tmp_path / "twice.gguf").read_bytes() == path.read_bytes()


def test_a_language_model_whose_tokenizer_is_not_known(peer, tmp_path):
    transformers = peer("transformers")
    folder = language.make_model(tmp_path / "llama", "llama2")
    model = wp.from_pretrained(
        transformers.AutoModelForCausalLM, folder, quantization_config=wp.GGUFQuantizationConfig(quant_type="q8_0")
    )
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="holds the tokenizer, and the model does not know the folder"):
        wp.save_pretrained(model, tmp_path / "new.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_packed_diffusion_model(peer, tmp_path):
    diffusers = peer("diffusers")
    for name in ("flux", "sd3"):
        source = make_diffusion(name, diffusers)
        source.save_pretrained(tmp_path / name)
        config = wp.GGUFQuantizationConfig(quant_type="q8_0")
        model = wp.from_pretrained(type(source), tmp_path / name, quantization_config=config)
        path = tmp_path / f"{name}.gguf"
        wp.save_pretrained(model, path)
        assert wp.gguf.open(path).architecture == name
        again = wp.from_pretrained(type(source), path, config=tmp_path / name, quantization_config=GGUF)
        assert torch.equal(output(again, name), output(model, name))


def test_a_model_without_an_architecture_keeps_its_names(tmp_path):
    net = make_net(width=256)
    folder = nets.save(tmp_path / "net", net, width=256)
    model = Net.from_pretrained(folder, quantization_config=wp.GGUFQuantizationConfig(quant_type="q4_k"))
    model.save_pretrained(tmp_path / "net.gguf")
    wp.convert(folder, tmp_path / "converted.gguf", "q4_k", arch="none")
    ours, theirs = wp.gguf.open(tmp_path / "net.gguf"), wp.gguf.open(tmp_path / "converted.gguf")
    assert sorted(ours.tensors) == sorted(net.state_dict()) == sorted(theirs.tensors)
    assert ours.metadata["general.architecture"] == theirs.metadata["general.architecture"]
    for name in ("blocks.0.up.weight", "blocks.1.down.weight", "head.weight"):
        assert np.array_equal(ours.raw(name), theirs.raw(name)), name
    again = Net.from_pretrained(tmp_path / "net.gguf", config={"width": 256}, quantization_config=GGUF)
    with torch.no_grad():
        assert torch.equal(again(nets.TOKENS), model(nets.TOKENS))


# A folder.


@pytest.mark.parametrize("size", ["5GB", "100KB", 1])
def test_a_folder_is_loaded_again(llama, tmp_path, size):
    transformers, folder, path = llama
    model = load_llama(transformers, path, "bfloat16", config=folder)
    expected = logits(model)
    wp.save_pretrained(model, tmp_path / "saved", max_shard_size=size)
    told = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert told["quant_type"] is None
    assert told["stored_types"]["model.layers.*.self_attn.q_proj"] == "Q4_K"
    with wp.gguf.open(path) as file:
        kinds = {row.type for row in file.tensors.values()} - {"F32"}
    assert set(told["stored_types"].values()) == kinds
    again = wp.from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "saved", torch_dtype="bfloat16")
    assert storage(again) == storage(model)
    assert torch.equal(logits(again), expected)
    wp.save_pretrained(again, tmp_path / "twice", max_shard_size=size)
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "saved").iterdir()} == {
        entry.name: entry.read_bytes() for entry in (tmp_path / "twice").iterdir()
    }


def test_a_folder_of_a_diffusion_model(peer, tmp_path):
    diffusers = peer("diffusers")
    source = make_diffusion("flux", diffusers)
    source.save_pretrained(tmp_path / "flux")
    wp.convert(tmp_path / "flux", tmp_path / "flux.gguf", "q8_0")
    model = wp.from_pretrained(type(source), tmp_path / "flux.gguf", config=tmp_path / "flux", quantization_config=GGUF)
    wp.save_pretrained(model, tmp_path / "saved", max_shard_size="50KB")
    again = wp.from_pretrained(type(source), tmp_path / "saved")
    assert storage(again) == storage(model)
    assert torch.equal(output(again, "flux"), output(model, "flux"))
    # The file is forgotten, and its names are known.
    wp.save_pretrained(again, tmp_path / "anew.gguf")
    once = wp.from_pretrained(type(source), tmp_path / "anew.gguf", config=tmp_path / "flux", quantization_config=GGUF)
    assert storage(once) == storage(model)


@pytest.fixture
def kernels(tmp_path):
    """A net with flattened kernels, and its folder."""
    path = packed_file(tmp_path / "net.gguf", make_net(), "Q5_0")
    model = Net.from_pretrained(path, quantization_config=GGUF)
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def test_shapes_of_kernels_are_in_the_folder(kernels, tmp_path):
    model, folder = kernels
    told = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert told["stored_shapes"] == {"conv": [64, 64, 3]}
    again = Net.from_pretrained(folder)
    assert storage(again) == storage(model)
    with torch.no_grad():
        assert torch.equal(again(nets.TOKENS), model(nets.TOKENS))
    again.save_pretrained(tmp_path / "anew.gguf")
    once = Net.from_pretrained(tmp_path / "anew.gguf", quantization_config=GGUF)
    assert storage(once) == storage(model)


@pytest.mark.parametrize("mmap", [False, True])
def test_what_a_folder_is_loaded_with(kernels, mmap):
    model, folder = kernels
    config = wp.GGUFQuantizationConfig(compute_dtype="bfloat16", modules_to_not_convert=["up"])
    again = Net.from_pretrained(folder, quantization_config=config, torch_dtype="bfloat16", mmap=mmap)
    assert type(again.blocks[0].up) is torch.nn.Linear
    assert torch.equal(again.blocks[0].up.weight, model.blocks[0].up.weight.dequantize(torch.bfloat16))
    assert again.blocks[0].down.compute_dtype == torch.bfloat16
    assert torch.equal(again.blocks[0].down.weight, model.blocks[0].down.weight)


def test_torchs_own_files_and_state_dicts(kernels, tmp_path):
    model, folder = kernels
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert storage(Net.from_pretrained(tmp_path / "pickled")) == storage(model)
    state = load_file(folder / "model.safetensors")
    assert storage(Net.from_pretrained(folder, state_dict=state)) == storage(model)


def test_a_folder_without_header_metadata(kernels):
    model, folder = kernels
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() is None
    assert storage(Net.from_pretrained(folder)) == storage(model)


def test_a_config_that_does_not_fit_its_weights(kernels):
    _, folder = kernels
    config = json.loads((folder / "config.json").read_text())

    def told(**fields):
        new = {**config, "quantization_config": {**config["quantization_config"], **fields}}
        (folder / "config.json").write_text(json.dumps(new))
        return Net.from_pretrained(folder)

    with pytest.raises(CheckpointError, match=r'"embed.weight" is U8 \[50, 44\], and config.json says .* Q8_0'):
        told(stored_types={**config["quantization_config"]["stored_types"], "embed": "Q8_0"})
    with pytest.raises(CheckpointError, match=r"holds 12288 weights, and config\.json says"):
        told(stored_shapes={"conv": [64, 64, 2]})
    with pytest.raises(ConfigError, match="'Q9' is no type of blocks"):
        told(stored_types={"embed": "Q9"})
    with pytest.raises(ConfigError, match="quant_type would pack them"):
        told(quant_type="q8_0")
    with pytest.raises(CheckpointError, match=r"has shape \[64, 88\] in the checkpoint"):
        told(stored_types={"embed": "Q5_0"})


def test_decoded_models_are_plain_ones(llama, tmp_path):
    transformers, folder, path = llama
    model = load_llama(transformers, path, config=folder)
    expected = logits(model)
    plain = model.dequantize()
    wp.save_pretrained(plain, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert torch.equal(logits(again), expected)


# Refusals, and other readers.


def test_refusals_touch_nothing(llama, tmp_path, peer):
    transformers, folder, path = llama
    model = load_llama(transformers, path, config=folder)
    whole = path.read_bytes()
    with pytest.raises(ConfigError, match="is there"):
        wp.save_pretrained(model, path)
    (tmp_path / "place.gguf").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        wp.save_pretrained(model, tmp_path / "place.gguf", overwrite=True)
    with pytest.raises(ConfigError, match="has no variant"):
        wp.save_pretrained(model, tmp_path / "new.gguf", variant="fp16")
    with pytest.raises(OSError, match=r"llama\.gguf"):
        wp.save_pretrained(model, path / "new.gguf")
    with pytest.raises(ValueError, match="not serializable"):
        # What transformers would write by itself lacks the types.
        model.save_pretrained(tmp_path / "new")

    def stop(*progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wp.save_pretrained(model, path, overwrite=True, on_progress=stop)
    assert path.read_bytes() == whole
    model.model.norm.to("meta")
    with pytest.raises(FormatError, match="not in memory"):
        wp.save_pretrained(model, tmp_path / "new.gguf")
    peer("bitsandbytes")
    other = wp.from_pretrained(
        transformers.AutoModelForCausalLM, folder, quantization_config=wp.BitsAndBytesConfig(load_in_4bit=True)
    )
    with pytest.raises(ConfigError, match="bitsandbytes_4bit weights are no GGUF blocks"):
        wp.save_pretrained(other, tmp_path / "new.gguf")
    assert not list(tmp_path.glob("new*"))


def test_a_tensor_that_has_no_place_in_the_architecture(peer, tmp_path):
    transformers = peer("transformers")
    folder = language.make_model(tmp_path / "llama", "llama2")
    model = wp.from_pretrained(
        transformers.AutoModelForCausalLM, folder, quantization_config=wp.GGUFQuantizationConfig(quant_type="q8_0")
    )
    model.model.more = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(UnsupportedError, match=r'no place for tensor "model\.more"'):
        wp.save_pretrained(model, tmp_path / "new.gguf")
    assert not (tmp_path / "new.gguf").exists()


def test_the_reference_reader(llama, tmp_path, peer):
    gguf = peer("gguf")
    transformers, folder, path = llama
    model = load_llama(transformers, path, "bfloat16", config=folder)
    wp.save_pretrained(model, tmp_path / "again.gguf")
    theirs, ours = gguf.GGUFReader(path), gguf.GGUFReader(tmp_path / "again.gguf")
    assert list(ours.fields) == list(theirs.fields)
    for key, field in theirs.fields.items():
        assert ours.fields[key].contents() == field.contents()
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert one.tensor_type == other.tensor_type
        assert np.array_equal(one.data, other.data)


def test_diffusers_reads_a_saved_file(peer, tmp_path):
    diffusers = peer("diffusers")
    peer("gguf")
    # diffusers takes the reference names of FLUX.1 at its full width only.
    for name, arch in (("flux", "none"), ("sd3", None)):
        source = make_diffusion(name, diffusers, **({"num_attention_heads": 8} if name == "flux" else {}))
        folder, path = tmp_path / name, tmp_path / f"{name}.gguf"
        source.save_pretrained(folder)
        wp.convert(folder, path, "q4_k", arch=arch)
        model = wp.from_pretrained(type(source), path, config=folder, quantization_config=GGUF)
        wp.save_pretrained(model, tmp_path / "again.gguf", overwrite=True)
        found = []
        for file in (path, tmp_path / "again.gguf"):
            theirs = type(source).from_single_file(
                str(file), config=str(folder), torch_dtype=torch.float32,
                quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
            )  # fmt: skip
            found.append(output(theirs, name))
        assert torch.equal(*found)


def test_a_unet_with_packed_kernels(peer, tmp_path):
    diffusers = peer("diffusers")
    source = tiny_diffusers.make("unet", diffusers)
    source.save_pretrained(tmp_path / "model")
    tensors, types, metadata = {}, {}, {"general.architecture": "sd1"}
    for key, value in source.state_dict().items():
        array, types[key] = value.numpy(), "F32"
        if array.ndim > 1 and array.size % 256 == 0:
            metadata[f"comfy.gguf.orig_shape.{key}"] = np.array(array.shape, np.int32)
            array, types[key] = array.reshape(-1, 256), "Q5_K"
        tensors[key] = array
    path = tmp_path / "unet.gguf"
    wp.gguf.write(path, tensors, metadata, types=types)
    model = wp.from_pretrained(type(source), path, config=tmp_path / "model", quantization_config=GGUF)
    wp.save_pretrained(model, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()
    wp.save_pretrained(model, tmp_path / "saved")
    again = wp.from_pretrained(type(source), tmp_path / "saved")
    assert torch.equal(tiny_diffusers.run("unet", again), tiny_diffusers.run("unet", model))


@pytest.mark.llama
@pytest.mark.parametrize("packed_here", [False, True])
def test_llama_cpp_computes_the_same(llama, tmp_path, packed_here, peer):
    from tests.oracles.test_language import logits_of

    llama_cpp = peer("llama_cpp")
    transformers, folder, path = llama
    if packed_here:
        wp.convert(folder, path, "q8_0", overwrite=True)
        source, config = folder, wp.GGUFQuantizationConfig(quant_type="q8_0", modules_to_not_convert=[])
    else:
        source, config = path, GGUF
    model = wp.from_pretrained(
        transformers.AutoModelForCausalLM, source, config=folder, quantization_config=config, torch_dtype="float32"
    )
    logits(model)
    wp.save_pretrained(model, tmp_path / "again.gguf")
    ours, theirs = logits_of(llama_cpp, tmp_path / "again.gguf"), logits_of(llama_cpp, Path(path))
    if not packed_here:
        assert np.array_equal(ours, theirs)
    else:
        # The embedding and the output layer are not packed here.
        assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)


def test_a_text_encoder_with_layers_in_float32(peer, tmp_path):
    from tests.integrations.test_transformers_gguf_names import SIZES, stored

    transformers = peer("transformers")
    source = transformers.T5EncoderModel(transformers.T5Config(**SIZES)).eval()
    source.save_pretrained(tmp_path / "model")
    tensors = {name: value.numpy() for name, value in stored(peer, source, "T5ENCODER").items()}
    types = {name: "Q8_0" for name, array in tensors.items() if array.ndim == 2 and array.shape[-1] % 32 == 0}
    path = tmp_path / "t5.gguf"
    wp.gguf.write(path, tensors, {"general.architecture": "t5encoder"}, types=types)
    model = wp.from_pretrained(
        type(source), path, config=tmp_path / "model", quantization_config=GGUF, torch_dtype="bfloat16"
    )
    wp.save_pretrained(model, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_layers_on_the_disk(llama, tmp_path):
    transformers, folder, path = llama
    pytest.importorskip("accelerate")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load_llama(transformers, path, config=folder, device_map=places, offload_folder=tmp_path / "disk")
    wp.save_pretrained(model, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()
