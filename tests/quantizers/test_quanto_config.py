"""QuantoConfig: one class for what both hosts write, and quanto's own map of layers."""

from __future__ import annotations

import json
import sys

import pytest

import weightpack as wp
from weightpack.errors import BackendError, CheckpointError, ConfigError, UnsupportedError
from weightpack.quantizers.base import Requirement, check_version

WEIGHTS = ("int8", "int4", "int2", "float8")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_it_round_trips(weights):
    config = wp.QuantoConfig(weights, modules_to_not_convert=["head"])
    fields = config.to_dict()
    assert fields == {
        "weights_dtype": weights,
        "weights": weights,
        "activations": None,
        "modules_to_not_convert": ["head"],
        "quant_method": "quanto",
    }
    assert wp.QuantoConfig.from_dict(json.loads(json.dumps(fields))) == config
    assert wp.AutoQuantizer.from_dict(fields) == config
    assert wp.AutoQuantizer.from_dict(json.loads(config.to_json_string())) == config


def test_names_of_both_hosts():
    assert wp.QuantoConfig(weights="int4") == wp.QuantoConfig(weights_dtype="int4") == wp.QuantoConfig("qint4")
    assert wp.QuantoConfig(weights="int4").weights == "int4"
    assert wp.QuantoConfig().weights_dtype == "int8"
    assert wp.QuantoConfig("qfloat8").weights_dtype == "float8"
    assert wp.QuantoConfig("int4").to_diff_dict() == {
        "weights_dtype": "int4",
        "weights": "int4",
        "quant_method": "quanto",
    }


@pytest.mark.parametrize("weights", WEIGHTS)
def test_hosts_and_we_read_each_other(peer, weights):
    config = wp.QuantoConfig(weights, modules_to_not_convert=["head"])
    for host in ("diffusers", "transformers"):
        theirs = peer(host).QuantoConfig.from_dict(config.to_dict())
        field = "weights_dtype" if host == "diffusers" else "weights"
        assert getattr(theirs, field) == weights, host
        assert list(theirs.modules_to_not_convert) == ["head"]
        # What they write, and their objects themselves.
        assert wp.AutoQuantizer.from_dict(theirs.to_dict()) == config, host
        assert wp.AutoQuantizer.as_config(theirs) == config, host


def test_what_transformers_writes_is_not_taken_for_int8(peer):
    # diffusers reads it as int8: it passes over keys that it does not know.
    written = peer("transformers").QuantoConfig(weights="int4").to_dict()
    assert "weights_dtype" not in written
    assert wp.QuantoConfig.from_dict(written).weights_dtype == "int4"


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"weights_dtype": "int3"}, ConfigError, "weights_dtype 'int3' is none of int8, int4, int2, float8"),
        ({"weights_dtype": "qfloat8_e5m2"}, ConfigError, "is none of"),
        ({"weights": "int4", "weights_dtype": "int8"}, ConfigError, "contradicts"),
        ({"activations": "int8"}, UnsupportedError, "need scales that are measured on data"),
        ({"activations": "int4"}, ConfigError, "activations 'int4' is none of int8, float8"),
        ({"modules_to_not_convert": [1]}, ConfigError, "does not hold names"),
    ],
)
def test_what_it_refuses(fields, error, told):
    with pytest.raises(error, match=told):
        wp.QuantoConfig(**fields)
    with pytest.raises(error):
        wp.QuantoConfig.from_dict(fields)


def test_an_unknown_key_is_named():
    with pytest.raises(ConfigError, match="did you mean weights_dtype"):
        wp.QuantoConfig.from_dict({"weight_dtype": "int4"})


def test_the_map_beside_the_weights(tmp_path):
    rows = {
        "a": {"weights": "qint4", "activations": "none"},
        "b": {"weights": "qint4", "activations": "none"},
        "c.d": {"weights": "qfloat8_e4m3fn", "activations": "none"},
        "norm": {"weights": "none", "activations": "none"},
    }
    (tmp_path / "quanto_qmap.json").write_text(json.dumps(rows))
    config = wp.AutoQuantizer.from_pretrained(tmp_path)
    assert config == wp.QuantoConfig("int4", quantization_map={"a": "int4", "b": "int4", "c.d": "float8"})
    assert wp.QuantoConfig.from_dict(config.to_dict()) == config
    # A section in config.json says more than the map.
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": wp.QuantoConfig("int2").to_dict()}))
    assert wp.AutoQuantizer.from_pretrained(tmp_path) == wp.QuantoConfig("int2")
    (tmp_path / "config.json").write_text("{}")
    assert wp.AutoQuantizer.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([], CheckpointError),
        ({}, CheckpointError),
        ({"a": "qint4"}, CheckpointError),
        ({"a": {"weights": "qint4", "activations": "qint8"}}, UnsupportedError),
        ({"a": {"weights": "qint7", "activations": "none"}}, ConfigError),
    ],
)
def test_a_map_that_is_not_one(tmp_path, rows, error):
    (tmp_path / "quanto_qmap.json").write_text(json.dumps(rows))
    with pytest.raises(error):
        wp.AutoQuantizer.from_pretrained(tmp_path)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    quantizer = wp.AutoQuantizer.from_config(wp.QuantoConfig(), pre_quantized=False)
    with pytest.raises(BackendError, match="optimum-quanto is needed to run quanto weights") as raised:
        quantizer.validate_environment()
    assert raised.value.hint == "pip install 'weightpack[quanto]'"


def test_an_old_library_is_named():
    with pytest.raises(BackendError, match=r"optimum-quanto 0\.2\.5 is too old") as raised:
        check_version(Requirement("optimum.quanto", "0.2.6", "run quanto weights"), "0.2.5")
    assert "optimum-quanto>=0.2.6" in str(raised.value.hint)
