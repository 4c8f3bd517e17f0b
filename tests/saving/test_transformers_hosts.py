"""Transformers models that were trained, or packed in transformers' own hands: saved by weightpack."""

from __future__ import annotations

import json

import pytest

from tests.conftest import find_peer

torch = find_peer("torch")
transformers = find_peer("transformers")

import weightpack as wp  # noqa: E402
from tests.quantizers.test_contract import storage  # noqa: E402
from tests.saving.transformers_models import MODELS, PACKED, make, outputs, same_bits, stored  # noqa: E402
from weightpack.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = 128
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def sentences(seed):
    """Rows of tokens, and whether the first one is from the upper half."""
    tokens = torch.randint(2, 128, (ROWS, 8), generator=torch.Generator().manual_seed(seed))
    return tokens, (tokens[:, 0] >= 64).long()


def hits(model):
    """How many of other rows it tells apart."""
    tokens, labels = sentences(1)
    with torch.no_grad():
        return int((model(input_ids=tokens).logits.argmax(1) == labels).sum())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a BERT that has learned to tell sentences apart."""
    model = make("bert", torch.float32)
    step = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for number in range(40):
        tokens, labels = sentences(2 + number)
        step.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        step.step()
    assert hits(model) > 0.95 * ROWS
    folder = tmp_path_factory.mktemp("trained") / "bert"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", PACKED)
def test_a_trained_model_knows_what_it_knew(trained, tmp_path, how):
    needs, config = PACKED[how]
    if needs is not None:
        find_peer(needs)
    kind = transformers.BertForSequenceClassification
    model = wp.from_pretrained(kind, trained, quantization_config=config(), torch_dtype=torch.float32)
    found = hits(model)
    assert found > 0.9 * ROWS
    wp.save_pretrained(model, tmp_path / "saved", max_shard_size="100KB")
    again = wp.from_pretrained(kind, tmp_path / "saved")
    assert hits(again) == found
    assert again.dtype == torch.float32
    assert storage(again) == storage(model)


OWN = {
    "nf4": ("bitsandbytes", lambda: transformers.BitsAndBytesConfig(**FOUR_BITS)),
    "double quant": (
        "bitsandbytes",
        lambda: transformers.BitsAndBytesConfig(**FOUR_BITS, bnb_4bit_use_double_quant=True),
    ),
    "int8": ("bitsandbytes", lambda: transformers.BitsAndBytesConfig(load_in_8bit=True)),
    "torchao int8": (
        "torchao",
        lambda: transformers.TorchAoConfig(find_peer("torchao.quantization").Int8WeightOnlyConfig()),
    ),
}


def packed_by_transformers(tmp_path, name, how):
    needs, config = OWN[how]
    find_peer(needs)
    make(name).save_pretrained(tmp_path / "source")
    kind = getattr(transformers, MODELS[name][0])
    model = kind.from_pretrained(tmp_path / "source", quantization_config=config(), dtype=torch.bfloat16)
    return kind, model


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("how", OWN)
def test_what_transformers_packed_by_itself_is_saved(tmp_path, name, how):
    kind, model = packed_by_transformers(tmp_path, name, how)
    before = storage(model)
    wp.save_pretrained(model, tmp_path / "saved", max_shard_size=1)
    theirs, told = kind.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(told.values())
    assert storage(theirs) == storage(wp.from_pretrained(kind, tmp_path / "saved")) == before
    # It was packed when it was loaded, which transformers itself does not save once more.
    wp.save_pretrained(theirs, tmp_path / "twice", max_shard_size=1)
    assert same_bits(stored(tmp_path / "saved")[0], stored(tmp_path / "twice")[0])
    assert (tmp_path / "saved/config.json").read_text() == (tmp_path / "twice/config.json").read_text()


@pytest.mark.parametrize("how", ["int8", "torchao int8"])
def test_what_transformers_packed_is_saved_after_it_ran(tmp_path, how):
    _, model = packed_by_transformers(tmp_path, "llama", how)
    wp.save_pretrained(model, tmp_path / "saved")
    outputs(model)
    wp.save_pretrained(model, tmp_path / "after")
    assert same_bits(stored(tmp_path / "saved")[0], stored(tmp_path / "after")[0])


def test_weights_that_bitsandbytes_rearranged_are_refused(tmp_path):
    _, model = packed_by_transformers(tmp_path, "llama", "nf4")
    # What its layers do before their first product, on processors that have the instructions.
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ConfigError, match=r'bitsandbytes has rearranged "model\.layers\.1\.mlp\.up_proj\.weight"'):
        wp.save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_only_transformers_knows_is_refused(tmp_path):
    find_peer("optimum.quanto")
    make("llama").save_pretrained(tmp_path / "source")
    config = transformers.QuantoConfig(weights="int8")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "source", quantization_config=config)
    with pytest.raises(ConfigError, match="transformers packed this model by itself"):
        wp.save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("how", ["nf4", "quanto int4", "torchao int8"])
def test_models_loaded_by_transformers_through_weightpack_are_saved(tmp_path, name, how):
    from weightpack.integrations.transformers import register, unregister

    needs, config = PACKED[how]
    find_peer(needs)
    make(name).save_pretrained(tmp_path / "source")
    kind = getattr(transformers, MODELS[name][0])
    register()
    try:
        model = kind.from_pretrained(tmp_path / "source", quantization_config=config(), dtype=torch.bfloat16)
        wp.save_pretrained(model, tmp_path / "saved")
        again = kind.from_pretrained(tmp_path / "saved")
        assert storage(again) == storage(model)
        wp.save_pretrained(again, tmp_path / "twice")
    finally:
        unregister()
    ours = wp.from_pretrained(kind, tmp_path / "source", quantization_config=config(), torch_dtype=torch.bfloat16)
    assert storage(ours) == storage(model)
    wp.save_pretrained(ours, tmp_path / "ours")
    for folder in ("twice", "ours"):
        assert same_bits(stored(tmp_path / "saved")[0], stored(tmp_path / folder)[0])
    # torchao's configs are written with their defaults by transformers' own config class.
    sections = [
        wp.AutoQuantizer.from_dict(json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"])
        for folder in ("saved", "twice", "ours")
    ]
    assert sections[0] == sections[1] == sections[2]
