"""int8 layers: the bytes of bitsandbytes, on the CPU, and nothing that running them changes."""

from __future__ import annotations

import copy

import pytest

import weightpack as wp
from tests.conftest import find_peer

torch = find_peer("torch")
bnb = find_peer("bitsandbytes")

from tests.quantizers.bitsandbytes_models import Net, bits, load  # noqa: E402


def config(**fields):
    return wp.BitsAndBytesConfig(load_in_8bit=True, **fields)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bytes_are_those_of_bitsandbytes(dtype):
    torch.manual_seed(0)
    model = Net().to(dtype)
    theirs = copy.deepcopy(model)
    for name in ("up", "down"):
        linear = getattr(theirs, name)
        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, False, 6.0)
        layer.load_state_dict(linear.state_dict())
        setattr(theirs, name, layer.to("cpu"))
    load(model, config(), dtype=dtype)
    assert bits(model.state_dict()) == bits(theirs.state_dict()) | {
        name: value for name, value in bits(model.state_dict()).items() if name.endswith("bias")
    }
    assert list(model.state_dict()) == list(theirs.state_dict())
    assert isinstance(model.up, bnb.nn.Linear8bitLt)
    assert isinstance(model.up.weight, bnb.nn.Int8Params)
