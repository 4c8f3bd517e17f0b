"""Which architecture a model is taken for."""

from __future__ import annotations

import pytest

from weightpack import architectures
from weightpack.errors import ConfigError
from weightpack.mapping import ArchitecturePlan, MappedTensor, Rows


class Rainbow:
    name = "rainbow"

    def plan(self, entries, config, folder):
        return ArchitecturePlan(tuple(MappedTensor(f"r.{e.name}", (Rows(e.name),)) for e in entries))


def find(name, config, tensors):
    return Rainbow() if name == "rainbow" or "arc.weight" in tensors else None


@pytest.fixture(autouse=True)
def family(monkeypatch):
    monkeypatch.setattr(architectures, "FAMILIES", (architectures.Family(("rainbow",), find),))


def test_by_name_and_by_what_the_model_holds():
    assert architectures.find_architecture("Rainbow", None, ()).name == "rainbow"
    assert architectures.find_architecture(None, None, {"arc.weight"}).name == "rainbow"
    assert architectures.find_architecture(None, None, {"weight"}) is None
    assert architectures.find_architecture("none", None, {"arc.weight"}) is None


def test_an_unknown_name_is_answered_with_those_that_are_known():
    with pytest.raises(ConfigError, match='unknown architecture "rainbo"') as caught:
        architectures.find_architecture("rainbo", None, ())
    assert caught.value.hint == "did you mean rainbow?"
    with pytest.raises(ConfigError) as caught:
        architectures.find_architecture("zzz", None, ())
    assert caught.value.hint == "known: rainbow, none"


def test_a_tensor_that_is_only_renamed():
    assert MappedTensor("a", (Rows("b"),)).is_renamed
    assert not MappedTensor("a", (Rows("b"), Rows("c"))).is_renamed
    assert not MappedTensor("a", (Rows("b", 0, 4),)).is_renamed
    assert not MappedTensor("a", (Rows("b"),), shape=(1, 2)).is_renamed
