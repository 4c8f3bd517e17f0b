"""Saved models in diffusers as it is: a process that knows nothing of weightpack loads and runs them.

diffusers takes no bitsandbytes models where there is no GPU; there only that check is lifted.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import find_peer

torch = find_peer("torch")

import weightpack as wp  # noqa: E402
from tests.integrations import tiny_diffusers as tiny  # noqa: E402

from .diffusers_models import BACKENDS, RUNS_ON_A_GPU, dtype_of, load, sources  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[2]

LOAD = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, diffusers
from tests.integrations import tiny_diffusers as tiny

place = sys.argv[1]
if not torch.cuda.is_available():
    from diffusers.quantizers.bitsandbytes import bnb_quantizer
    for kind in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        kind.validate_environment = lambda self, *args, **options: None
        kind.update_device_map = lambda self, device_map: {"": "cpu"}
for number, cell in enumerate(json.load(open(f"{place}/cells.json"))):
    found = {}
    try:
        model, info = getattr(diffusers, cell["class"]).from_pretrained(
            cell["folder"], torch_dtype=getattr(torch, cell["dtype"]), output_loading_info=True
        )
        found["info"] = {key: list(value) for key, value in info.items()}
        found["digests"] = tiny.digests(model)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    if "error" not in found and cell["runs"]:
        try:
            torch.save(tiny.run(cell["name"], model).cpu(), f"{place}/{number}.pt")
        except Exception as error:
            found["run error"] = f"{type(error).__name__}: {error}"
    with open(f"{place}/{number}.json", "w") as file:
        json.dump(found, file)
assert "weightpack" not in sys.modules
"""

SKIPPING = {
    "nf4, some layers": (
        "nf4",
        lambda: wp.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["attn1.to_q", "proj_out_1"]),
    ),
    "int8, some layers": (
        "int8",
        lambda: wp.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["transformer_blocks.1"]),
    ),
    "quanto, some layers": (
        "quanto float8",
        lambda: wp.QuantoConfig("float8", modules_to_not_convert=["attn1", "proj_out_1"]),
    ),
    "torchao, some layers": (
        "torchao int8",
        lambda: wp.TorchAoConfig("int8", modules_to_not_convert=["attn1.to_q", "proj_out_1"]),
    ),
}
ALL = {**BACKENDS, **{name: (BACKENDS[like][0], make) for name, (like, make) in SKIPPING.items()}}
CELLS = [
    *((backend, "dit", 1) for backend in ALL),
    *((backend, "wide flux", "60KB") for backend in ("nf4", "double quant")),
    *(
        (backend, name, "200KB")
        for name in ("unet", "vae")
        for backend in ("nf4", "int8", "quanto int8", "torchao int8")
    ),
]
CANNOT_LOAD = {
    "modelopt": "TypeError: 'list' object is not a mapping",  # NVIDIA/Model-Optimizer#2001
}
"""Backends whose models diffusers itself cannot load, by the first word, and what it says."""
CANNOT_RUN = {
    **{name: "bitsandbytes has CPU kernels of 4 bits only for some sizes" for name in ("nf4", "fp4", "double quant")},
    **{name: "quanto compiles code when it first decodes such weights" for name in ("quanto int4", "quanto int2")},
    **dict.fromkeys(RUNS_ON_A_GPU, "torchao runs them on a GPU only"),
}
"""Backends whose models are loaded and compared, and not run. In `wide flux` the layers have sizes that run."""


def runs(backend, name):
    """Whether outputs are compared."""
    return name == "wide flux" or like(backend) not in CANNOT_RUN


def like(backend):
    """The backend that decides the types."""
    return SKIPPING[backend][0] if backend in SKIPPING else backend


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """For each cell what weightpack saved and what diffusers made of it."""
    find_peer("diffusers")
    source = sources(tmp_path_factory)
    place = tmp_path_factory.mktemp("unmodified")
    asked, wanted = [], {}
    for backend, name, size in CELLS:
        needs, make = ALL[backend]
        if needs is not None and importlib.util.find_spec(needs.partition(".")[0]) is None:
            continue
        cls, folder = source(name)
        dtype = dtype_of(like(backend))
        model = wp.from_pretrained(cls, folder, quantization_config=make(), torch_dtype=dtype)
        output = tiny.run(name, model) if runs(backend, name) else None
        saved = place / f"{backend} {name}"
        wp.save_pretrained(model, saved, max_shard_size=size)
        wanted[backend, name] = len(asked), tiny.digests(model), output
        asked.append(
            {"class": cls.__name__, "folder": str(saved), "name": name, "runs": output is not None}
            | {"dtype": str(dtype).removeprefix("torch.")}
        )
    answer(place, asked)
    return place, wanted


def answer(place, asked):
    """Lets diffusers load what is asked for, in a process of its own."""
    (place / "cells.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(place)], capture_output=True, text=True, cwd=ROOT, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("backend", "name"), [cell[:2] for cell in CELLS])
def test_diffusers_loads_what_is_saved(answers, backend, name):
    place, wanted = answers
    needs = ALL[backend][0]
    if needs is not None:
        find_peer(needs)
    number, digests, output = wanted[backend, name]
    found = json.loads((place / f"{number}.json").read_text())
    refused = CANNOT_LOAD.get(backend.partition(" ")[0])
    if refused is not None:
        assert refused in found["error"]
        return
    assert "error" not in found, found["error"]
    assert not any(found["info"].values()), found["info"]
    assert found["digests"] == digests
    if output is not None:
        assert "run error" not in found, found["run error"]
        theirs = torch.load(place / f"{number}.pt").float()
        # The very weights, and products of bitsandbytes' or torch's own kernels.
        assert torch.linalg.norm(theirs - output.float()) < 0.02 * torch.linalg.norm(theirs)


def test_shards_hold_one_tensor_but_where_diffusers_looks_for_more(answers):
    place, wanted = answers
    counts = {
        "plain": (1, 1), "int8": (1, 2), "nf4": (1, 4), "double quant": (1, 6), "quanto int4": (1, 1),
        "torchao int8": (1, 1),
    }  # fmt: skip
    for backend, (least, most) in counts.items():
        if (backend, "dit") not in wanted:
            continue
        index = json.loads((place / f"{backend} dit" / "diffusion_pytorch_model.safetensors.index.json").read_text())
        sizes = [list(index["weight_map"].values()).count(file) for file in set(index["weight_map"].values())]
        assert (min(sizes), max(sizes)) == (least, most), backend


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["nf4", "fp4", "double quant", "int8"])
def test_bitsandbytes_models_in_diffusers_on_a_gpu(tmp_path_factory, tmp_path, backend):
    """No check is lifted here."""
    source = sources(tmp_path_factory)
    model = load(source, backend, "wide flux")
    output = tiny.run("wide flux", model).cpu()
    wp.save_pretrained(model, tmp_path / "saved", max_shard_size="60KB")
    cell = {"class": type(model).__name__, "folder": str(tmp_path / "saved"), "name": "wide flux", "runs": True}
    answer(tmp_path, [{**cell, "dtype": "bfloat16"}])
    found = json.loads((tmp_path / "0.json").read_text())
    assert "error" not in found, found["error"]
    assert found["digests"] == tiny.digests(model)
    theirs = torch.load(tmp_path / "0.pt").float()
    assert torch.linalg.norm(theirs - output.float()) < 0.02 * torch.linalg.norm(theirs)
