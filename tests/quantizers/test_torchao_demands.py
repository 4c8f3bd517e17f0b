"""What a config of torchao asks of the machine, of the element type and of a weight's shape."""

from __future__ import annotations

import pytest

from tests.conftest import find_peer
from weightpack.errors import BackendError
from weightpack.quantizers import torchao_demands as demands
from weightpack.quantizers import torchao_forms as forms

torch = find_peer("torch")
find_peer("torchao")
quantization = find_peer("torchao.quantization")

INT8 = quantization.Int8WeightOnlyConfig()


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu", "a": "disk"}, {"": torch.device("cpu")}])
def test_an_accelerator_is_not_touched_for_the_cpu(monkeypatch, device_map):
    def untouched():
        raise AssertionError

    monkeypatch.setattr(demands, "accelerator", untouched)
    demands.check_machine(INT8, device_map)


@pytest.mark.parametrize("device_map", ["auto", {"": "cuda:0"}, {"": 0, "a": "cpu"}])
def test_the_cpu_packs_what_an_accelerator_cannot(monkeypatch, device_map):
    tried = []

    def trial(config, shape, dtype, device):
        tried.append(device.type)
        return RuntimeError("no kernel") if device.type == "xpu" else torch.zeros(1)

    monkeypatch.setattr(demands, "accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(demands, "trial", trial)
    demands.check_machine(INT8, device_map)
    assert tried == ["xpu", "cpu"]
    assert demands.place(INT8, torch.device("xpu")) == torch.device("cpu")


def test_an_accelerator_packs_what_the_cpu_cannot(monkeypatch):
    def trial(config, shape, dtype, device):
        return RuntimeError("no kernel") if device.type == "cpu" else torch.zeros(1)

    monkeypatch.setattr(demands, "accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(demands, "trial", trial)
    assert demands.place(INT8, torch.device("cpu")) == torch.device("xpu")
    demands.check_machine(INT8, None)


def test_a_reason_that_is_not_known_is_told_in_torchaos_words(monkeypatch):
    monkeypatch.setattr(demands, "trial", lambda *_: RuntimeError("the moon is full\nand more"))
    monkeypatch.setattr(demands, "accelerator", lambda: None)
    with pytest.raises(BackendError, match=r"Int8WeightOnlyConfig needs what is not there: the moon is full$"):
        demands.check_machine(INT8, None)


@pytest.mark.parametrize(
    ("config", "shape", "expected"),
    [
        # Codes of half a byte, two bf16 numbers a group.
        (forms.build(forms.form_of_name("int4")), (64, 1024), 64 * 1024 // 2 + 64 * 8 * 4),
        # Filled up to whole tiles.
        (forms.build(forms.form_of_name("int4")), (60, 512), 64 * 1024 // 2 + 64 * 8 * 4),
        (quantization.Int4WeightOnlyConfig(group_size=32), (64, 512), 64 * 512 // 2 + 64 * 16 * 4),
    ],
)
def test_sizes_of_int4_are_known_without_its_kernels(config, shape, expected):
    assert demands.size(config, shape, torch.bfloat16) == expected


def test_a_shape_that_does_not_fit_gives_the_reason():
    found = demands.size(quantization.Int4WeightOnlyConfig(group_size=64), (64, 96), torch.bfloat16)
    assert found == "Int4WeightOnlyConfig leaves a weight of shape [64, 96] as it is"
    grouped = quantization.Int8WeightOnlyConfig(granularity=quantization.PerGroup(32))
    assert "not divisible by group size 32" in demands.size(grouped, (64, 40), torch.bfloat16)
    assert demands.size(INT8, (64, 40), torch.bfloat16) == 64 * 40 + 64 * 5
