"""The registry, the choice from a config, and a backend of somebody else's."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings
from typing import ClassVar

import pytest

import weightpack as wp
from weightpack.errors import BackendError, ConfigError
from weightpack.quantizers import auto
from weightpack.quantizers.base import Requirement, check_version
from weightpack.quantizers.config import QuantizationConfig, flag, names_of, one_of

METHODS = "bitsandbytes, gguf, quanto, torchao, modelopt"


@dataclasses.dataclass(frozen=True)
class RoundConfig(QuantizationConfig):
    """Rounds weights to a number of decimals."""

    quant_method: ClassVar[str] = "rounding"
    ALIASES: ClassVar[dict[str, str]] = {"digits": "decimals"}
    IGNORED: ClassVar[frozenset[str]] = frozenset({"made_by"})

    decimals: int = 1
    modules_to_not_convert: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        self._set("modules_to_not_convert", names_of(self.modules_to_not_convert, "modules_to_not_convert"))


class RoundQuantizer(wp.Quantizer):
    """Stores weights as whole numbers of tenths, or what the config says."""

    name = "rounding"
    is_serializable = True

    def component_of(self, key):
        """`weight_tenths` is the only component."""
        return (key.removesuffix("_tenths"), "tenths") if key.endswith("weight_tenths") else None

    def replace_layer(self, path, module):
        """The layer stays, its weight is rounded."""
        return module

    def create_quantized_param(self, model, name, value, *, device, dtype=None):
        """Rounds, or takes what is stored."""
        import torch

        from weightpack.quantizers.modules import set_parameter

        scale = 10**self.config.decimals
        stored = value["tenths"] if isinstance(value, dict) else torch.round(value * scale)
        weight = (stored.float() / scale).to(dtype or torch.float32)
        set_parameter(model, name, torch.nn.Parameter(weight, requires_grad=False))


@pytest.fixture
def rounding():
    """The backend, registered for one test."""
    wp.register_quantizer("rounding", RoundQuantizer, RoundConfig)
    yield
    auto.unregister_quantizer("rounding")


def test_six_backends_are_there_and_need_no_torch():
    assert auto.quantizer_names() == [
        "bitsandbytes_4bit", "bitsandbytes_8bit", "gguf", "quanto", "torchao", "modelopt"
    ]  # fmt: skip
    code = (
        "import sys\nfrom weightpack.quantizers import auto\n"
        "for name in auto.quantizer_names():\n"
        "    auto.config_class(name); auto.quantizer_class(name)\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["bitsandbytes_4bit", "bitsandbytes_8bit", "gguf", "quanto", "torchao", "modelopt"])
def test_every_row_leads_to_its_classes(name):
    assert issubclass(auto.quantizer_class(name), wp.Quantizer)
    assert auto.quantizer_class(name).name == name
    assert issubclass(auto.config_class(name), QuantizationConfig)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"quant_method": "nf9"}, f'quantization method "nf9" is none of {METHODS}'),
        ({}, f"the quantization config has no quant_method, expected one of {METHODS}"),
        ({"load_in_4bit": False, "load_in_8bit": False}, "has no quant_method"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": True}, "load_in"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}, "no field"),
    ],
)
def test_what_is_unknown_is_a_value_error(fields, told):
    with pytest.raises(ValueError, match=told):
        wp.AutoQuantizer.from_dict(fields)
    with pytest.raises(ValueError, match=told):
        wp.AutoQuantizer.from_config(fields)


def test_what_is_no_config_is_refused():
    with pytest.raises(ConfigError, match="int is not a quantization config"):
        wp.AutoQuantizer.from_config(4)


def test_bitsandbytes_without_a_method_is_known_by_its_flags():
    four = wp.AutoQuantizer.from_config({"load_in_4bit": True})
    eight = wp.AutoQuantizer.from_config({"load_in_8bit": True}, pre_quantized=False)
    assert (four.name, four.pre_quantized) == ("bitsandbytes_4bit", True)
    assert (eight.name, eight.pre_quantized) == ("bitsandbytes_8bit", False)


def test_the_config_of_a_folder(tmp_path):
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "config.json").write_text(json.dumps({"quantization_config": section}))
    found = wp.AutoQuantizer.from_pretrained(tmp_path, subfolder="inner")
    assert found == wp.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": section}}))
    assert wp.AutoQuantizer.from_pretrained(tmp_path) == found
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="the model is not quantized"):
        wp.AutoQuantizer.from_pretrained(tmp_path)


def test_the_models_own_config_wins_with_a_warning():
    own = wp.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    other = wp.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wp.AutoQuantizer.merge_quantization_configs(own.to_dict(), None) == own
        assert wp.AutoQuantizer.merge_quantization_configs(own, own) == own
    with pytest.warns(UserWarning, match="its own quantization config is used"):
        assert wp.AutoQuantizer.merge_quantization_configs(own, other) == own
    with pytest.raises(ConfigError, match="packed for bitsandbytes, and quantization_config is for gguf"):
        wp.AutoQuantizer.merge_quantization_configs(own, {"quant_method": "gguf"})


@pytest.mark.parametrize("host", ["transformers", "diffusers"])
def test_configs_of_hosts_are_taken(peer, host):
    torch, library = peer("torch"), peer(host)
    given = library.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    listed = given.llm_int8_skip_modules
    found = wp.AutoQuantizer.as_config(given)
    assert found == wp.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="bfloat16",
        llm_int8_skip_modules=["lm_head"],
    )
    assert given.llm_int8_skip_modules is listed == ["lm_head"]


def test_a_config_goes_to_json_and_back(tmp_path):
    config = RoundConfig(decimals=2, modules_to_not_convert=["head"])
    assert config.to_dict() == {"decimals": 2, "modules_to_not_convert": ["head"], "quant_method": "rounding"}
    assert RoundConfig(decimals=2).to_diff_dict() == {"decimals": 2, "quant_method": "rounding"}
    assert json.loads(config.to_json_string()) == config.to_diff_dict()
    assert RoundConfig.from_dict(config.to_dict()) == config
    config.to_json_file(tmp_path / "q.json")
    assert RoundConfig.from_json_file(tmp_path / "q.json") == config


def test_a_config_reads_what_hosts_write():
    read = RoundConfig.from_dict({"digits": 3, "made_by": "x", "_private": 1, "quant_method": "rounding"})
    assert read == RoundConfig(decimals=3)
    with pytest.raises(ConfigError, match='RoundConfig has no field "decimal"\nhint: did you mean decimals'):
        RoundConfig.from_dict({"decimal": 3})
    with pytest.raises(ConfigError, match="contradicts"):
        RoundConfig.from_dict({"digits": 3, "decimals": 2})
    assert RoundConfig.from_dict({"digits": 3}, decimals=1) == RoundConfig()
    config, left = RoundConfig.from_dict({}, return_unused_kwargs=True, decimals=4, other=5)
    assert (config.decimals, left) == (4, {"other": 5})
    with pytest.raises(ConfigError, match='no field "other"'):
        RoundConfig.from_dict({}, other=5)


def test_lists_of_the_caller_are_not_shared():
    names = ["head"]
    config = RoundConfig(modules_to_not_convert=names)
    names.append("more")
    config.to_dict()["modules_to_not_convert"].append("again")
    assert config.modules_to_not_convert == ("head",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.decimals = 3


def test_checks_of_fields():
    assert names_of("head", "f") == ("head",)
    with pytest.raises(ConfigError, match="does not hold names"):
        names_of([1], "f")
    with pytest.raises(ConfigError, match="'x' is none of a, b"):
        one_of("x", ["a", "b"], "f")
    with pytest.raises(ConfigError, match="neither True nor False"):
        flag(1, "f")


def test_a_backend_of_somebody_elses_loads(rounding, tmp_path):
    torch = pytest.importorskip("torch")
    from tests.loading import nets

    net = nets.make()
    folder = nets.save(tmp_path / "net", net)
    config = RoundConfig(modules_to_not_convert=["head"])
    model = wp.from_pretrained(nets.Net, folder, quantization_config=config)
    up = net.blocks[0].up.weight
    assert torch.equal(model.blocks[0].up.weight, torch.round(up * 10) / 10)
    assert torch.equal(model.head.weight, net.head.weight)
    assert model.config["quantization_config"] == config.to_dict()
    assert model.hf_quantizer.name == model.quantization_method == "rounding"

    # And the packed form, told by the config alone.
    state = {
        f"{name}_tenths" if name == "blocks.0.up.weight" else name: torch.round(value * 10).to(torch.int8)
        if name == "blocks.0.up.weight"
        else value
        for name, value in net.state_dict().items()
    }
    packed = nets.write(tmp_path / "packed", state, {"quantization_config": RoundConfig().to_dict()})
    again = wp.from_pretrained(nets.Net, packed)
    assert torch.equal(again.blocks[0].up.weight, model.blocks[0].up.weight)
    assert list(again.hf_quantizer.quantized) == ["blocks.0.up"]


def test_names_are_taken_once(rounding):
    with pytest.raises(ConfigError, match="is there already"):
        wp.register_quantizer("rounding", RoundQuantizer, RoundConfig)
    with pytest.raises(ConfigError, match="is there already"):
        wp.register_quantizer("gguf", RoundQuantizer, RoundConfig)
    with pytest.raises(ConfigError, match="not derived from Quantizer"):
        wp.register_quantizer("other", RoundConfig, RoundConfig)
    with pytest.raises(ConfigError, match="not derived from QuantizationConfig"):
        wp.register_quantizer("other", RoundQuantizer, RoundQuantizer)
    with pytest.raises(ConfigError, match="was not registered"):
        auto.unregister_quantizer("other")
    assert wp.AutoQuantizer.from_dict({"quant_method": "rounding"}) == RoundConfig()


def test_environments_name_what_is_missing():
    class Needy(RoundQuantizer):
        """Needs a package that nobody has."""

        requirements = (Requirement("no_such_package", "1.0", "round well"),)

    with pytest.raises(BackendError, match="no_such_package is needed to round well"):
        Needy(RoundConfig()).validate_environment()
    needed = Requirement("thing", "0.44", "pack")
    check_version(needed, "0.44.1+cpu")
    check_version(needed, "1.0")
    with pytest.raises(BackendError, match=r"thing 0\.9\.1 is too old to pack, expected 0\.44"):
        check_version(needed, "0.9.1")


def test_what_cannot_be_turned_back_says_so():
    with pytest.raises(BackendError, match="rounding weights are not turned back"):
        RoundQuantizer(RoundConfig()).dequantize(None)
