"""Models of diffusers, packed or not, saved and loaded again."""

from __future__ import annotations

import json

import pytest

from tests.conftest import find_peer

torch = find_peer("torch")

import weightpack as wp  # noqa: E402
from tests.integrations import tiny_diffusers as tiny  # noqa: E402
from tests.quantizers.test_contract import storage  # noqa: E402
from weightpack.errors import ConfigError  # noqa: E402

from .diffusers_models import BACKENDS, RUNS_ON_A_GPU, dtype_of, files_of, load, sources  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
FAMILIES = ("plain", "double quant", "int8", "quanto int4", "torchao int8", "modelopt FP8")
SIZES = {"unet": "200KB", "flux": "60KB", "pixart": "60KB", "sd3": "60KB"}
CELLS = [
    *((backend, "dit") for backend in BACKENDS),
    *((backend, name) for name in ("flux", "sd3", "pixart", "unet", "vae") for backend in FAMILIES),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sources(tmp_path_factory)


@pytest.mark.parametrize(("backend", "name"), CELLS)
def test_what_is_saved_comes_back_and_is_saved_again_alike(source, tmp_path, backend, name):
    model = load(source, backend, name)
    before, config = storage(model), dict(model.config)
    if backend not in RUNS_ON_A_GPU:
        wanted = tiny.run(name, model)
    wp.save_pretrained(model, tmp_path / "saved", max_shard_size=SIZES.get(name, "30KB"))
    assert storage(model) == before
    assert {key: id(value) for key, value in model.config.items()} == {key: id(value) for key, value in config.items()}
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    again = wp.from_pretrained(type(model), tmp_path / "saved", torch_dtype=dtype_of(backend))
    assert storage(again) == before
    if backend not in RUNS_ON_A_GPU:
        assert torch.equal(tiny.run(name, again), wanted)
    wp.save_pretrained(again, tmp_path / "twice", max_shard_size=SIZES.get(name, "30KB"))
    assert files_of(tmp_path / "twice") == files_of(tmp_path / "saved")


@pytest.mark.parametrize("backend", ["plain", "nf4", "int8", "quanto int4", "quanto float8", "torchao int8"])
def test_layers_kept_in_float32_stay_there(source, tmp_path, backend):
    """Wan keeps some of its layers in float32; quanto in diffusers packs them all the same."""
    needs, make = BACKENDS[backend]
    if needs is not None:
        find_peer(needs)
    cls, folder = source("wan")
    model = wp.from_pretrained(cls, folder, quantization_config=make(), torch_dtype=torch.bfloat16)
    assert model.condition_embedder.time_embedder.linear_1.bias.dtype == torch.float32
    assert model.condition_embedder.text_embedder.linear_1.bias.dtype == torch.bfloat16
    wanted = tiny.run("wan", model)
    wp.save_pretrained(model, tmp_path / "saved", max_shard_size="100KB")
    again = wp.from_pretrained(cls, tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert storage(again) == storage(model)
    assert torch.equal(tiny.run("wan", again), wanted)


@pytest.mark.parametrize("backend", ["plain", "nf4", "quanto int8", "torchao float8", "modelopt NVFP4"])
def test_configs_tell_all_and_no_more(source, tmp_path, backend):
    diffusers = find_peer("diffusers")
    model = load(source, backend, "dit")
    model.register_to_config(later_addition={"a": 1}, _name_or_path=str(tmp_path))
    wp.save_pretrained(model, tmp_path / "saved")
    assert model.config["_name_or_path"] == str(tmp_path)
    text = (tmp_path / "saved" / "config.json").read_text()
    config = json.loads(text)
    assert list(config) == sorted(config)
    assert str(tmp_path) not in text
    assert {key for key in config if key.startswith("_")} == {"_class_name", "_diffusers_version"}
    assert config["_class_name"] == "DiTTransformer2DModel"
    assert config["_diffusers_version"] == diffusers.__version__
    assert config["later_addition"] == {"a": 1}
    assert config.items() >= tiny.CONFIGS["dit"][1].items()
    section = config.get("quantization_config")
    quantizer = wp.quantizer_of(model)
    assert (section is None) == (quantizer is None)
    if section is not None:
        assert section == json.loads(json.dumps(quantizer.config.to_dict()))
        assert not [key for key in section if key.startswith("_")]
    again = wp.from_pretrained(type(model), tmp_path / "saved", torch_dtype=dtype_of(backend))
    assert again.config["later_addition"] == {"a": 1}


def test_the_place_a_model_came_from_is_told_where_it_is_a_repository(source, tmp_path, monkeypatch):
    cls, folder = source("dit")
    model = cls.from_pretrained(folder)
    assert str(model.config["_name_or_path"]) == str(folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "folder").mkdir(parents=True)
    for name, kept in ((None, False), ("owner/model", True), ("some/folder", False), ("./model", False)):
        if name is not None:
            model.register_to_config(_name_or_path=name)
        wp.save_pretrained(model, tmp_path / "saved", overwrite=True)
        saved = json.loads((tmp_path / "saved" / "config.json").read_text())
        assert saved.get("_name_or_path") == (name if kept else None)


def test_a_config_that_is_no_json_is_refused(source, tmp_path):
    model = load(source, "plain", "dit")
    model.register_to_config(strange=object())
    with pytest.raises(ConfigError, match="DiTTransformer2DModel is no JSON"):
        wp.save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("backend", ["nf4", "int8", "torchao int8"])
@pytest.mark.parametrize("by", ["the host", "the quantizer"])
def test_decoded_models_are_plain_ones(source, tmp_path, backend, by):
    model = load(source, backend, "dit")
    wanted = tiny.run("dit", model.dequantize()) if by == "the host" else None
    if wanted is None:
        wp.quantizer_of(model).dequantize(model)
        wanted = tiny.run("dit", model)
    wp.save_pretrained(model, tmp_path / "saved")
    if by == "the host":
        assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = wp.from_pretrained(type(model), tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert torch.equal(tiny.run("dit", again), wanted)
    if by == "the host":
        again, info = type(model).from_pretrained(
            tmp_path / "saved", torch_dtype=torch.bfloat16, output_loading_info=True
        )
        assert not any(info.values())
        assert storage(again) == storage(model)


def test_memory_of_any_order(source, tmp_path):
    cls, folder = source("vae")
    model = cls.from_pretrained(folder, torch_dtype=torch.bfloat16)
    wp.save_pretrained(model, tmp_path / "rows")
    model = model.to(memory_format=torch.channels_last)
    assert not model.decoder.conv_in.weight.is_contiguous()
    wp.save_pretrained(model, tmp_path / "channels")
    assert files_of(tmp_path / "channels") == files_of(tmp_path / "rows")


def test_weights_that_layers_share_are_stored_for_each(tmp_path):
    """diffusers ties nothing when it loads, and refuses to save such a model."""
    diffusers = find_peer("diffusers")

    class Shared(diffusers.ModelMixin, diffusers.ConfigMixin):
        config_name = "config.json"

        @find_peer("diffusers.configuration_utils").register_to_config
        def __init__(self, width: int = 64):
            super().__init__()
            self.first = torch.nn.Linear(width, width, bias=False)
            self.second = torch.nn.Linear(width, width, bias=False)
            self.second.weight = self.first.weight
            self.register_buffer("window", self.first.weight.detach()[4:8])

    model = Shared()
    with pytest.raises(RuntimeError, match="share memory"):
        model.save_pretrained(tmp_path / "refused")
    wp.save_pretrained(model, tmp_path / "saved")
    for again in (Shared.from_pretrained(tmp_path / "saved"), wp.from_pretrained(Shared, tmp_path / "saved")):
        assert storage(again) == storage(model)


def test_models_that_diffusers_packed_are_left_to_it(source, tmp_path):
    diffusers = find_peer("diffusers")
    find_peer("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    cls, folder = source("dit")
    config = diffusers.TorchAoConfig(Int8WeightOnlyConfig(version=2))
    model = cls.from_pretrained(folder, quantization_config=config, torch_dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="diffusers packed this model by itself"):
        wp.save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_layers_that_no_list_can_name_are_told_of(source, tmp_path):
    """diffusers knows quanto's layers by their last name alone."""
    find_peer("optimum.quanto")
    cls, folder = source("dit")
    config = wp.QuantoConfig("int8", modules_to_not_convert=["transformer_blocks.0.attn1.to_q"])
    model = wp.from_pretrained(cls, folder, quantization_config=config, torch_dtype=torch.float32)
    found = model
    for number in range(2):
        with pytest.warns(UserWarning, match=r"takes transformer_blocks\.1\.attn1\.to_q for one of them"):
            wp.save_pretrained(found, tmp_path / str(number))
        found = wp.from_pretrained(cls, tmp_path / str(number), torch_dtype=torch.float32)
        assert storage(found) == storage(model)
