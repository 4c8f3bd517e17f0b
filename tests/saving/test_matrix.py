"""Every backend, every kind of model: saved by weightpack, loaded by weightpack and by the unmodified host."""

from __future__ import annotations

import re

import pytest

from tests.conftest import find_peer

find_peer("torch")

from tests.saving import matrix  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
CELLS = [(backend, model) for backend in ("plain", *matrix.backends()) for model in matrix.MODELS]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    for library in ("transformers", "diffusers", "bitsandbytes", "optimum.quanto", "torchao", "modelopt"):
        find_peer(library)
    return matrix.run(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize(("backend", "model"), CELLS, ids=" ".join)
def test_weightpack_loads_the_same_bits(found, backend, model):
    assert found[backend, model]["own"]


@pytest.mark.parametrize(("backend", "model"), [cell for cell in CELLS if cell[1] != "plain"], ids=" ".join)
def test_the_host_alone_does_as_the_table_says(found, backend, model):
    one = found[backend, model]
    expected = matrix.outcomes()[backend, model]
    said = matrix.judge(one, one["host"])
    if expected == "equal":
        assert re.fullmatch(r"equal(, [0-9.e-]+ %)?", said), said
    elif expected == "gpu":
        assert "No GPU found" in said
        assert matrix.judge(one, one["lifted"]).startswith("equal")
    elif expected == "compiler":
        assert said.startswith("equal")
    else:
        # It fails, and does not give something else for the model.
        assert not said.startswith(("equal", "other outputs"))


def test_the_table_in_the_readme_is_this_run(found):
    assert matrix.shape_of(matrix.written()) == matrix.shape_of(matrix.table(found))
