"""Makes the golden lists of names from tiny diffusers models.

    python -m tests.vectors.make_keymaps

writes `tests/vectors/keymaps/<architecture>.json`: the shapes of a tiny model's tensors under
diffusers' names, and for each reference name the shape that diffusers' own function for single files
takes apart into them, found by running it on reference tensors and comparing with the source.
"""

import json
from importlib.metadata import version
from pathlib import Path

import diffusers
import torch
from diffusers.loaders import single_file_utils

from weightpack import keymaps
from weightpack.entry import Entry

from ..diffusion_models import CONFIGS, make
from ..integrations.test_diffusers_gguf import SINGLE_FILE_FUNCTIONS, joined

HERE = Path(__file__).parent / "keymaps"


def main():
    HERE.mkdir(exist_ok=True)
    for name in CONFIGS:
        source = dict(make(name, diffusers).state_dict())
        if name == "flux":
            # Their function cuts fused rows at the width of FLUX.1, whatever the model's is.
            for key in list(source):
                if key.startswith("single_") and ("attn.to_" in key or "proj_mlp" in key):
                    rows = 3072 * (4 if "proj_mlp" in key else 1)
                    source[key] = torch.randn(rows, *source[key].shape[1:])
        entries = [
            Entry(key, tuple(value.shape), "F32", "f32", 4 * value.numel(), value.numel())
            for key, value in source.items()
        ]
        plan = keymaps.read_keymap(name).plan(entries, None, None)
        reference = {tensor.name: joined(tensor, source) for tensor in plan.tensors}
        shapes = {key: list(value.shape) for key, value in reference.items()}
        taken_apart = reference
        if name in SINGLE_FILE_FUNCTIONS:
            taken_apart = getattr(single_file_utils, SINGLE_FILE_FUNCTIONS[name])(dict(reference))
        assert set(taken_apart) == set(source)
        assert all(torch.equal(taken_apart[key], value) for key, value in source.items())
        document = {
            "peer": "diffusers",
            "version": version("diffusers"),
            "class": CONFIGS[name][0],
            "source": {key: list(value.shape) for key, value in source.items()},
            "reference": shapes,
        }
        text = json.dumps(document)
        (HERE / f"{name}.json").write_text(text.replace("], ", "],\n").replace("{", "{\n") + "\n", "utf-8")


if __name__ == "__main__":
    main()
