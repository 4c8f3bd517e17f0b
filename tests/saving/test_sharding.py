"""Weights files are cut where huggingface_hub cuts them: names, tensors of each, index and total size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")
from hypothesis import example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors import safe_open  # noqa: E402

from weightpack import _rust  # noqa: E402
from weightpack.saving.parts import Part, _request, write  # noqa: E402
from weightpack.sizes import parse_size  # noqa: E402
from weightpack.stored import Stored, distinct  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn]


@st.composite
def states(draw: Any) -> dict[str, Any]:
    """Tensors of many sizes and types, some not contiguous, in an order of their own.

    At most one has no elements: the hub takes several such for views of one memory and keeps them together.
    """
    state = {}
    is_empty = False
    for number in range(draw(st.integers(1, 14))):
        shape = draw(st.sampled_from([(), (0,), (1,), (3,), (7, 5), (64,), (40, 25), (100, 100), (2, 0, 3)]))
        tensor = torch.zeros(shape, dtype=draw(st.sampled_from(DTYPES)))
        if is_empty and not tensor.numel():
            continue
        is_empty = is_empty or not tensor.numel()
        if tensor.dim() == 2 and draw(st.booleans()):
            tensor = tensor.t()
        state[f"{draw(st.sampled_from('zamb'))}.{number}"] = tensor
    return state or {"a": torch.zeros(3)}


SIZES = st.one_of(
    st.integers(1, 300),
    st.integers(300, 100_000),
    st.sampled_from(["1KB", "0.5KB", "4KB", "20KB", "1MB", "5GB", "0.001MB"]),
)


def by_hub(state: dict[str, Any], size: int | str, pattern: str) -> Any:
    return hub.split_torch_state_dict_into_shards(state, max_shard_size=size, filename_pattern=pattern)


def planned(part: Part, size: int | str) -> dict[str, set[str]]:
    """The files of a plan, and the tensors of each."""
    most = parse_size(size, "max_shard_size")
    request, checkpoint = _request("made", Path("/nowhere/out"), [part], most, {}, {}, 1)
    plan = json.loads(_rust.Plan.build(json.dumps(request), [checkpoint]).describe())
    files: dict[str, set[str]] = {}
    for tensor in plan["tensors"]:
        files.setdefault(tensor["file"], set()).add(tensor["as"])
    return files


def big(*kilobytes: int) -> dict[str, Any]:
    return {f"t{number}": torch.zeros(size * 1000, dtype=torch.uint8) for number, size in enumerate(kilobytes)}


@settings(max_examples=150, deadline=None)
@given(state=states(), size=SIZES, variant=st.sampled_from([None, "fp16"]))
@example(state=big(9, 1, 1), size="2KB", variant=None)
@example(state=big(1, 1, 9), size="2KB", variant=None)
@example(state=big(1, 9, 1), size="2KB", variant="fp16")
@example(state=big(2, 2, 2), size=2000, variant=None)
def test_files_are_those_of_the_hub(state: dict[str, Any], size: int | str, variant: str | None) -> None:
    infix = f".{variant}" if variant else ""
    theirs = by_hub(state, size, f"model{infix}{{suffix}}.safetensors")
    part = Part([Stored(name, tensor) for name, tensor in state.items()], "model", variant=variant)
    ours = planned(part, size)
    assert ours == {file: set(names) for file, names in theirs.filename_to_tensors.items()}


CASES: list[tuple[dict[str, Any], int | str]] = [
    (big(1, 2, 3, 4), 1),
    (big(1, 2, 3, 4), "5GB"),
    (big(9, 1, 1, 9), "2KB"),
    ({"b": torch.zeros(40, 30).t(), "a": torch.zeros((), dtype=torch.int64), "c": torch.zeros(0)}, 8),
]


@pytest.mark.parametrize(("state", "size"), CASES)
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_names_index_and_total_size_on_the_disk(
    tmp_path: Path, state: dict[str, Any], size: int | str, variant: str | None
) -> None:
    infix = f".{variant}" if variant else ""
    theirs = by_hub(state, size, f"diffusion_pytorch_model{infix}{{suffix}}.safetensors")
    part = Part([Stored(name, tensor) for name, tensor in state.items()], "diffusion_pytorch_model", variant=variant)
    write("made", tmp_path / "out", [part], max_shard_bytes=parse_size(size, "max_shard_size"))
    index = tmp_path / "out" / f"diffusion_pytorch_model.safetensors.index{infix}.json"
    files = {path.name for path in (tmp_path / "out").iterdir()} - {index.name}
    assert files == set(theirs.filename_to_tensors)
    for file, names in theirs.filename_to_tensors.items():
        with safe_open(tmp_path / "out" / file, "pt") as held:
            assert set(held.keys()) == set(names)
            for name in names:
                assert torch.equal(held.get_tensor(name), state[name])
    assert index.exists() == theirs.is_sharded
    if theirs.is_sharded:
        told = json.loads(index.read_text())
        assert told["weight_map"] == theirs.tensor_to_filename
        assert told["metadata"]["total_size"] == theirs.metadata["total_size"]
        # Besides what the hub writes only the mark that tells one save from another.
        assert set(told["metadata"]) == {"total_size", "weightpack.plan"}


def test_memory_that_is_shared() -> None:
    """The same memory seen in the same way is stored once, as hosts do before they ask the hub. Other views
    of it are tensors by themselves, because that is what is in a file: each is counted with its own bytes,
    where the hub counts the memory once and keeps them together."""
    whole = torch.arange(1000, dtype=torch.uint8)
    state = {"a": whole, "b": whole, "c": whole[:500], "d": torch.zeros(700, dtype=torch.uint8)}
    kept = distinct(state)
    assert list(kept) == ["a", "c", "d"]
    part = Part([Stored(name, tensor) for name, tensor in kept.items()], "model")
    own = {name: tensor.clone() for name, tensor in kept.items()}
    for size in (1, 600, 1000, 1200, 1500, 3000):
        theirs = by_hub(own, size, "model{suffix}.safetensors")
        assert planned(part, size) == {file: set(names) for file, names in theirs.filename_to_tensors.items()}


def test_what_belongs_together_is_cut_as_one() -> None:
    """Statistics that a reader looks for beside their weight: as if they were one tensor."""
    state = big(1, 1, 1, 1)
    stored = [Stored(name, tensor, with_previous=name in ("t1", "t3")) for name, tensor in state.items()]
    files = planned(Part(stored, "model"), 1500)
    assert sorted(map(sorted, files.values())) == [["t0", "t1"], ["t2", "t3"]]
    assert sorted(map(sorted, planned(Part(stored, "model"), 4000).values())) == [["t0", "t1", "t2", "t3"]]
