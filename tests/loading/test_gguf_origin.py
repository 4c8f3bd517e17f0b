"""What is remembered of a GGUF file, and how its tensors are made of the model's again."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import weightpack as wp  # noqa: E402
from tests.loading.test_gguf_source import GGUF, Net, make, packed_file  # noqa: E402
from weightpack.entry import Entry  # noqa: E402
from weightpack.loading.gguf_origin import holds, turned_round  # noqa: E402
from weightpack.mapping import Interleave, MappedTensor, Rows  # noqa: E402


def entry(name, *shape):
    weights = int(np.prod(shape))
    return Entry(name, shape, "F32", "f32", 4 * weights, weights)


def carried_out(tensors, sources):
    """What a plan makes of arrays, as the engine carries it out."""
    made = {}
    for tensor in tensors:
        parts = []
        for rows in tensor.sources:
            part = sources[rows.name][rows.first :][: rows.count]
            if rows.interleave is not None:
                groups, count = rows.interleave.groups, rows.interleave.parts
                part = part.reshape(groups, count, -1, *part.shape[1:]).swapaxes(1, 2).reshape(part.shape)
            parts.append(part)
        made[tensor.name] = np.concatenate(parts) + (tensor.add or 0)
    return made


@pytest.mark.parametrize("seed", range(20))
def test_what_was_cut_joined_and_turned_comes_back(seed):
    random = np.random.default_rng(seed)
    stored = {f"f{number}": random.random((24, 4)) for number in range(4)} | {"vector": random.random(24)}
    pieces = []
    for name in ("f0", "f1", "f2", "f3"):
        cuts = sorted({0, 24, *(12 * random.integers(0, 2, 1)).tolist()})
        for first, last in pairwise(cuts):
            turned = Interleave(*[(2, 2), (1, 3), (2, 3)][random.integers(3)]) if random.random() < 0.5 else None
            pieces.append(Rows(name, first, last - first, turned))
    random.shuffle(pieces)
    half = len(pieces) // 2
    tensors = [
        MappedTensor("m0", tuple(pieces[:half])),
        MappedTensor("m1", tuple(pieces[half:])),
        MappedTensor("m2", (Rows("vector"),), add=-1.0),
    ]
    made = carried_out(tensors, stored)
    back = turned_round(tensors, {name: entry(name, *array.shape) for name, array in stored.items()})
    assert set(back) == set(stored)
    assert back["vector"].sources[0].is_whole
    assert back["vector"].add == 1.0
    for name, found in carried_out(back.values(), made).items():
        assert np.allclose(found, stored[name]), name
        assert name == "vector" or np.array_equal(found, stored[name])


def test_rows_that_are_nowhere_and_rows_that_are_twice():
    entries = {"a": entry("a", 6, 2), "b": entry("b", 6, 2)}
    back = turned_round([MappedTensor("x", (Rows("a", 2, 4),)), MappedTensor("y", (Rows("b"),))], entries)
    assert set(back) == {"b"}
    back = turned_round([MappedTensor("x", (Rows("a"),)), MappedTensor("y", (Rows("a"),))], entries)
    assert back["a"].sources == (Rows("x"),)


def test_which_types_hold_which():
    assert holds(torch.float32, torch.bfloat16)
    assert holds(torch.float32, torch.float16)
    assert holds(torch.int64, torch.int64)
    for wide, narrow in ((torch.bfloat16, torch.float16), (torch.float16, torch.float32), (torch.int64, torch.int32)):
        assert not holds(wide, narrow)


def test_the_origin_of_a_model(tmp_path):
    path = packed_file(tmp_path / "net.gguf", make())
    origin = Net.from_pretrained(path, quantization_config=GGUF).hf_quantizer.origin
    assert [one.name for one in origin.entries] == list(wp.gguf.open(path).tensors)
    assert (origin.kept, origin.prefix) == ({}, "")
    (tmp_path / "pairs.gguf").write_bytes(origin.header)
    with wp.gguf.open(tmp_path / "pairs.gguf") as pairs, wp.gguf.open(path) as file:
        assert not pairs.tensors
        assert list(pairs.metadata) == list(file.metadata)
    assert copy.deepcopy(origin) is origin
    assert pickle.loads(pickle.dumps(origin)) == origin
    narrow = Net.from_pretrained(path, quantization_config=GGUF, torch_dtype="bfloat16").hf_quantizer.origin
    vectors = {name for name, value in make().state_dict().items() if value.ndim < 2}
    assert set(narrow.kept) == vectors
    assert sum(array.nbytes for array in narrow.kept.values()) < 10_000
    # A model that is not kept packed, or by another backend, needs none.
    assert not hasattr(Net.from_pretrained(path), "hf_quantizer")
