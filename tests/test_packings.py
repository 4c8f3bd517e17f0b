"""The table of packings: what each row's module must have, and that no format is left out."""

from __future__ import annotations

from importlib import import_module

import pytest

from weightpack.packings import table
from weightpack.targets import format_table

OF_TARGETS = {"host_config", "one_kind", "settle"}


@pytest.mark.parametrize("row", table.TABLE, ids=lambda row: row.name)
def test_a_row_has_its_module(row):
    module = import_module(f"weightpack.packings.{row.name.replace('-', '_')}")
    assert {"FORMATS", "METHODS", "describes", "leftovers"} <= set(module.__all__)
    assert set(module.__all__) & OF_TARGETS == (OF_TARGETS if row.is_target else set())
    assert module.leftovers(["model.norm.weight", "lm_head.weight", "lm_head.bias", "scale"]) == []
    for method in module.METHODS:
        assert table.backend_of_method(method) == row.name


@pytest.mark.parametrize("form", format_table(), ids=lambda form: form.name)
def test_a_format_that_packs_belongs_to_a_row(form):
    owners = table.sources_of(form.name)
    if form.backend in ("", "gguf"):
        assert not owners
        return
    assert owners
    is_written = form.encodes != "never"
    assert (table.backend_of(form.name) in owners) or not is_written
