"""torchao's configs as JSON, as short names and as objects."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from weightpack.errors import ConfigError
from weightpack.quantizers import torchao_forms as forms


@pytest.fixture
def quantization(peer):
    peer("torchao")
    return peer("torchao.quantization")


@pytest.mark.parametrize("name", forms.SHORT_NAMES)
def test_each_short_name_is_a_config_that_torchao_builds_and_writes_back(peer, name):
    peer("torchao")
    form = forms.form_of_name(name)
    built = forms.build(form)
    assert forms.is_config(built)
    assert type(built).__name__ == form["_type"]
    written = forms.form_of(built)
    assert written["_version"] == form["_version"]
    assert {key: written["_data"][key] for key in form["_data"]} == form["_data"]
    assert forms.form_of(forms.build(json.loads(json.dumps(written)))) == written


def test_a_form_given_out_is_no_part_of_the_table():
    forms.form_of_name("int4")["_data"]["group_size"] = 1
    assert forms.form_of_name("int4")["_data"]["group_size"] == 128


def test_an_unknown_name_lists_those_that_there_are():
    with pytest.raises(ConfigError, match=r"'int8wo' is none of int8, int8_dynamic, float8"):
        forms.form_of_name("int8wo")


@pytest.mark.parametrize("section", [{"a": 1}, {"default": 3}, {"default": {}, "x": {}}, {"_type": "A"}])
def test_a_section_that_is_no_config_is_an_error(section):
    with pytest.raises(ConfigError, match="quant_type"):
        forms.form_of_section(section)


def test_a_form_that_torchao_does_not_know_is_an_error(peer):
    peer("torchao")
    with pytest.raises(ConfigError, match="NothingConfig"):
        forms.build({"_type": "NothingConfig", "_version": 1, "_data": {}})
    with pytest.raises(ConfigError, match="does not make a Int8WeightOnlyConfig"):
        forms.build({"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"wrong": 1}})


def test_an_object_that_json_cannot_hold_is_an_error(quantization):
    import torch

    config = quantization.Int8WeightOnlyConfig()
    config.extra = torch.zeros(2)
    with pytest.raises(ConfigError, match="Int8WeightOnlyConfig cannot be written to"):
        forms.form_of(config)


def test_the_config_of_a_parameter_is_the_most_exact_one(quantization):
    made = {name: quantization.Int8WeightOnlyConfig() for name in "abcd"}
    config = quantization.FqnToConfig(
        {
            "x.one.weight": made["a"],
            "x.one": made["b"],
            "re:x\\.two\\..*": made["c"],
            "re:x\\..*": made["d"],
            "y": None,
        }
    )
    assert forms.assigned(config, "x.one.weight") is made["a"]
    assert forms.assigned(config, "x.one.bias") is made["b"]
    assert forms.assigned(config, "x.two.weight") is made["c"]
    assert forms.assigned(config, "x.three.weight") is made["d"]
    assert forms.assigned(config, "y.weight") is None
    assert forms.assigned(config, "z.weight") is None
    assert forms.assigned(made["a"], "z.weight") is made["a"]
    assert list(forms.configs_in(config)) == [made[name] for name in "abcd"]
    assert forms.names_parameter(config, "x.one.weight")
    assert forms.names_parameter(config, "x.two.scale")
    assert not forms.names_parameter(config, "y")
    assert not forms.names_parameter(config, "z.scale")
    assert not forms.names_parameter(made["a"], "x.one.weight")
    form = forms.form_of(config)
    assert forms.named_exactly(form) == ["x.one.weight", "x.one"]
    assert len(list(forms.forms_in(form))) == 4


def test_what_is_known_of_each_kind(quantization):
    def known(config):
        form = forms.form_of(config)
        return forms.passes_gradients(form), forms.is_saved(form)

    assert known(quantization.Int8WeightOnlyConfig()) == (True, True)
    assert known(quantization.Int8DynamicActivationInt8WeightConfig()) == (False, True)
    assert known(quantization.Int4WeightOnlyConfig(int4_packing_format="preshuffled")) == (False, False)
    assert known(quantization.Int4WeightOnlyConfig()) == (False, True)
    assert known(quantization.Float8DynamicActivationInt4WeightConfig()) == (False, False)
    both = {"a": quantization.Int8WeightOnlyConfig(), "b": quantization.Int8DynamicActivationInt8WeightConfig()}
    assert known(quantization.FqnToConfig(both)) == (False, True)


def test_configs_need_neither_torch_nor_torchao():
    code = """
import sys, weightpack as wp
config = wp.TorchAoConfig("int8", modules_to_not_convert=["a"])
assert wp.TorchAoConfig.from_dict(config.to_dict()) == config
wp.AutoQuantizer.from_config(config)
print(sorted({"torch", "torchao", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
