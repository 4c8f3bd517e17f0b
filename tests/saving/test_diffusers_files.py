"""Names and headers of the files of saved diffusers models: those that diffusers writes."""

from __future__ import annotations

import copy
import json

import pytest

from tests.conftest import find_peer

torch = find_peer("torch")

import weightpack as wp  # noqa: E402
from tests.quantizers.test_contract import storage  # noqa: E402

from .diffusers_models import files_of, load, sources  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sources(tmp_path_factory)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", ["10GB", "100KB", 1])
def test_plain_models_have_the_files_of_diffusers(source, tmp_path, size, variant):
    cls, folder = source("dit")
    model = cls.from_pretrained(folder, torch_dtype=torch.float16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size, variant=variant)
    wp.save_pretrained(model, tmp_path / "ours", max_shard_size=size, variant=variant)
    ours, theirs = files_of(tmp_path / "ours"), files_of(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, content in theirs.items():
        if name.endswith(".safetensors"):
            # In a file diffusers sorts by type and name; these lie in the model's order.
            assert ours[name][0] == content[0]
            assert {key: (one["dtype"], one["shape"]) for key, one in ours[name][1].items()} == {
                key: (one["dtype"], one["shape"]) for key, one in content[1].items()
            }
        elif name == "config.json":
            assert {"_name_or_path": str(folder), **json.loads(ours[name])} == json.loads(content)
        else:
            assert ours[name] == content
    assert storage(cls.from_pretrained(tmp_path / "ours", torch_dtype=torch.float16, variant=variant)) == storage(model)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize(("first", "second"), [(1, "10GB"), ("10GB", 1), (1, "100KB")])
def test_nothing_stays_of_what_was_there(source, tmp_path, first, second, variant):
    """diffusers leaves the index behind when one file takes the place of many, and then does not load."""
    cls, folder = source("dit")
    model = cls.from_pretrained(folder, torch_dtype=torch.float16)
    wp.save_pretrained(model, tmp_path / "saved", max_shard_size=first, variant=variant)
    model.save_pretrained(tmp_path / "saved", variant="other", max_shard_size="100KB")
    other = {name: text for name, text in files_of(tmp_path / "saved").items() if "other" in name}
    (tmp_path / "saved" / "README.md").write_text("mine")
    if variant is not None:
        old = "diffusion_pytorch_model.safetensors.fp16.index.json"
        (tmp_path / "saved" / old).write_text('{"weight_map": {}}')
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    wp.save_pretrained(model, tmp_path / "saved", max_shard_size=second, variant=variant, overwrite=True)
    wp.save_pretrained(model, tmp_path / "fresh", max_shard_size=second, variant=variant)
    assert files_of(tmp_path / "saved") == {
        **files_of(tmp_path / "fresh"),
        **other,
        "README.md": b"mine",
    }
    assert storage(cls.from_pretrained(tmp_path / "saved", torch_dtype=torch.float16, variant=variant)) == storage(
        model
    )
    assert len(other) > 3


def test_torchao_models_have_the_headers_and_bytes_of_diffusers(source, tmp_path):
    """diffusers packs and saves by itself, and weightpack does the same."""
    diffusers = find_peer("diffusers")
    find_peer("torchao")
    from safetensors import safe_open
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    cls, folder = source("dit")
    for number, kind in enumerate([Int8WeightOnlyConfig(version=2), Float8WeightOnlyConfig()]):
        theirs, ours = tmp_path / f"theirs {number}", tmp_path / f"ours {number}"
        config = diffusers.TorchAoConfig(copy.deepcopy(kind))
        cls.from_pretrained(folder, quantization_config=config, torch_dtype=torch.bfloat16).save_pretrained(
            theirs, max_shard_size="40KB"
        )
        config = wp.TorchAoConfig(copy.deepcopy(kind))
        model = wp.from_pretrained(cls, folder, quantization_config=config, torch_dtype=torch.bfloat16)
        wp.save_pretrained(model, ours, max_shard_size="40KB")
        found, wanted = files_of(ours), files_of(theirs)
        assert found.keys() == wanted.keys()
        for name in (name for name in wanted if name.endswith(".safetensors")):
            assert found[name][0] == wanted[name][0], name
            with safe_open(ours / name, "pt") as a, safe_open(theirs / name, "pt") as b:
                assert set(a.keys()) == set(b.keys())
                for key in b.keys():  # noqa: SIM118
                    assert torch.equal(a.get_tensor(key).view(torch.uint8), b.get_tensor(key).view(torch.uint8)), key
        index = "diffusion_pytorch_model.safetensors.index.json"
        assert found[index]["weight_map"] == wanted[index]["weight_map"]
        assert found[index]["metadata"]["total_size"] == wanted[index]["metadata"]["total_size"]
        section, other = (json.loads(one["config.json"])["quantization_config"] for one in (found, wanted))
        assert section["quant_type"] == other["quant_type"]


def test_torchao_arrays_are_not_copied_to_be_saved(source):
    model = load(source, "torchao int8", "dit")
    state, metadata = wp.quantizer_of(model).stored_state(model)
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    flat, described = flatten_tensor_state_dict(model.state_dict())
    assert state.keys() == flat.keys()
    assert metadata == described
    assert all(torch.equal(state[key], value) for key, value in flat.items())
    layer = model.transformer_blocks[0].attn1.to_q
    assert state["transformer_blocks.0.attn1.to_q._weight_qdata"].data_ptr() == layer.weight.qdata.data_ptr()


@pytest.mark.parametrize("backend", ["double quant", "int8", "quanto int4", "torchao float8", "modelopt NF4"])
def test_diffusers_own_saving_writes_the_same(source, tmp_path, backend):
    """Of a model that weightpack loaded, and of one that diffusers did with weightpack behind it."""
    find_peer("diffusers")
    model = load(source, backend, "dit")
    wp.save_pretrained(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    wp.save_pretrained(model, tmp_path / "after")
    assert files_of(tmp_path / "after") == files_of(tmp_path / "ours")
    wp.integrations.diffusers.register()
    try:
        together = type(model).from_pretrained(tmp_path / "ours", torch_dtype=model.dtype)
        together.save_pretrained(tmp_path / "registered")
    finally:
        wp.integrations.diffusers.unregister()
    wp.save_pretrained(together, tmp_path / "from registered")
    assert files_of(tmp_path / "from registered") == files_of(tmp_path / "ours")
    from safetensors import safe_open

    file = "diffusion_pytorch_model.safetensors"
    for other in ("theirs", "registered"):
        assert files_of(tmp_path / other)[file][0] == files_of(tmp_path / "ours")[file][0]
        with safe_open(tmp_path / "ours" / file, "pt") as a, safe_open(tmp_path / other / file, "pt") as b:
            assert set(a.keys()) == set(b.keys())
            for key in b.keys():  # noqa: SIM118
                found, wanted = a.get_tensor(key), b.get_tensor(key)
                assert found.dtype == wanted.dtype, key
                assert torch.equal(found.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)), key
