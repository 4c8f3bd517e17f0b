"""Makes the golden tables of recipes from llama.cpp.

    python -m tests.vectors.make_recipes

writes `tests/vectors/recipes/llama_cpp.json`: for each made-up model of `tests/recipe_models.py` and
each recipe, without and with importance vectors, the type that `llama_model_quantize` gives every
tensor. Tensors of one name are one row, with the layers of each type where they differ.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from weightpack import recipes

from ..oracles import llama_types
from ..oracles.ggml import open_ggml
from ..recipe_models import MODELS, shortened

TARGET = Path(__file__).parent / "recipes" / "llama_cpp.json"


def main():
    llama, ggml = llama_types.quiet(), open_ggml()
    models = {}
    for name, model in MODELS.items():
        models[name] = rows = {}
        with tempfile.TemporaryDirectory() as folder:
            for recipe in recipes.family(recipes.LLAMA).recipes.values():
                plain, weighed = (
                    llama_types.types(llama, ggml, Path(folder), model, recipe.file_type, importance=importance)
                    for importance in (False, True)
                )
                rows[recipe.name] = plain and shortened(plain)
                if weighed != plain:
                    rows[f"{recipe.name} with importance"] = weighed and shortened(weighed)
    document = {"peer": "llama.cpp", "version": f"llama-cpp-python {version('llama-cpp-python')}", "models": models}
    TARGET.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
