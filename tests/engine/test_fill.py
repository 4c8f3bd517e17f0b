"""Filling arrays from a checkpoint gives the bytes of reading and quantizing tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weightpack as wp
from weightpack.mapping import Interleave, Rows
from weightpack.streaming import Component, Job, fill, layout

from .conftest import normal

NUMPY = {"BF16": ml_dtypes.bfloat16, "F16": "f2", "F32": "f4", "F64": "f8", "U8": "u1", "I8": "i1", "I64": "i8"}


def tensors() -> dict[str, np.ndarray]:
    return {
        "a.weight": normal((301, 512), 1),
        "a.bias": normal((301,), 2),
        "odd.weight": normal((7, 33), 3, np.float32),
        "c.weight": normal((64, 1024), 4, np.float64),
        "d.weight": np.zeros((33, 256), np.float16),
        "one.weight": normal((1, 1), 5),
        "none.weight": np.zeros((0, 256), ml_dtypes.bfloat16),
        "stack.weight": normal((3, 128, 256), 6),
        "large.weight": normal((2000, 1280), 7),
        "steps": np.arange(5, dtype=np.int64),
    }


@pytest.fixture
def model(make_model: Callable[..., Path]) -> wp.Checkpoint:
    return wp.open_checkpoint(make_model(tensors()))


def arrays(components: Sequence[Component]) -> list[np.ndarray]:
    """Arrays of another content than that of fresh memory."""
    made = [np.empty(shape, NUMPY[dtype]) for _, _, shape, dtype, _ in components]
    for array in made:
        array.reshape(-1).view(np.uint8).fill(0xA5)
    return made


def filled(checkpoint: wp.Checkpoint, jobs: Sequence[Job], **options: Any) -> list[dict[str, np.ndarray]]:
    """The arrays of each job, by suffix."""
    layouts = [layout(job, checkpoint[job.name]) for job in jobs]
    found = fill(checkpoint, jobs, [arrays(components) for components in layouts], **options)
    return [
        {component.suffix: array for component, array in zip(components, given, strict=True)}
        for components, given in zip(layouts, found, strict=True)
    ]


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape, name
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name


CASES = [
    ("bitsandbytes:nf4", {}),
    ("bitsandbytes:fp4", {}),
    ("bitsandbytes:nf4", {"double_quant": True}),
    ("bitsandbytes:nf4", {"block_size": 256}),
    ("bitsandbytes:int8", {}),
    ("gguf:q8_0", {}),
    ("gguf:q4_k", {}),
    ("bf16", {}),
    ("f16", {}),
    ("f32", {}),
]
WHOLE_BLOCKS = {"gguf:q8_0": 32, "gguf:q4_k": 256}


def fits(format: str, array: np.ndarray) -> bool:
    if format == "bitsandbytes:int8":
        return array.ndim == 2
    return array.shape[-1] % WHOLE_BLOCKS.get(format, 1) == 0


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("format", "params"), CASES)
def test_every_format_is_what_quantize_gives(model: wp.Checkpoint, format: str, params: dict, threads: int) -> None:
    stored = {name: array for name, array in tensors().items() if name != "steps" and fits(format, array)}
    assert len(stored) > 3
    jobs = [Job(name, format, params) for name in stored]
    for found, array in zip(filled(model, jobs, threads=threads), stored.values(), strict=True):
        same(found, wp.quantize(array, format, **params))


@pytest.mark.parametrize("through", ["bfloat16", "float16", "float32", "BF16"])
@pytest.mark.parametrize("format", ["bitsandbytes:nf4", "bitsandbytes:int8", "gguf:q8_0", "f32", "bf16"])
def test_weights_are_rounded_once_on_the_way(model: wp.Checkpoint, format: str, through: str) -> None:
    names = [name for name in ("c.weight", "large.weight", "d.weight") if fits(format, tensors()[name])]
    read = [model.read(name, through) for name in names]
    for found, array in zip(filled(model, [Job(name, format, through=through) for name in names]), read, strict=True):
        same(found, wp.quantize(array, format))


def test_rows_shape_and_add(model: wp.Checkpoint) -> None:
    stack, matrix = tensors()["stack.weight"], tensors()["a.weight"]
    jobs = [
        Job("a.weight", "bitsandbytes:nf4", rows=(Rows("a.weight", 300), Rows("a.weight", 0, 9)), shape=(10, 512)),
        Job("stack.weight", "gguf:q8_0", shape=(384, 256)),
        Job("stack.weight", "copy", shape=(384, 256)),
        Job("stack.weight", "f32", rows=(Rows("stack.weight", 128, 128),)),
        Job("a.weight", "copy", rows=(Rows("a.weight", 4, 8, Interleave(2)),)),
        Job("a.bias", "f32", add=1.0),
        Job("a.bias", "f32", add=1.0, through="float16"),
    ]
    found = filled(model, jobs)
    same(found[0], wp.quantize(np.concatenate([matrix[300:], matrix[:9]]), "nf4"))
    same(found[1], wp.quantize(stack.reshape(384, 256), "q8_0"))
    same(found[2], {"": stack.reshape(384, 256)})
    same(found[3], {"": stack[1].astype(np.float32)})
    same(found[4], {"": matrix[4:12].reshape(2, 2, 2, 512).transpose(0, 2, 1, 3).reshape(8, 512)})
    shifted = tensors()["a.bias"].astype(np.float32) + np.float32(1)
    same(found[5], {"": shifted})
    same(found[6], {"": shifted.astype(np.float16).astype(np.float32)})


def test_copies_are_the_stored_bytes(model: wp.Checkpoint) -> None:
    stored = tensors()
    for found, array in zip(filled(model, [Job(name, "copy") for name in stored]), stored.values(), strict=True):
        same(found, {"": array})


@pytest.mark.parametrize(
    ("to", "options"), [("nf4", {}), ("nf4", {"double_quant": True}), ("bitsandbytes:int8", {}), ("q4_k", {})]
)
def test_packed_tensors(make_model: Callable[..., Path], tmp_path: Path, to: str, options: dict[str, Any]) -> None:
    weights = {"layers.0.up_proj.weight": normal((512, 768), 1), "layers.1.up_proj.weight": normal((96, 256), 2)}
    target = tmp_path / ("packed.gguf" if to == "q4_k" else "packed")
    wp.convert(make_model(weights).parent, target, to=to, layers="names", **options)
    packed = wp.open_checkpoint(target)
    format = wp.formats_.find_format(to).name
    for kind in ("copy", format):
        jobs = [Job(name, kind, options) for name in weights]
        for found, array in zip(filled(packed, jobs), weights.values(), strict=True):
            same(found, wp.quantize(array, format, **options))
    (decoded,) = filled(packed, [Job("layers.0.up_proj.weight", "f32")])
    same(decoded, {"": packed.read("layers.0.up_proj.weight", "float32")})
    (again,) = filled(packed, [Job("layers.0.up_proj.weight", "gguf:q8_0", through="bfloat16")])
    same(again, wp.quantize(packed.read("layers.0.up_proj.weight", "bfloat16"), "q8_0"))
