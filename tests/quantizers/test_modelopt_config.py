"""ModelOpt's config: its fields, its checks, its way to JSON and back, and the `quant_cfg` it stands for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import weightpack as wp
from weightpack.errors import ConfigError
from weightpack.quantizers.auto import AutoQuantizer

Config = wp.NVIDIAModelOptConfig


@pytest.mark.parametrize("kind", ["FP8", "INT8", "INT4", "NF4", "NVFP4", "FP8_FP8", "INT8_INT8", "NVFP4_FP8"])
def test_can_be_made_and_comes_back(kind):
    # diffusers 0.42.1 cannot make its own with ModelOpt 0.44 and later (NVIDIA/Model-Optimizer#2001).
    config = Config(kind, modules_to_not_convert=["proj", "re:^out"])
    for text in (config.to_json_string(), config.to_json_string(use_diff=False), json.dumps(config.to_dict())):
        assert AutoQuantizer.from_dict(json.loads(text)) == config
    assert config.to_dict()["quant_method"] == "modelopt"
    assert config.weight_only is ("_" not in kind)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"quant_type": "FP7"}, "FP7"),
        ({"quant_type": "FP8_FP7"}, "of activations 'FP7'"),
        ({"quant_type": "FP8_NF4"}, "NF4"),
        ({"quant_type": "FP8_INT8_INT8"}, "more parts"),
        ({"quant_type": None}, "not a name"),
        ({"quant_type": "FP8", "weight_only": False}, "names no type of activations"),
        ({"quant_type": "FP8", "weight_only": 1}, "neither True nor False"),
        ({"quant_type": "FP8", "block_quantize": 0}, "not a size"),
        ({"quant_type": "FP8", "block_quantize": "16"}, "not a size"),
        ({"quant_type": "FP8", "channel_quantize": True}, "not an axis"),
        ({"quant_type": "INT8", "scale_block_quantize": 8}, "means nothing for INT8"),
        ({"quant_type": "INT4", "channel_quantize": 0}, "along axis -1"),
        ({"quant_type": "NF4", "block_quantize": 15}, "odd"),
        ({"quant_type": "FP8", "algorithm": "awq_lite"}, "awq_lite"),
        ({"quant_type": "FP8", "forward_loop": 3}, "cannot be called"),
        ({"quant_type": "FP8", "modelopt_config": {"algorithm": "max"}}, "quant_cfg"),
        ({"quant_type": "FP8", "modelopt_config": {"quant_cfg": 3}}, "expected a list"),
        ({"quant_type": "FP8", "modelopt_config": {"quant_cfg": [3]}}, "not a mapping"),
        ({"quant_type": "FP8", "modelopt_config": {"quant_cfg": [{"quantizer_name": "*"}]}}, "neither"),
        ({"quant_type": "FP8", "modules_to_not_convert": [3]}, "names of modules"),
    ],
)
def test_what_makes_no_sense_is_an_error(fields, told):
    with pytest.raises(ConfigError, match=told):
        Config(**fields)


def test_unknown_fields_are_errors():
    with pytest.raises(ConfigError, match="block_quantise"):
        Config.from_dict({"quant_type": "FP8", "block_quantise": 8})


def test_a_forward_loop_is_not_written():
    config = Config("FP8_FP8", forward_loop=print)
    assert "forward_loop" not in config.to_dict()
    assert "forward_loop" not in json.loads(config.to_json_string())
    assert Config("FP8_FP8").with_loading_choices(config).forward_loop is print
    assert Config.from_dict({"quant_type": "FP8", "forward_loop": None}) == Config("FP8")


def test_lists_of_the_caller_stay_as_they_are():
    given = ["a"]
    entries = [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}}]
    Config("FP8", modules_to_not_convert=given, modelopt_config={"quant_cfg": entries})
    assert given == ["a"]
    assert entries == [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}}]


def test_a_modelopt_config_comes_back_from_json():
    cfg = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
    config = Config("NVFP4", modelopt_config={"quant_cfg": [{"quantizer_name": "*weight_quantizer", "cfg": cfg}]})
    again = Config.from_dict(json.loads(config.to_json_string()))
    assert again == config
    assert again.entries()[0]["cfg"] == cfg


OLD = {
    "quant_cfg": {
        "*weight_quantizer": {"fake_quant": False, "num_bits": [4, 3]},
        "*input_quantizer": {"enable": False},
        "nn.BatchNorm1d": {"*": {"enable": False}},
        "*lm_head*": {"enable": False},
        "default": {"enable": False},
    },
    "algorithm": {"method": "max"},
}
"""A config as diffusers wrote it with ModelOpt before 0.44: a mapping, whose default came last."""


def test_what_diffusers_wrote_is_read():
    written = {
        "quant_method": "modelopt",
        "quant_type": "FP8",
        "modules_to_not_convert": ["proj_out"],
        "weight_only": True,
        "channel_quantize": None,
        "block_quantize": None,
        "calib_cfg": {"method": "max"},
        "forward_loop": None,
        "scale_channel_quantize": None,
        "scale_block_quantize": None,
        "modelopt_config": OLD,
        "disable_conv_quantization": False,
    }
    config = AutoQuantizer.from_dict(written)
    assert config.modules_to_not_convert == ("proj_out",)
    entries = config.entries()
    # Otherwise the default, as the last, would switch everything off.
    assert entries[0] == {"quantizer_name": "*", "enable": False}
    assert entries[1]["cfg"]["num_bits"] == (4, 3)
    assert {"quantizer_name": "*", "parent_class": "nn.BatchNorm1d", "enable": False} in entries
    with pytest.raises(ConfigError, match="awq"):
        AutoQuantizer.from_dict({**written, "calib_cfg": {"method": "awq"}})


def test_quantizers_of_a_layer():
    from weightpack.quantizers.modelopt_entries import attributes

    entries = Config("FP8", modelopt_config=OLD).entries()
    linear = ["nn.Linear", "nn.Module"]
    assert attributes(entries, "a.b", "weight_quantizer", linear) == {"num_bits": (4, 3)}
    assert attributes(entries, "a.b", "input_quantizer", linear) is None
    assert attributes(entries, "a.b", "output_quantizer", linear) is None
    assert attributes(entries, "lm_head", "weight_quantizer", linear) is None
    assert attributes(entries, "lm_head", "weight_quantizer", linear, forced=True) == {"num_bits": (4, 3)}
    assert attributes(entries, "a", "weight_quantizer", ["nn.BatchNorm1d"]) is None
    with pytest.raises(ConfigError, match="2 quantizers in a row"):
        attributes([{"quantizer_name": "*", "cfg": [{}, {}]}], "a", "weight_quantizer", linear)


def test_a_section_of_an_export_leads_to_its_own_classes():
    from weightpack.quantizers import auto

    section = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    for config in (AutoQuantizer.from_dict(section), Config.from_dict(section)):
        assert type(config) is auto.config_class("modelopt_export")
        assert type(AutoQuantizer.from_config(config)) is auto.quantizer_class("modelopt_export")
    with pytest.warns(UserWarning, match="its own quantization config is used"):
        assert AutoQuantizer.merge_quantization_configs(section, Config("FP8")) == config


def test_making_one_loads_neither_torch_nor_modelopt():
    code = (
        "import sys, weightpack as wp\n"
        "config = wp.NVIDIAModelOptConfig('NF4', block_quantize=64)\n"
        "config.entries(), config.to_json_string(), wp.AutoQuantizer.from_config(config)\n"
        "print([name for name in ('torch', 'numpy', 'modelopt') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
