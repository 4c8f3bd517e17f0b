"""Maps of names: golden lists, the way there and back, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from weightpack import keymaps
from weightpack.assembly import joined
from weightpack.entry import Entry, Part
from weightpack.errors import UnsupportedError

VECTORS = Path(__file__).parent / "vectors" / "keymaps"
GOLDEN = {name: json.loads((VECTORS / f"{name}.json").read_text("utf-8")) for name in keymaps.NAMES}


def entries(shapes) -> list[Entry]:
    found = []
    for name, shape in shapes.items():
        weights = math.prod(shape)
        part = Part(name, "BF16", tuple(shape), 2 * weights)
        found.append(Entry(name, tuple(shape), "BF16", "bf16", 2 * weights, weights, (part,)))
    return found


def shapes_of(plan, source) -> dict[str, list[int]]:
    by_name = {entry.name: entry for entry in source}
    return {tensor.name: list(joined(tensor, by_name).shape) for tensor in plan.tensors}


def test_every_map_has_its_golden_list():
    assert {path.stem for path in VECTORS.glob("*.json")} == set(keymaps.NAMES)
    assert {path.stem for path in keymaps.FOLDER.glob("*.toml")} == set(keymaps.NAMES)


@pytest.mark.parametrize("name", keymaps.NAMES)
def test_names_and_shapes_are_those_of_the_peer(name):
    source = entries(GOLDEN[name]["source"])
    keymap = keymaps.find(None, {"_class_name": GOLDEN[name]["class"]}, ())
    plan = keymap.plan(source, None, None)
    assert shapes_of(plan, source) == GOLDEN[name]["reference"]
    assert plan.metadata == (("general.architecture", "str", name),)
    assert (plan.facts.architecture, plan.recipes) == (name, "image")


@pytest.mark.parametrize("name", [name for name in keymaps.NAMES if name != "flux"])
def test_the_way_back(name):
    reference = entries(GOLDEN[name]["reference"])
    plan = keymaps.find(None, None, [entry.name for entry in reference]).host_plan(reference)
    assert shapes_of(plan, reference) == GOLDEN[name]["source"]


def test_the_way_back_of_fused_rows():
    columns = 64
    names = keymaps.read_keymap("flux")
    shapes = {key: list(shape) for key, shape in GOLDEN["flux"]["reference"].items()}
    for block in range(2):
        shapes[f"single_blocks.{block}.linear1.weight"] = [7 * columns, columns]
        shapes[f"single_blocks.{block}.linear1.bias"] = [7 * columns]
    found = shapes_of(names.host_plan(entries(shapes)), entries(shapes))
    assert found["single_transformer_blocks.1.attn.to_v.weight"] == [columns, columns]
    assert found["single_transformer_blocks.1.proj_mlp.weight"] == [4 * columns, columns]
    assert found["single_transformer_blocks.1.proj_mlp.bias"] == [4 * columns]
    assert set(found) == set(GOLDEN["flux"]["source"])


@pytest.mark.parametrize("name", keymaps.NAMES)
def test_a_file_that_has_the_reference_names_keeps_them(name):
    reference = GOLDEN[name]["reference"]
    for prefix in ("", "model.diffusion_model."):
        stored = {prefix + key: shape for key, shape in reference.items()}
        if prefix:
            stored["first_stage_model.conv.weight"] = [4, 4]
        source = entries(stored)
        keymap = keymaps.find(None, None, stored)
        assert keymap.name == name
        plan = keymap.plan(source, None, None)
        assert [tensor.name for tensor in plan.tensors] == list(reference)
        assert all(tensor.is_renamed for tensor in plan.tensors)
        assert list(plan.left_out) == (["first_stage_model.conv.weight"] if prefix else [])


@pytest.mark.parametrize("name", keymaps.NAMES)
def test_unknown_and_missing_tensors_are_refused_by_name(name):
    source = GOLDEN[name]["source"]
    keymap = keymaps.read_keymap(name)
    with pytest.raises(UnsupportedError, match=f'{name} has no place for tensor "extra.weight"') as caught:
        keymap.plan(entries({**source, "extra.weight": [4, 4]}), None, None)
    assert caught.value.hint == "--arch none keeps the names of the source"
    for gone in (
        "proj_out.weight",
        next(key for key in source if key.endswith("_blocks.0.attn.to_k.weight") or key.endswith("attn1.to_k.weight")),
    ):
        left = {key: shape for key, shape in source.items() if key != gone}
        with pytest.raises(UnsupportedError, match=f'{name} needs tensor "{gone}", which the source lacks'):
            keymap.plan(entries(left), None, None)
    reference = {**GOLDEN[name]["reference"], "extra.weight": [4, 4]}
    with pytest.raises(UnsupportedError, match="has no place for"):
        keymap.plan(entries(reference), None, None)


def test_models_without_what_is_optional():
    for name, words in (("flux", "guidance"), ("wan", "image_embedder"), ("sd3", "attn2")):
        source = {key: shape for key, shape in GOLDEN[name]["source"].items() if words not in key}
        if name == "wan":
            source = {k: s for k, s in source.items() if "add_" not in k and "norm_added" not in k}
        plan = keymaps.read_keymap(name).plan(entries(source), None, None)
        assert len(plan.tensors) < len(GOLDEN[name]["reference"])


def test_what_stays_in_high_precision():
    def kept(name: str) -> dict[str, str]:
        plan = keymaps.read_keymap(name).plan(entries(GOLDEN[name]["source"]), None, None)
        return {tensor.name: tensor.plain for tensor in plan.tensors if tensor.keep}

    assert kept("wan")["patch_embedding.weight"] == "f32"
    assert kept("wan")["blocks.0.modulation"] == "f32"
    assert kept("wan")["head.head.weight"] == ""
    assert kept("sd3")["pos_embed"] == "f32"
    assert kept("ltxv")["transformer_blocks.1.scale_shift_table"] == "f32"
    assert set(kept("flux")) == {
        key
        for key in GOLDEN["flux"]["reference"]
        if key.startswith(("txt_in.", "img_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer."))
    }


def test_models_of_other_classes_are_left_alone():
    assert keymaps.find(None, {"_class_name": "UNet2DConditionModel"}, ()) is None
    assert keymaps.find(None, {"model_type": "llama"}, ["model.embed_tokens.weight"]) is None
