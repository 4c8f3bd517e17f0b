"""The types of recipes against llama.cpp's own `llama_model_quantize`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import weightpack
from weightpack import recipes
from weightpack.errors import UnsupportedError

from ..engine.test_gguf_target import importance_file, source, stored_bytes
from ..recipe_models import MODELS, types
from . import llama_types
from .ggml import Ggml

pytestmark = pytest.mark.llama

WITHOUT_FALLBACK = {"q1_0_mix"}
"""llama.cpp stops where the block of these types does not divide a row; weightpack takes f16."""


@pytest.mark.parametrize("to", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_xs"])
def test_importance_files_give_the_bytes_of_ggml(ggml: Ggml, tmp_path: Path, to: str) -> None:
    path, vectors = source(tmp_path / "m.safetensors"), importance_file(tmp_path / "i.gguf")
    weightpack.convert(path, tmp_path / "m.gguf", to, importance=vectors)
    with weightpack.open_checkpoint(path) as weights, weightpack.open_checkpoint(vectors) as sums:
        for name in ("blk.0.attn_q.weight", "blk.7.ffn_down.weight"):
            importance = sums.read(f"{name}.in_sum2")[0] / sums.read(f"{name}.counts")[0]
            expected = ggml.quantize(to.upper(), weights.read(name), importance)
            assert np.array_equal(stored_bytes(tmp_path / "m.gguf", name), expected.reshape(-1))


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
