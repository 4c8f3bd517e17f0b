"""What stands in the files of a saved transformers model: names and shapes, ties, configs."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings

import pytest

from tests.conftest import find_peer

torch = find_peer("torch")
transformers = find_peer("transformers")

import weightpack as wp  # noqa: E402
from tests.quantizers.test_contract import storage  # noqa: E402
from tests.saving.transformers_models import MODELS, PACKED, make, outputs, same_bits, stored  # noqa: E402
from weightpack.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def class_of(name):
    return getattr(transformers, MODELS[name][0])


def pack(tmp_path, name, how, source=None, **options):
    """A model packed by weightpack, of a random one or of the folder `source`."""
    needs, config = PACKED[how]
    if needs is not None:
        find_peer(needs)
    if source is None:
        source = tmp_path / "source"
        make(name).save_pretrained(source)
    chosen = dataclasses.replace(config(), **options) if options else config()
    return wp.from_pretrained(class_of(name), source, quantization_config=chosen, torch_dtype=torch.bfloat16)


@pytest.mark.parametrize("name", MODELS)
def test_plain_models_are_stored_as_transformers_stores_them(tmp_path, name):
    model = make(name)
    wp.save_pretrained(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert same_files(tmp_path / "ours", tmp_path / "theirs")
    loaded = class_of(name).from_pretrained(tmp_path / "theirs", dtype="auto")
    wp.save_pretrained(loaded, tmp_path / "ours again")
    loaded.save_pretrained(tmp_path / "theirs again")
    assert same_files(tmp_path / "ours again", tmp_path / "theirs again")


def same_files(ours, theirs):
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for path in ours.glob("*.json"):
        assert path.read_text() == (theirs / path.name).read_text()
    return same_bits(stored(ours)[0], stored(theirs)[0])


@pytest.mark.parametrize(("name", "how"), [("mixtral", "nf4"), ("qwen2_moe", "torchao int8"), ("gpt_neox", "int8")])
def test_what_is_not_packed_has_its_place_in_the_original_checkpoint(tmp_path, name, how):
    model = pack(tmp_path, name, how)
    wp.save_pretrained(model, tmp_path / "saved")
    original, saved = stored(tmp_path / "source")[0], stored(tmp_path / "saved")[0]
    plain = {key for key, tensor in original.items() if key in saved and saved[key].dtype == tensor.dtype}
    assert same_bits({key: saved[key] for key in plain}, {key: original[key] for key in plain})
    packed = {f"{path}.weight" for path in wp.quantizer_of(model).quantized}
    assert packed == original.keys() - plain


def test_pieces_of_merged_tensors_are_not_copied(tmp_path):
    from weightpack.saving.parts import part_of

    model = make("mixtral")
    places = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    tensors = part_of(model).tensors
    assert len(tensors) == 41
    assert all(one.tensor.untyped_storage().data_ptr() in places for one in tensors)


@pytest.fixture
def fused(monkeypatch, tmp_path):
    """A class whose checkpoints hold query, key and value as one tensor, and a model of it."""
    loading, mapping = find_peer("transformers.core_model_loading"), find_peer("transformers.conversion_mapping")
    model = make("bert").bert
    mapping.get_model_conversion_mapping(model)
    parts = [f"attention.self.{name}.weight" for name in ("query", "key", "value")]
    one = loading.WeightConverter("attention.self.qkv.weight", parts, [loading.Chunk(dim=0)])
    monkeypatch.setitem(mapping._checkpoint_conversion_mapping_cache, "BertModel", [one])
    return model


def test_tensors_that_must_be_put_together_are_when_they_are_written(fused, tmp_path):
    from weightpack.saving.parts import part_of
    from weightpack.stored import Computed

    made = [one for one in part_of(fused).tensors if isinstance(one.tensor, Computed)]
    assert [one.name for one in made] == [f"encoder.layer.{i}.attention.self.qkv.weight" for i in (0, 1)]
    wp.save_pretrained(fused, tmp_path / "ours", max_shard_size="100KB")
    wp.save_pretrained(fused, tmp_path / "pickled", safe_serialization=False)
    fused.save_pretrained(tmp_path / "theirs")
    ours = stored(tmp_path / "ours")[0]
    assert same_bits(ours, stored(tmp_path / "theirs")[0])
    assert same_bits(ours, torch.load(tmp_path / "pickled/pytorch_model.bin", weights_only=True))
    again = wp.from_pretrained(transformers.BertModel, tmp_path / "ours")
    assert same_bits(again.state_dict(), fused.state_dict())


@pytest.mark.parametrize("kept", [(), ("key",)])
def test_packed_weights_stay_apart_where_the_checkpoint_has_one_tensor(fused, tmp_path, kept):
    find_peer("bitsandbytes")
    fused.save_pretrained(tmp_path / "source")
    config = wp.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=kept)
    packed = wp.from_pretrained(
        transformers.BertModel, tmp_path / "source", quantization_config=config, torch_dtype=torch.bfloat16
    )
    wp.save_pretrained(packed, tmp_path / "saved")
    saved = stored(tmp_path / "saved")[0]
    path = "encoder.layer.0.attention.self"
    assert f"{path}.query.weight.absmax" in saved
    assert (f"{path}.key.weight.absmax" in saved) == (not kept)
    assert f"{path}.qkv.weight" not in saved
    if kept:
        assert same_bits({"": saved[f"{path}.key.weight"]}, {"": fused.get_parameter(f"{path}.key.weight").detach()})
    assert storage(wp.from_pretrained(transformers.BertModel, tmp_path / "saved")) == storage(packed)
    theirs, told = transformers.BertModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(told.values())
    assert same_bits(theirs.state_dict(), packed.state_dict())


@pytest.mark.parametrize("kept", [("k_proj",), ("o_proj", "model.layers.1")])
@pytest.mark.parametrize("how", ["nf4", "int8", "torchao int8"])
def test_layers_that_were_kept_are_kept_by_transformers_too(tmp_path, how, kept):
    """A list of one's own replaces transformers' defaults: what is saved names the output layer as well."""
    key = "modules_to_not_convert" if how.startswith("torchao") else "llm_int8_skip_modules"
    model = pack(tmp_path, "llama", how, **{key: kept})
    wp.save_pretrained(model, tmp_path / "saved")
    section = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    assert {"lm_head", "model.layers.1.self_attn.k_proj"} <= set(section[key])
    theirs, told = class_of("llama").from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(told.values())
    assert storage(theirs) == storage(model)
    again = wp.from_pretrained(class_of("llama"), tmp_path / "saved")
    wp.save_pretrained(again, tmp_path / "twice")
    assert (tmp_path / "twice/config.json").read_text() == (tmp_path / "saved/config.json").read_text()


def test_a_list_that_says_the_same_to_both_stays_as_it_is(tmp_path):
    model = pack(tmp_path, "bert", "nf4", llm_int8_skip_modules=("dense",))
    wp.save_pretrained(model, tmp_path / "saved")
    section = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    assert section["llm_int8_skip_modules"] == ["dense"]


@pytest.mark.parametrize("how", ["plain", "nf4", "torchao int8"])
def test_tied_weights_are_stored_once_under_the_name_that_transformers_keeps(tmp_path, how):
    model = pack(tmp_path, "llama tied", how)
    wp.save_pretrained(model, tmp_path / "saved", max_shard_size=1)
    saved = stored(tmp_path / "saved")[0]
    assert "model.embed_tokens.weight" in saved
    assert not any(key.startswith("lm_head") for key in saved)
    again = wp.from_pretrained(class_of("llama tied"), tmp_path / "saved")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_tied_weights_that_were_parted_and_differ_are_both_stored(tmp_path):
    model = make("llama tied")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 2)
    wp.save_pretrained(model, tmp_path / "saved")
    again = wp.from_pretrained(class_of("llama tied"), tmp_path / "saved")
    assert same_bits(again.state_dict(), model.state_dict())
    theirs = class_of("llama tied").from_pretrained(tmp_path / "saved", dtype="auto")
    assert same_bits(theirs.state_dict(), model.state_dict())


def test_what_shares_memory_without_being_tied_is_stored_under_each_name(tmp_path):
    model = make("llama")
    first, second = model.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    whole = torch.randn(256, 128).bfloat16()
    first.self_attn.o_proj.weight = torch.nn.Parameter(whole[:128])
    second.self_attn.o_proj.weight = torch.nn.Parameter(whole[64:192])
    first.mlp.down_proj.weight = torch.nn.Parameter(torch.randn(256, 128).bfloat16().t())
    second.mlp.down_proj.weight = torch.nn.Parameter(torch.randn(128, 512).bfloat16()[:, ::2])
    wp.save_pretrained(model, tmp_path / "saved")
    again = class_of("llama").from_pretrained(tmp_path / "saved", dtype="auto")
    assert same_bits(again.state_dict(), model.state_dict())


def test_what_the_class_does_not_save_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(class_of("llama"), "_keys_to_ignore_on_save", ["model.norm.weight"])
    wp.save_pretrained(make("llama"), tmp_path / "saved")
    assert "model.norm.weight" not in stored(tmp_path / "saved")[0]


def test_the_config_says_all_and_no_more(tmp_path):
    model = pack(tmp_path, "t5", "nf4")
    before = copy.deepcopy(vars(model.config)), model.generation_config.to_dict()
    wp.save_pretrained(model, tmp_path / "saved")
    assert (vars(model.config), model.generation_config.to_dict()) == before
    text = (tmp_path / "saved/config.json").read_text()
    config = json.loads(text)
    assert str(tmp_path) not in text
    assert not {"_name_or_path", "_pre_quantization_dtype", "_is_quantized", "_commit_hash"} & config.keys()
    assert config["architectures"] == ["T5ForConditionalGeneration"]
    assert config["dtype"] == "bfloat16"
    model.save_pretrained(tmp_path / "theirs", save_original_format=False)
    theirs = json.loads((tmp_path / "theirs/config.json").read_text())
    section = theirs.pop("quantization_config")
    assert {key: value for key, value in section.items() if not key.startswith("_")} == config.pop(
        "quantization_config"
    )
    assert theirs == config
    names = ["generation_config.json", "config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == sorted(names)
    assert (tmp_path / "saved" / names[0]).read_text() == (tmp_path / "theirs" / names[0]).read_text()


@pytest.mark.parametrize("how", ["nf4", "int8", "quanto int4", "torchao float8", "modelopt INT8"])
def test_a_model_that_was_turned_back_is_saved_plain(tmp_path, how):
    plain = pack(tmp_path, "mixtral", how)
    plain.dequantize()
    wp.save_pretrained(plain, tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    assert stored(tmp_path / "saved")[0].keys() == stored(tmp_path / "source")[0].keys()
    again, told = class_of("mixtral").from_pretrained(tmp_path / "saved", output_loading_info=True, dtype="auto")
    assert not any(told.values())
    assert torch.equal(outputs(again), outputs(plain))


def test_adapters_are_refused(tmp_path):
    model = make("llama")
    model._hf_peft_config_loaded = True
    with pytest.raises(ConfigError, match="LlamaForCausalLM has adapters on it, which are not saved here"):
        wp.save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("how", ["quanto int8", "modelopt FP8"])
def test_one_is_told_what_transformers_alone_would_do(tmp_path, how):
    model = pack(tmp_path, "llama", how)
    with pytest.warns(UserWarning, match="transformers by itself .*: what is saved loads with weightpack"):
        wp.save_pretrained(model, tmp_path / "saved")
    if how == "modelopt FP8":
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            wp.save_pretrained(model, tmp_path / "export", form="unified")


def test_a_config_that_is_no_json_is_refused(tmp_path):
    model = make("llama")
    model.config.something = object()
    with pytest.raises(ConfigError, match="the config of LlamaForCausalLM is no JSON"):
        wp.save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
