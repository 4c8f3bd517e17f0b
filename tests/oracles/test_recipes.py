"""The types of recipes against llama.cpp's own `llama_model_quantize`."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightpack import recipes
from weightpack.errors import UnsupportedError

from ..recipe_models import MODELS, types
from . import llama_types
from .ggml import Ggml

pytestmark = pytest.mark.llama

WITHOUT_FALLBACK = {"q1_0_mix"}
"""llama.cpp stops where the block of these types does not divide a row; weightpack takes f16."""


COMPARED = ["llama shared values", "llama tied", "llama 8 experts", "llama rows of 288", "falcon"]


@pytest.mark.parametrize("recipe", sorted(recipes.family(recipes.LLAMA).recipes))
@pytest.mark.parametrize("name", COMPARED)
def test_types_are_those_of_llama_cpp(ggml: Ggml, tmp_path: Path, name: str, recipe: str) -> None:
    llama, model = llama_types.quiet(), MODELS[name]
    file_type = recipes.family(recipes.LLAMA).recipes[recipe].file_type
    for importance in (False, True):
        theirs = llama_types.types(llama, ggml, tmp_path, model, file_type, importance=importance)
        if theirs is None and recipe in WITHOUT_FALLBACK and model.columns % 128:
            continue
        if theirs is None:
            with pytest.raises(UnsupportedError, match="importance vector"):
                types(model, recipe, importance=importance)
        else:
            assert types(model, recipe, importance=importance) == theirs
