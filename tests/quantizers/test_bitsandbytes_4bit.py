"""4-bit layers: the bytes of bitsandbytes, on the CPU, and nothing that running them changes."""

from __future__ import annotations

import copy

import pytest

import weightpack as wp
from tests.conftest import find_peer

torch = find_peer("torch")
bnb = find_peer("bitsandbytes")

from tests.quantizers.bitsandbytes_models import Net, bits, load, parts_of  # noqa: E402


def config(**fields):
    return wp.BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", **fields})


def packed_by_peer(weight, **choices):
    """The state dict of bitsandbytes' own parameter, packed by its own code on the CPU."""
    theirs = bnb.nn.Params4bit(weight, **choices).to("cpu")
    return {"": theirs.data, **theirs.quant_state.as_dict(packed=True)}


STORAGES = ["uint8", "int8", "float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bytes_are_those_of_bitsandbytes(kind, dtype, storage):
    torch.manual_seed(0)
    model = Net(96).to(dtype)
    reference = copy.deepcopy(model)
    load(model, config(bnb_4bit_quant_type=kind, bnb_4bit_quant_storage=storage), dtype=dtype, skip=["down"])
    theirs = packed_by_peer(
        reference.up.weight.detach(),
        quant_type=kind,
        compress_statistics=False,
        quant_storage=getattr(torch, storage),
    )
    assert bits(parts_of(model, "up.weight")) == bits(theirs)
    assert isinstance(model.up, bnb.nn.Linear4bit)
    assert isinstance(model.up.weight, bnb.nn.Params4bit)
    assert type(model.up).__name__ == "Linear4bit"
    assert type(model.down) is torch.nn.Linear


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantization_given_the_same_offset(kind):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(320, 257, bias=False)).bfloat16()
    weight = model[0].weight.detach().clone()
    load(model, config(bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True), dtype=torch.bfloat16)
    ours = parts_of(model, "0.weight")
    theirs = packed_by_peer(weight, quant_type=kind, compress_statistics=True)
    assert list(ours) == list(theirs)
    exact = [key for key in ours if key in ("", "quant_map", "nested_quant_map")]
    assert bits({key: ours[key] for key in exact}) == bits({key: theirs[key] for key in exact})
    offset = float(theirs_offset := bnb.nn.Params4bit(weight, quant_type=kind).to("cpu").quant_state.offset)
    own = float(model[0].weight.quant_state.offset)
    assert abs(own - offset) <= 4 * abs(float(torch.nextafter(theirs_offset, theirs_offset + 1)) - offset)
    torch.testing.assert_close(ours["nested_absmax"], theirs["nested_absmax"], rtol=1e-5, atol=1e-7)
