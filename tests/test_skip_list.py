"""Skip lists: our readings of them against the hosts' own, and the list that is written."""

from __future__ import annotations

import random

import pytest

from weightpack.skip_list import is_skipped, settle, skipped_by_diffusers, skipped_by_transformers

SEGMENTS = (
    "model", "layers", "0", "1", "10", "mlp", "proj", "up_proj", "attn", "ff", "to_q", "lm_head",
    "transformer_blocks", "single_transformer_blocks", "proj_out", "norm1", "linear",
)  # fmt: skip


def random_cases(count: int, extra: tuple[str, ...] = ()) -> list[tuple[list[str], str]]:
    rng = random.Random(7)
    cases = []
    for _ in range(count):
        path = ".".join(rng.choices(SEGMENTS, k=rng.randint(1, 5)))
        entries = [".".join(rng.choices(SEGMENTS + extra, k=rng.randint(1, 3))) for _ in range(rng.randint(0, 4))]
        cases.append((entries, path))
    return cases


def test_transformers_reading_is_transformers_own(peer):
    own = peer("transformers.quantizers.quantizers_utils").should_convert_module
    hits = 0
    for entries, path in random_cases(20_000, ("layers.*", "^model", "m.*l")):
        assert skipped_by_transformers(entries, path) is not own(path, entries), (entries, path)
        hits += skipped_by_transformers(entries, path)
    assert 500 < hits < 19_500


def test_diffusers_reading_is_diffusers_own(peer):
    torch = peer("torch")
    peer("bitsandbytes")
    peer("accelerate")
    utils = peer("diffusers.quantizers.bitsandbytes.utils")
    config = peer("diffusers").BitsAndBytesConfig(load_in_8bit=True)
    bnb = peer("bitsandbytes")
    for entries, path in random_cases(400):
        root = torch.nn.Module()
        node = root
        *above, last = path.split(".")
        for segment in above:
            child = torch.nn.Module()
            node.add_module(segment, child)
            node = child
        node.add_module(last, torch.nn.Linear(4, 4, device="meta"))
        utils._replace_with_bnb_linear(root, list(entries), quantization_config=config)
        is_left = not isinstance(root.get_submodule(path), bnb.nn.Linear8bitLt)
        assert skipped_by_diffusers(entries, path) is is_left, (entries, path)


@pytest.mark.parametrize(
    ("entry", "path", "expected"),
    [
        ("transformer_blocks.0", "single_transformer_blocks.0.proj_out", True),
        ("attn.to_q", "transformer_blocks.0.attn.to_q", False),
        ("to_q", "transformer_blocks.0.attn.to_q", True),
        ("ff", "transformer_blocks.0.ff_context.net", False),
    ],
)
def test_diffusers_examples(entry, path, expected):
    assert skipped_by_diffusers([entry], path) is expected


@pytest.mark.parametrize(
    ("entry", "path", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("proj", "model.layers.0.mlp.up_proj", True),
        ("self_attn", "model.layers.0.self_attn.q_proj", False),
        ("model.layers.0", "model.layers.0.self_attn.q_proj", True),
        ("model.layers.1", "model.layers.10.self_attn.q_proj", False),
    ],
)
def test_transformers_examples(entry, path, expected):
    assert skipped_by_transformers([entry], path) is expected


def test_the_list_holds_the_kept_layers_and_nothing_else():
    packed = {f"model.layers.{i}.mlp.up_proj" for i in range(12)}
    entries, caught = settle("transformers", packed, {"lm_head"}, prefix="model")
    assert entries == ["lm_head"]
    assert caught == {}


def test_a_kept_layer_is_listed_for_the_bare_model_too():
    packed = {f"model.layers.{i}.mlp.up_proj" for i in range(12) if i != 1}
    entries, caught = settle("transformers", packed, {"model.layers.1.mlp.up_proj"}, prefix="model")
    assert caught == {}
    assert entries == ["layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert skipped_by_transformers(entries, "layers.1.mlp.up_proj")
    assert not any(skipped_by_transformers(entries, f"layers.{i}.mlp.up_proj") for i in (0, 2, 10, 11))


def test_the_short_form_is_left_out_where_it_reaches_further():
    # "layers.1.fc" would also be the end of the vision tower's path.
    packed = {"model.vision.layers.1.fc"}
    entries, caught = settle("transformers", packed, {"model.layers.1.fc"}, prefix="model")
    assert entries == ["model.layers.1.fc"]
    assert caught == {}


def test_layers_that_a_host_takes_for_a_listed_one_are_kept_until_nothing_changes():
    packed = {"single_blocks.0.proj_out", "single_blocks.1.proj_out", "blocks.0.to_q"}
    entries, caught = settle("diffusers", packed, {"proj_out"})
    assert caught == {"single_blocks.0.proj_out": "proj_out", "single_blocks.1.proj_out": "proj_out"}
    assert entries == ["proj_out", "single_blocks.0.proj_out", "single_blocks.1.proj_out"]
    assert not skipped_by_diffusers(entries, "blocks.0.to_q")


def test_what_a_host_keeps_by_itself_is_not_packed():
    packed = {"encoder.block.0.DenseReluDense.wo", "encoder.block.0.DenseReluDense.wi"}
    entries, caught = settle("transformers", packed, set(), fixed=["wo"])
    assert caught == {"encoder.block.0.DenseReluDense.wo": "wo"}
    assert entries == ["encoder.block.0.DenseReluDense.wo"]


def test_random_models_end_in_agreement():
    rng = random.Random(11)
    for _ in range(200):
        paths = {".".join(rng.choices(SEGMENTS, k=rng.randint(1, 4))) for _ in range(30)}
        kept = set(rng.sample(sorted(paths), 3))
        for host in ("transformers", "diffusers", None):
            entries, caught = settle(host, paths - kept, kept, prefix="model")
            for path in paths:
                unpacked = path in kept or path in caught
                assert is_skipped(host, entries, path) is True if unpacked else True
                if not unpacked:
                    assert not is_skipped(host, entries, path), (host, kept, path)


def test_many_entries_are_settled_quickly():
    packed = {f"model.layers.{i}.self_attn.q_proj" for i in range(60)}
    kept = {f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(60) for j in range(64)}
    entries, caught = settle("transformers", packed, kept, prefix="model")
    assert caught == {}
    # One entry for the experts of each layer, with and without the name of the bare model.
    assert len(entries) == 2 * 60
    assert all(is_skipped("transformers", entries, path) for path in kept)
    assert not any(is_skipped("transformers", entries, path) for path in packed)


def test_a_list_is_not_shortened_where_that_reaches_further():
    # "blocks.1" would be found inside "single_blocks.1." by diffusers.
    kept = {f"blocks.1.part.{i}.to_q" for i in range(200)}
    packed = {"single_blocks.1.to_k", "blocks.0.to_k"}
    entries, caught = settle("diffusers", packed, kept)
    assert caught == {}
    assert set(entries) == kept
