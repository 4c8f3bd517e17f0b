"""A person's own modules, saved and loaded again."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402

import weightpack as wp  # noqa: E402
from tests.loading import nets  # noqa: E402
from tests.quantizers.test_contract import BACKENDS, storage  # noqa: E402
from weightpack.errors import ConfigError  # noqa: E402

WIDTH = 256
pytestmark = pytest.mark.filterwarnings("ignore")


def source(tmp_path, **options):
    net = nets.make(dtype=torch.bfloat16, width=WIDTH, **options)
    return net, nets.save(tmp_path / "net", net, width=WIDTH, **options)


@pytest.mark.parametrize("size", ["5GB", "100KB", 1])
def test_a_plain_module_goes_there_and_back(tmp_path, size):
    net, folder = source(tmp_path)
    model = nets.Net.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved", max_shard_size=size)
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    count = {"5GB": 1, "100KB": len(files), 1: len(net.state_dict())}[size]
    assert len(files) == count
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists() == (count > 1)
    again = nets.Net.from_pretrained(tmp_path / "saved")
    assert storage(again) == storage(model) == storage(net)
    with safe_open(tmp_path / "saved" / files[0], "pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("name", BACKENDS)
def test_packed_modules_come_back_bit_for_bit(tmp_path, peer, name):
    needs, make = BACKENDS[name]
    if needs is not None:
        peer(needs)
    _, folder = source(tmp_path)
    model = nets.Net.from_pretrained(folder, quantization_config=make(), torch_dtype="bfloat16")
    before = storage(model)
    with torch.no_grad():
        wanted = model(nets.TOKENS)
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    again = nets.Net.from_pretrained(tmp_path / "saved", torch_dtype="bfloat16")
    assert storage(again) == before
    with torch.no_grad():
        assert torch.equal(again(nets.TOKENS), wanted)
    again.save_pretrained(tmp_path / "twice", max_shard_size="50KB")
    for file in sorted((tmp_path / "saved").iterdir()):
        if file.suffix == ".json":
            assert json.loads(file.read_text()) == json.loads((tmp_path / "twice" / file.name).read_text())
    assert storage(nets.Net.from_pretrained(tmp_path / "twice", torch_dtype="bfloat16")) == before


def test_tied_weights_are_stored_once(tmp_path):
    _, folder = source(tmp_path, tied=True)
    model = nets.Net.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert "head.weight" not in file.keys()  # noqa: SIM118
    again = nets.Net.from_pretrained(tmp_path / "saved")
    assert again.head.weight is again.embed.weight


def test_what_is_there_stays_unless_asked(tmp_path):
    _, folder = source(tmp_path)
    model = nets.Net.from_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises((OSError, wp.WeightpackError)):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with torch.no_grad():
        model.scale.zero_()
    model.save_pretrained(folder, overwrite=True)
    assert torch.equal(nets.Net.from_pretrained(folder).scale, model.scale)


def test_refusals_touch_nothing(tmp_path):
    _, folder = source(tmp_path)
    packed = nets.Net.from_pretrained(folder, quantization_config=wp.GGUFQuantizationConfig(quant_type="q8_0"))
    wp.quantizer_of(packed).is_serializable = False
    with pytest.raises(ConfigError, match="gguf models cannot be saved"):
        packed.save_pretrained(tmp_path / "saved")
    model = nets.Net.from_pretrained(folder)
    with pytest.raises(ConfigError, match="max_shard_size is not a size"):
        model.save_pretrained(tmp_path / "saved", max_shard_size="5 potatoes")
    model.config = {"width": object()}
    with pytest.raises(ConfigError, match="is no JSON"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_arrays_must_fit_what_is_said_of_them():
    import numpy as np

    from weightpack import _rust

    data = np.zeros(8, np.uint8)
    made = _rust.Checkpoint.from_arrays("made", [("a", "F32", [2]), ("b", "U8", [0])], [data, data[:0]], 1)
    assert [tensor["name"] for tensor in json.loads(made.describe())["tensors"]] == ["a", "b"]
    out = np.ones(8, np.uint8)
    made.read("a", out, "F32", None)
    assert not out.any()
    for tensors, told in (
        ([("a", "F32", [3])], "expected 12 bytes, got 8"),
        ([("a", "F33", [2])], "unknown dtype"),
        ([], "1 arrays for 0 tensors"),
    ):
        with pytest.raises(ConfigError, match=told):
            _rust.Checkpoint.from_arrays("made", tensors, [data], 1)
    with pytest.raises(ConfigError, match="name appears twice"):
        _rust.Checkpoint.from_arrays("made", [("a", "U8", [8])] * 2, [data, data], 1)
