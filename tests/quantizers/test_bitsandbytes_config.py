"""The config of bitsandbytes: fields, checks, and what the hosts write."""

from __future__ import annotations

import json
import math

import pytest

import weightpack as wp
from weightpack.quantizers.auto import AutoQuantizer

FIELDS = {
    "load_in_8bit": False,
    "load_in_4bit": True,
    "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": None,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_quant_storage": "uint8",
    "quant_method": "bitsandbytes",
}


def test_defaults_are_those_of_the_hosts():
    assert wp.BitsAndBytesConfig(load_in_4bit=True).to_dict() == FIELDS


@pytest.mark.parametrize("host", ["transformers", "diffusers"])
def test_the_hosts_have_the_same_fields_and_read_what_is_written(peer, host):
    theirs = peer(host).BitsAndBytesConfig
    ours = wp.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"], bnb_4bit_compute_dtype="bf16"
    )
    written = theirs.from_dict(ours.to_dict()).to_dict()
    assert {key: value for key, value in written.items() if not key.startswith("_")} == ours.to_dict()
    assert wp.BitsAndBytesConfig.from_dict(written) == ours
    assert AutoQuantizer.as_config(theirs(load_in_8bit=True)) == wp.BitsAndBytesConfig(load_in_8bit=True)


def test_a_host_s_config_object_is_read(peer):
    torch = peer("torch")
    theirs = peer("transformers").BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=torch.float16
    )
    config = AutoQuantizer.as_config(theirs)
    assert (config.bnb_4bit_compute_dtype, config.bnb_4bit_quant_storage) == ("bfloat16", "float16")


def test_round_trip_through_json():
    config = wp.BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_threshold=4, llm_int8_skip_modules=["a", "b"], llm_int8_has_fp16_weight=True
    )
    assert config.llm_int8_threshold == 4.0
    assert isinstance(config.llm_int8_threshold, float)
    assert wp.BitsAndBytesConfig.from_dict(json.loads(config.to_json_string())) == config
    assert config.to_diff_dict() == {
        "load_in_8bit": True,
        "llm_int8_threshold": 4.0,
        "llm_int8_skip_modules": ["a", "b"],
        "llm_int8_has_fp16_weight": True,
        "quant_method": "bitsandbytes",
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "load_in_4bit and load_in_8bit are neither set, expected one of them"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "are both set"),
        ({"load_in_4bit": 1}, "load_in_4bit 1 is neither True nor False"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type 'nf5' is none of fp4, nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "int16"}, "bnb_4bit_quant_storage 'int16' is none of"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": 3}, "bnb_4bit_quant_storage 3 is not an element type"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}, "bnb_4bit_compute_dtype 'int8' is none of"),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": None}, "bnb_4bit_use_double_quant None is neither"),
        ({"load_in_8bit": True, "llm_int8_threshold": "6"}, "llm_int8_threshold '6' is not a number"),
        ({"load_in_8bit": True, "llm_int8_threshold": True}, "llm_int8_threshold True is not a number"),
        ({"load_in_8bit": True, "llm_int8_threshold": -1}, "llm_int8_threshold -1 is not a number from 0 on"),
        ({"load_in_8bit": True, "llm_int8_threshold": math.nan}, "llm_int8_threshold nan"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": [1]}, "llm_int8_skip_modules"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(wp.ConfigError) as caught:
        wp.BitsAndBytesConfig(**fields)
    assert message in str(caught.value)


def test_dtype_objects_are_checked_like_names(peer):
    torch = peer("torch")
    config = wp.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)
    assert config.bnb_4bit_quant_storage == "bfloat16"
    with pytest.raises(wp.ConfigError, match="int16"):
        wp.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.int16)


def test_the_list_of_the_caller_is_not_kept():
    skipped = ["lm_head"]
    config = wp.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    skipped.append("other")
    assert config.skip_list == ("lm_head",)


@pytest.mark.parametrize(
    ("fields", "quantizer", "method"),
    [
        ({"load_in_4bit": True}, "bitsandbytes_4bit", "fp4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes_4bit", "nf4"),
        ({"load_in_8bit": True}, "bitsandbytes_8bit", "llm_int8"),
    ],
)
def test_one_config_leads_to_two_quantizers(fields, quantizer, method):
    config = wp.BitsAndBytesConfig(**fields)
    assert (config.quantizer_name, config.quantization_method()) == (quantizer, method)
    assert config.is_quantizable()
    made = AutoQuantizer.from_dict(fields)
    assert made == config
    assert AutoQuantizer.from_config(fields, pre_quantized=False).name == quantizer


def test_what_a_caller_may_choose_for_a_packed_model():
    packed = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"}
    given = wp.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    kept = AutoQuantizer.merge_quantization_configs(packed, given)
    assert (kept.bnb_4bit_compute_dtype, kept.bnb_4bit_quant_type) == ("bfloat16", "nf4")
    with pytest.warns(UserWarning, match="its own quantization config is used"):
        kept = AutoQuantizer.merge_quantization_configs(packed, wp.BitsAndBytesConfig(load_in_4bit=True))
    assert kept.bnb_4bit_quant_type == "nf4"
