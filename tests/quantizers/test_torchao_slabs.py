"""Large weights packed in slabs of rows: the bytes of the whole, in little memory."""

from __future__ import annotations

import pytest

from tests.conftest import find_peer
from weightpack.quantizers import torchao_engine
from weightpack.quantizers import torchao_slabs as slabs

torch = find_peer("torch")
find_peer("torchao")

from tests.quantizers.test_torchao_weights import KINDS, Kinds, same  # noqa: E402

WHOLE = {"int8_tensor", "float8_tensor", "nvfp4"}
"""Kinds with a scale that all rows share."""


@pytest.fixture(scope="module")
def kinds(peer):
    return Kinds(peer)


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1 << 15)


def weight(rows, dtype=torch.bfloat16, columns=96):
    torch.manual_seed(rows)
    made = torch.randn(rows, columns, dtype=dtype)
    # Rows and blocks of zeros, and sizes that differ from slab to slab.
    made *= torch.logspace(-3, 2, rows)[:, None].to(dtype)
    made[5] = 0
    made[-3, :32] = 0
    return made


def whole(kinds, name, full):
    from weightpack.quantizers.torchao_weights import pack_whole

    module = torch.nn.Linear(1, 1, device="meta")
    module.weight = torch.nn.Parameter(full.clone(), requires_grad=False)
    pack_whole(module, "weight", kinds(name), name="a.weight", is_zero=False)
    return module.weight


@pytest.mark.parametrize("rows", [129 + 15, 256, 400, 2 * 128 + 16])
@pytest.mark.parametrize("name", KINDS)
def test_slabs_give_the_bytes_of_the_whole(kinds, name, rows):
    full = weight(rows)
    made = slabs.pack_in_slabs(full, kinds(name))
    assert (made is None) == (name in WHOLE)
    if made is None:
        return
    expected = whole(kinds, name, full)
    same(made, expected.data)
    assert made.shape == expected.shape
    assert made.dtype == expected.dtype
    names, attributes = expected.__tensor_flatten__()
    assert made.__tensor_flatten__() == (names, attributes)
    assert torch.equal(made.dequantize(), expected.dequantize())


@pytest.mark.parametrize("name", ["int8", "float8", "intx4"])
def test_slabs_of_float32(kinds, name):
    full = weight(400, torch.float32)
    same(slabs.pack_in_slabs(full, kinds(name)), whole(kinds, name, full).data)


def test_what_is_small_or_searched_for_as_a_whole_is_not_cut(kinds):
    assert slabs.pack_in_slabs(weight(128), kinds("int8")) is None
    searched = kinds.IntxWeightOnlyConfig(weight_dtype=torch.int4, intx_choose_qparams_algorithm="hqq_scale_only")
    assert slabs.pack_in_slabs(weight(400), searched) is None
    # Rows that nvfp4 cannot pack are told by torchao, with the whole shape.
    assert slabs.pack_in_slabs(weight(401), kinds("nvfp4")) is None


def test_memory_beside_the_result_is_bounded(kinds, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        """Notes the largest tensor that is made."""

        nbytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.device.type == "cpu":
                self.nbytes = max(self.nbytes, made.numel() * made.element_size())
            return made

    full = weight(4096, columns=256)
    cases = [(slabs.pack_in_slabs, name) for name in ("int8", "float8", "intx4", "mxfp8")]
    cases += [(torchao_engine.pack, name) for name in ("int8", "float8_tensor", "intx4", "mxfp8", "nvfp4")]
    for pack, name in cases:
        with Largest() as seen:
            assert pack(full, kinds(name)) is not None
        # The codes of the whole, and nothing as large as it in float32.
        assert seen.nbytes <= full.nbytes
