"""Which components are packed, and how: what is understood and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

import weightpack as wp
from weightpack import PipelineQuantizationConfig
from weightpack.errors import ConfigError

MODELS = ["transformer", "text_encoder", "vae"]
NF4 = {"bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("backend", "kwargs", "expected"),
    [
        ("bitsandbytes_4bit", NF4, wp.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
        ("bitsandbytes_4bit", {"load_in_4bit": True}, wp.BitsAndBytesConfig(load_in_4bit=True)),
        ("bitsandbytes_8bit", {"llm_int8_threshold": 4}, wp.BitsAndBytesConfig(True, llm_int8_threshold=4.0)),
        ("gguf", {"quant_type": "q4_k"}, wp.GGUFQuantizationConfig(quant_type="q4_k")),
        ("quanto", {"weights_dtype": "int4"}, wp.QuantoConfig("int4")),
        ("quanto", {"weights": "int4"}, wp.QuantoConfig("int4")),
        ("modelopt", {"quant_type": "FP8"}, wp.NVIDIAModelOptConfig("FP8")),
    ],
)
def test_one_backend_for_several_components(backend, kwargs, expected):
    config = PipelineQuantizationConfig(backend, kwargs, ["transformer", "text_encoder"])
    assert config.configs(MODELS) == {"transformer": expected, "text_encoder": expected}
    assert PipelineQuantizationConfig(backend, kwargs, "vae").configs(MODELS) == {"vae": expected}


def test_torchao_by_a_short_name():
    config = PipelineQuantizationConfig("torchao", {"quant_type": "int8"}, "transformer").configs(MODELS)
    assert config["transformer"].to_dict() == wp.TorchAoConfig("int8").to_dict()


def test_what_is_packed_when_nothing_is_named():
    config = PipelineQuantizationConfig("quanto", {"weights_dtype": "int8"})
    assert config.named is None
    assert set(config.configs(MODELS, spared={"vae"})) == {"transformer", "text_encoder"}
    named = PipelineQuantizationConfig("quanto", {"weights_dtype": "int8"}, MODELS)
    assert set(named.configs(MODELS, spared={"vae"})) == set(MODELS)


def test_a_mapping_takes_configs_of_any_kind(peer):
    transformers, diffusers = peer("transformers"), peer("diffusers")
    mapping = {
        "transformer": wp.QuantoConfig("int4"),
        "text_encoder": transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "vae": {"quant_method": "quanto", "weights_dtype": "int8"},
    }
    expected = {
        "transformer": wp.QuantoConfig("int4"),
        "text_encoder": wp.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "vae": wp.QuantoConfig("int8"),
    }
    assert PipelineQuantizationConfig(quant_mapping=mapping).configs(MODELS) == expected
    theirs = diffusers.PipelineQuantizationConfig(quant_mapping={"text_encoder": mapping["text_encoder"]})
    assert PipelineQuantizationConfig.from_host(theirs).configs(MODELS) == {"text_encoder": expected["text_encoder"]}
    peer("bitsandbytes")
    theirs = diffusers.PipelineQuantizationConfig("bitsandbytes_8bit", {"load_in_8bit": True}, "transformer")
    assert PipelineQuantizationConfig.from_host(theirs).configs(MODELS) == {
        "transformer": wp.BitsAndBytesConfig(load_in_8bit=True)
    }


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "neither given"),
        ({"quant_mapping": {}}, "neither given"),
        ({"quant_backend": "quanto", "quant_mapping": {"vae": wp.QuantoConfig()}}, "both given"),
        ({"quant_backend": "quanto"}, "comes without quant_kwargs"),
        ({"quant_backend": "quanto", "quant_kwargs": {}}, "comes without quant_kwargs"),
        ({"quant_backend": "quanta", "quant_kwargs": {"a": 1}}, '"quanta" is none of bitsandbytes_4bit'),
        ({"quant_backend": "quanto", "quant_kwargs": {"weight_dtype": "int8"}}, "did you mean weights_dtype"),
        ({"quant_backend": "quanto", "quant_kwargs": {"weights_dtype": "int3"}}, "int3"),
        ({"quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"load_in_8bit": True}}, "both set"),
        (
            {"quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"load_in_4bit": False, "load_in_8bit": True}},
            "quant_kwargs say bitsandbytes_8bit",
        ),
        (
            {"quant_backend": "quanto", "quant_kwargs": {"weights_dtype": "int8"}, "components_to_quantize": []},
            "not name",
        ),
        ({"quant_mapping": {"vae": wp.QuantoConfig()}, "components_to_quantize": ["vae"]}, "belongs to quant_backend"),
        ({"quant_mapping": {"vae": 4}}, "vae: int is not a quantization config"),
        ({"quant_mapping": {"vae": {"quant_method": "quanto", "wieghts": "int8"}}}, 'vae: .* no field "wieghts"'),
        ({"quant_mapping": [("vae", wp.QuantoConfig())]}, "expected a dictionary"),
    ],
)
def test_what_is_refused(given, told):
    with pytest.raises(ConfigError, match=told):
        PipelineQuantizationConfig(**given)


def test_unknown_components_are_an_error():
    for config in (
        PipelineQuantizationConfig("quanto", {"weights_dtype": "int8"}, "transfomer"),
        PipelineQuantizationConfig(quant_mapping={"transfomer": wp.QuantoConfig()}),
    ):
        with pytest.raises(ConfigError, match=r'"transfomer".*\n.*did you mean transformer.*text_encoder, vae'):
            config.configs(MODELS)
    with pytest.raises(ConfigError, match=r"is a QuantoConfig, expected a PipelineQuantizationConfig\n.*quant_mapping"):
        PipelineQuantizationConfig.from_host(wp.QuantoConfig())


def test_configs_need_neither_torch_nor_a_host():
    code = (
        "import sys, weightpack as wp\n"
        "wp.PipelineQuantizationConfig('quanto', {'weights_dtype': 'int8'}).configs(['unet'])\n"
        "wp.PipelineQuantizationConfig(quant_mapping={'unet': wp.TorchAoConfig('int8')})\n"
        "assert not {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_examples_hold():
    import doctest

    from weightpack.pipelines import config

    done = doctest.testmod(config)
    assert done.attempted
    assert not done.failed
