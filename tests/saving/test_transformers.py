"""Models of transformers, saved and loaded again: by weightpack, and by transformers alone."""

from __future__ import annotations

import pytest

from tests.conftest import find_peer

torch = find_peer("torch")
find_peer("transformers")

import weightpack as wp  # noqa: E402
from tests.quantizers.test_contract import storage  # noqa: E402
from tests.saving import transformers_models as models  # noqa: E402
from tests.saving.transformers_models import MODELS, PACKED, outputs, same_bits, stored  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SOME = ("plain", "nf4", "int8", "quanto int4", "torchao int8", "modelopt FP8")
FEW = ("plain", "nf4", "torchao int8")
MATRIX = {"llama": PACKED, "bert": PACKED, "llama tied": FEW, "qwen2_moe": FEW}
CELLS = [(model, how) for model in MODELS for how in MATRIX.get(model, SOME)]
NOT_READ = {
    "quanto int8": "missing",
    "quanto int4": "missing",
    "quanto float8": "missing",
    "modelopt FP8": "codes",
    "modelopt INT8": "codes",
    "modelopt NVFP4": "shapes",
}
"""Backends whose files transformers by itself has no reader for, and what it makes of them."""


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """For each model and each way to pack it: the model loaded by weightpack, what it gave, and its folder."""
    root = tmp_path_factory.mktemp("cells")
    made = {}
    for model, how in CELLS:
        needs, config = PACKED[how]
        if needs is not None:
            find_peer(needs)
        source = root / model
        if not source.exists():
            models.make(model).save_pretrained(source)
        loaded = wp.from_pretrained(_class(model), source, quantization_config=config(), torch_dtype=torch.bfloat16)
        given = outputs(loaded)
        folder = root / f"{model} {how}"
        wp.save_pretrained(loaded, folder, max_shard_size=1 if model == "llama" else "100KB")
        made[model, how] = (loaded, given, folder)
    return made


@pytest.fixture(scope="module")
def elsewhere(cells):
    """What transformers alone says of each cell."""
    return models.load_elsewhere(
        {f"{model}/{how}": (MODELS[model][0], folder) for (model, how), (_, _, folder) in cells.items()}
    )


@pytest.mark.parametrize(("model", "how"), CELLS)
def test_what_is_saved_comes_back_bit_for_bit(cells, tmp_path, model, how):
    loaded, given, folder = cells[model, how]
    again = wp.from_pretrained(_class(model), folder)
    assert storage(again) == storage(loaded)
    assert again.dtype == loaded.dtype
    assert torch.equal(outputs(again), given)
    wp.save_pretrained(again.train().eval().to("cpu"), tmp_path / "twice", max_shard_size="100KB")
    assert same_bits(stored(folder)[0], stored(tmp_path / "twice")[0])
    assert (tmp_path / "twice/config.json").read_text() == (folder / "config.json").read_text()
    third = wp.from_pretrained(_class(model), tmp_path / "twice")
    assert storage(third) == storage(loaded)


@pytest.mark.parametrize(("model", "how"), CELLS)
def test_transformers_alone_loads_it(cells, elsewhere, model, how):
    loaded, given, folder = cells[model, how]
    told = elsewhere[f"{model}/{how}"]
    nothing_packed = model == "gpt2" and how.split()[0] in ("quanto", "torchao", "modelopt")
    if how not in NOT_READ or nothing_packed:
        assert told == {}
        theirs = torch.load(folder / "host.pt")
        if how in ("nf4", "fp4", "double quant"):
            assert same_bits(torch.load(folder / "host_state.pt"), loaded.state_dict())
            # Both decode to the same weights; their products are summed in another order.
            assert ((theirs - given).float().norm() / given.float().norm()).item() < 0.01
        else:
            assert torch.equal(theirs, given)
    elif NOT_READ[how] == "missing":
        assert told["missing_keys"]
        assert {name.rpartition(".")[2] for name in told["missing_keys"]} == {"weight"}
    elif NOT_READ[how] == "codes":
        assert told["unexpected_keys"]
        assert all("weight_quantizer" in name for name in told["unexpected_keys"])
    else:
        assert "ignore_mismatched_sizes" in told["error"]


def _class(model):
    return getattr(models.transformers, MODELS[model][0])
