"""Names and headers of the files of saved diffusers models: those that diffusers writes."""

from __future__ import annotations

import copy
import json

import pytest

from tests.conftest import find_peer

torch = find_peer("torch")

import weightpack as wp  # noqa: E402
from tests.integrations import tiny_diffusers as tiny  # noqa: E402
from tests.quantizers.test_contract import storage  # noqa: E402

from .diffusers_models import BACKENDS, dtype_of, files_of, load, sources  # noqa: E402

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


@pytest.mark.parametrize("backend", ["plain", "int8", "quanto int4", "torchao float8"])
@pytest.mark.parametrize(("size", "variant"), [("5GB", None), ("40KB", "fp16")])
def test_torchs_own_files_are_those_that_diffusers_reads(peer, monkeypatch, source, tmp_path, backend, size, variant):
    model = load(source, backend, "dit")
    wp.save_pretrained(model, tmp_path, safe_serialization=False, max_shard_size=size, variant=variant)
    names = {path.name for path in tmp_path.iterdir()} - {"config.json"}
    if size == "5GB":
        assert names == {"diffusion_pytorch_model.bin"}
    else:
        assert "diffusion_pytorch_model.bin.index.fp16.json" in names
        assert f"diffusion_pytorch_model.fp16-00001-of-{len(names) - 1:05d}.bin" in names
    if backend == "int8":
        tiny.lift_gpu_check(peer, monkeypatch)
    dtype = dtype_of(backend)
    theirs = type(model).from_pretrained(tmp_path, torch_dtype=dtype, variant=variant, use_safetensors=False)
    tiny.assert_same_state(model, theirs)
    again = wp.from_pretrained(type(model), tmp_path, torch_dtype=dtype, variant=variant)
    assert storage(again) == storage(model)


@pytest.mark.parametrize("backend", ["nf4", "torchao int8"])
def test_models_that_diffusers_packs_through_weightpack(source, tmp_path, backend):
    """With diffusers' own config, which has private keys and changes the lists it is given."""
    diffusers = find_peer("diffusers")
    find_peer(BACKENDS[backend][0])
    cls, folder = source("dit")
    if backend == "nf4":
        made = [
            kind(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["proj_out_1"])
            for kind in (diffusers.BitsAndBytesConfig, wp.BitsAndBytesConfig)
        ]
    else:
        from torchao.quantization import Int8WeightOnlyConfig

        made = [diffusers.TorchAoConfig(Int8WeightOnlyConfig(version=2)), wp.TorchAoConfig("int8")]
    wp.integrations.diffusers.register()
    try:
        theirs = cls.from_pretrained(folder, quantization_config=made[0], torch_dtype=torch.bfloat16)
    finally:
        wp.integrations.diffusers.unregister()
    ours = wp.from_pretrained(cls, folder, quantization_config=made[1], torch_dtype=torch.bfloat16)
    wp.save_pretrained(theirs, tmp_path / "theirs")
    wp.save_pretrained(ours, tmp_path / "ours")
    found, wanted = files_of(tmp_path / "theirs"), files_of(tmp_path / "ours")
    sections = [json.loads(one.pop("config.json")).pop("quantization_config") for one in (found, wanted)]
    assert found == wanted
    assert not [key for key in sections[0] if key.startswith("_")]
    for key in ("quant_method", "llm_int8_skip_modules", "modules_to_not_convert"):
        assert sections[0].get(key) == sections[1].get(key)
