"""What stands beside the weights: configs and GGUF key-value pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weightpack import model_config
from weightpack.decision import Decision
from weightpack.entry import Entry, Part
from weightpack.errors import ConfigError, UnsupportedError

HERE = Path("models/one")


def weight(dtype: str = "BF16", name: str = "a.weight", shape: tuple[int, ...] = (64, 64)) -> Entry:
    return Entry(name, shape, dtype, dtype.lower(), 8192, 4096, (Part(name, dtype, shape, 8192),))


def packed(name: str, **params: object) -> Decision:
    return Decision(weight(), name, "linear layer", params)


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
@pytest.mark.parametrize(
    ("decision", "arguments"),
    [
        (packed("bitsandbytes:nf4"), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        (packed("bitsandbytes:fp4"), {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        (
            packed("bitsandbytes:nf4", double_quant=True),
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        ),
        (packed("bitsandbytes:int8"), {"load_in_8bit": True}),
    ],
)
def test_the_section_is_what_the_host_writes(peer, library, decision, arguments):
    peer("bitsandbytes")
    if "load_in_4bit" in arguments:
        arguments = {**arguments, "bnb_4bit_compute_dtype": "bfloat16"}
    config = peer(library).BitsAndBytesConfig(llm_int8_skip_modules=["lm_head"], **arguments)
    theirs = json.loads(json.dumps(config.to_dict()))
    ours = model_config.host_config([decision], ["lm_head"], "bfloat16").section
    assert ours == theirs
    assert list(ours) == sorted(ours)


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
@pytest.mark.parametrize(("form", "name"), [("int8", "Int8WeightOnlyConfig"), ("float8", "Float8WeightOnlyConfig")])
def test_the_section_of_torchao_is_what_the_host_writes(peer, library, form, name):
    config = peer(library).TorchAoConfig(getattr(peer("torchao.quantization"), name)())
    theirs = json.loads(json.dumps(config.to_dict(), sort_keys=True))
    ours = model_config.host_config([packed(f"torchao:{form}")], [], "bfloat16", library).section
    assert ours == theirs
    assert list(ours) == sorted(ours)


@pytest.mark.parametrize("form", ["int8", "float8"])
def test_the_section_of_quanto(peer, form):
    decisions = [packed(f"quanto:{form}")]
    ours = model_config.host_config(decisions, ["proj_out"], "bfloat16", "diffusers")
    with pytest.warns(FutureWarning, match="deprecated"):
        config = peer("diffusers").QuantoConfig(form, modules_to_not_convert=["proj_out"])
    assert ours.section == json.loads(json.dumps(config.to_dict()))
    assert not ours.texts
    ours = model_config.host_config(decisions, [], "bfloat16", "transformers")
    assert ours.section == json.loads(json.dumps(peer("transformers").QuantoConfig(form).to_dict()))
    (text,) = ours.texts.values()
    assert json.loads(text) == {"a": {"weights": f"q{'int8' if form == 'int8' else 'float8'}", "activations": "none"}}


def test_no_section_without_packed_weights():
    assert model_config.host_config([Decision(weight(), "copy", "kept")], [], "bfloat16") is None


@pytest.mark.parametrize(("dtype", "expected"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")])
def test_layers_compute_in_the_type_of_the_source(dtype, expected):
    assert model_config.compute_dtype(None, [weight(dtype)]) == expected
    assert model_config.compute_dtype("torch.float16", [weight(dtype)]) == "float16"
    assert model_config.compute_dtype("f32", [weight(dtype)]) == "float32"
    with pytest.raises(ConfigError, match='compute_dtype "int8"'):
        model_config.compute_dtype("int8", [])


def test_the_rest_of_a_config_stays():
    source = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "zz": [1, {"a": None}]}
    text = model_config.config_text(source, {"quant_method": "bitsandbytes"}, None, HERE)
    assert json.loads(text) == {**source, "quantization_config": {"quant_method": "bitsandbytes"}}
    assert list(json.loads(text)) == [*source, "quantization_config"]
    assert text.endswith("}\n")


def test_diffusers_configs_are_sorted():
    text = model_config.config_text({"b": 1, "_class_name": "X", "a": 2}, {"quant_method": "bitsandbytes"}, None, HERE)
    assert list(json.loads(text)) == ["_class_name", "a", "b", "quantization_config"]


def test_a_cast_changes_the_type_and_drops_the_section():
    source = {"torch_dtype": "float32", "quantization_config": {"quant_method": "bitsandbytes"}, "text_config": {}}
    source["text_config"] = {"dtype": "float32", "quantization_config": {"quant_method": "bitsandbytes"}}
    text = model_config.config_text(source, None, "bf16", HERE)
    assert json.loads(text) == {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}
    assert source["torch_dtype"] == "float32"
    assert source["text_config"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("name", "stays"),
    [("meta-llama/Llama-3.1-8B", True), ("gpt2", True), ("/models/llama", False), ("./model", False),
     ("C:\\models\\x", False), ("~/x", False), ("models/one/two", False), ("", False)],
)  # fmt: skip
def test_local_paths_do_not_get_out(name, stays):
    text = model_config.config_text({"_name_or_path": name}, None, None, HERE)
    assert ("_name_or_path" in json.loads(text)) is stays


@pytest.mark.parametrize("method", ["aqlm", "vptq", None])
def test_sources_packed_by_others_are_refused(method):
    with pytest.raises(UnsupportedError, match=f'packed by "{method}"'):
        model_config.source_method({"quantization_config": {"quant_method": method}})
    with pytest.raises(UnsupportedError):
        model_config.source_method({"text_config": {"quantization_config": {"quant_method": method}}})


def test_sources_packed_by_bitsandbytes():
    assert model_config.source_method({"quantization_config": {"quant_method": "bitsandbytes"}}) == "bitsandbytes"
    assert model_config.source_method({"quantization_config": {"load_in_4bit": True}}) == "bitsandbytes"
    assert model_config.source_method({"quantization_config": None}) is None
    assert model_config.source_method(None) is None
