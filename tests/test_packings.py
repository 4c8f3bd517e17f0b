"""The table of packings: what each row's module must have, and that no format is left out."""

from __future__ import annotations

from importlib import import_module

import pytest

from weightpack.packings import table
from weightpack.packings.modelopt import shared_scales, together
from weightpack.targets import format_table

OF_TARGETS = {"host_config", "one_kind", "settle"}
OF_ENGINES = {"leaves", "shared_scales"}


@pytest.mark.parametrize("row", table.TABLE, ids=lambda row: row.name)
def test_a_row_has_its_module(row):
    module = import_module(f"weightpack.packings.{row.name.replace('-', '_')}")
    assert {"FORMATS", "METHODS", "describes", "leftovers"} <= set(module.__all__)
    assert set(module.__all__) & OF_TARGETS == (OF_TARGETS if row.is_target else set())
    assert set(module.__all__) & OF_ENGINES == (OF_ENGINES if row.is_for_engines else set())
    assert table.engine_packing(row.name) is (module if row.is_for_engines else None)
    assert module.leftovers(["model.norm.weight", "lm_head.weight", "lm_head.bias", "scale"]) == []
    for method in module.METHODS:
        assert table.backend_of_method(method) == row.name


def test_layers_of_one_product_are_those_of_one_module():
    names = ["a.q_proj", "a.k_proj", "b.q_proj", "b.gate_proj", "b.up_proj", "b.down_proj", "v_proj", "k_proj"]
    assert together(names) == [["a.q_proj", "a.k_proj"], ["b.gate_proj", "b.up_proj"], ["v_proj", "k_proj"]]
    # In diffusers gates are not joined; queries that read another sequence than keys are not, anywhere.
    crossed = ["x.attn2.to_q", "x.attn2.to_k", "x.attn2.to_v", "x.attn1.to_q", "x.attn1.to_k", "x.w1", "x.w3"]
    assert together(crossed, "diffusers") == [["x.attn2.to_k", "x.attn2.to_v"], ["x.attn1.to_q", "x.attn1.to_k"]]
    shared = shared_scales([f"{name}.weight" for name in names[:3]] + ["a.v_proj.bias"], "modelopt:nvfp4", None)
    assert shared == {"a.q_proj.weight": "a.q_proj.weight", "a.k_proj.weight": "a.q_proj.weight"}
    assert not shared_scales(["a.q_proj.weight", "a.k_proj.weight"], "modelopt:fp8", None)


@pytest.mark.parametrize("form", format_table(), ids=lambda form: form.name)
def test_a_format_that_packs_belongs_to_a_row(form):
    owners = table.sources_of(form.name)
    if form.backend in ("", "gguf"):
        assert not owners
        return
    assert owners
    is_written = form.encodes != "never"
    assert (table.backend_of(form.name) in owners) or not is_written
