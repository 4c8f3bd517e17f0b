"""Filling arrays from a checkpoint gives the bytes of reading and quantizing tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weightpack as wp
from weightpack import errors
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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("format", ["bitsandbytes:nf4", "bitsandbytes:int8", "f32", "copy"])
def test_transposed_matrices(model: wp.Checkpoint, format: str, threads: int) -> None:
    names = ["a.weight", "odd.weight", "c.weight", "d.weight", "one.weight", "large.weight"]
    if format != "bitsandbytes:int8":
        names.append("none.weight")
    found = filled(model, [Job(name, format, transpose=True) for name in names], threads=threads)
    for name, given in zip(names, found, strict=True):
        expected = np.ascontiguousarray(tensors()[name].T)
        same(given, {"": expected} if format == "copy" else wp.quantize(expected, format))


def test_what_is_transposed(model: wp.Checkpoint, make_model: Callable[..., Path]) -> None:
    joined = Job(
        "a.weight", "nf4", {"double_quant": True}, through="float16", rows=(Rows("a.weight", 1),), transpose=True
    )
    (found,) = filled(model, [joined])
    expected = np.ascontiguousarray(tensors()["a.weight"][1:].astype(np.float16).T)
    same(found, wp.quantize(expected, "nf4", double_quant=True))
    tall = normal((20_000, 96), 8)
    (found,) = filled(
        wp.open_checkpoint(make_model({"tall.weight": tall}, "tall")), [Job("tall.weight", "nf4", transpose=True)]
    )
    same(found, wp.quantize(np.ascontiguousarray(tall.T), "nf4"))
    stack = tensors()["stack.weight"]
    (found,) = filled(model, [Job("stack.weight", "bf16", transpose=True)])
    same(found, wp.quantize(np.ascontiguousarray(stack.swapaxes(-1, -2)), "bf16"))
    for name in ("a.bias", "steps"):
        told = broken(Job(name, "copy", transpose=True), model, [np.empty(1, np.uint8)])
        assert "is not transposed: only matrices of plain numbers are" in told
        assert name in told
    told = broken(Job("a.weight", "f32", shape=(512, 301), transpose=True), model)
    assert told.startswith("ConfigError: a transposed matrix is not put into another shape")


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
    if to == "q4_k":
        (found,) = filled(packed, [Job("layers.0.up_proj.weight", format, through="float32")])
        same(found, wp.quantize(weights["layers.0.up_proj.weight"], format))
    (decoded,) = filled(packed, [Job("layers.0.up_proj.weight", "f32")])
    same(decoded, {"": packed.read("layers.0.up_proj.weight", "float32")})
    (again,) = filled(packed, [Job("layers.0.up_proj.weight", "gguf:q8_0", through="bfloat16")])
    same(again, wp.quantize(packed.read("layers.0.up_proj.weight", "bfloat16"), "q8_0"))


def test_a_file_may_leave_out_a_table(make_model: Callable[..., Path]) -> None:
    weights = normal((64, 64))
    packed = wp.quantize(weights, "bitsandbytes:int8")
    stored = {"a.weight": packed[""], "a.SCB": packed["SCB"]}
    checkpoint = wp.open_checkpoint(make_model(stored))
    copied, whole = filled(checkpoint, [Job("a.weight", "copy"), Job("a.weight", "bitsandbytes:int8")])
    same(copied, {"": packed[""], "SCB": packed["SCB"]})
    same(whole, packed)


def test_a_pipeline_and_torch_tensors(make_model: Callable[..., Path], tmp_path: Path, peer: Any) -> None:
    torch = peer("torch")
    weights = {name: {"proj.weight": normal((64, 96), seed)} for seed, name in enumerate(("transformer", "vae"))}
    (tmp_path / "model_index.json").write_text(json.dumps({name: ["diffusers", "Model"] for name in weights}))
    for name, stored in weights.items():
        path = make_model(stored, name)
        path.rename(path.with_name("diffusion_pytorch_model.safetensors"))
    checkpoint = wp.open_checkpoint(tmp_path)
    jobs = [Job(f"{name}/proj.weight", "f32", through=torch.float16) for name in ("vae", "transformer", "vae")]
    out = [[torch.full((64, 96), 7.0)] for _ in jobs]
    found = fill(checkpoint, jobs, out)
    for job, (tensor,), (given,) in zip(jobs, found, out, strict=True):
        assert tensor is given
        expected = weights[job.name.partition("/")[0]]["proj.weight"].astype(np.float16).astype(np.float32)
        assert np.array_equal(tensor.numpy(), expected)
    half = [torch.empty(64, 96, dtype=torch.bfloat16)]
    fill(checkpoint, [Job("vae/proj.weight", "copy")], [half])
    assert half[0].view(torch.int16).numpy().tobytes() == weights["vae"]["proj.weight"].tobytes()


def broken(job: Job, checkpoint: wp.Checkpoint, out: list[np.ndarray] | None = None) -> str:
    """What is said about a job; the one before it must not have been begun."""
    first = [np.full((7, 33), 3, np.float32)]
    if out is None:
        out = arrays(layout(job, checkpoint[job.name]))
    with pytest.raises(errors.WeightpackError) as raised:
        fill(checkpoint, [Job("odd.weight", "copy"), job], [first, out])
    assert (first[0] == 3).all()
    return f"{type(raised.value).__name__}: {raised.value}"


def test_every_job_is_checked_before_any_is_begun(model: wp.Checkpoint) -> None:
    file = f'file "{model["a.weight"].file}"'
    short = arrays(layout(Job("a.weight", "nf4"), model["a.weight"]))
    short[1] = short[1][:-1]
    told = broken(Job("a.weight", "nf4"), model, short)
    assert told.startswith('FormatError: component "absmax": expected 9632 bytes, got 9628 (tensor "a.weight"')
    assert file in told
    told = broken(Job("a.bias", "copy"), model, [np.empty(300, np.uint16)])
    assert told.startswith('FormatError: array "a.bias": expected 602 bytes, got 600 (tensor "a.bias"')
    two = [np.empty(301, np.uint16), np.empty(1)]
    assert "3 arrays for the 2 of 2 tensors" in broken(Job("a.bias", "copy"), model, two)
    cases = {
        ("a.bias", "bitsandbytes:int8"): "FormatError",
        ("odd.weight", "gguf:q8_0"): "FormatError",
        ("steps", "bitsandbytes:nf4"): "UnsupportedError",
        ("a.weight", "gguf:iq1_s"): "UnsupportedError",
    }
    for (name, format), kind in cases.items():
        told = broken(Job(name, format), model, [np.empty(1, np.uint8)])
        assert told.startswith(kind)
        assert name in told
        assert file in told
    for job in (
        Job("a.weight", "nf4", {"block_size": 3}),
        Job("a.weight", "copy", add=1.0),
        Job("a.weight", "copy", through="float16"),
        Job("a.weight", "nf4", through="F64"),
        Job("a.weight", "f32", shape=(3, 3)),
        Job("a.weight", "f32", rows=(Rows("a.weight", 0, 500),), shape=(500, 512)),
    ):
        assert broken(job, model, [np.empty(1, np.uint8)]).startswith("ConfigError")
    with pytest.raises(KeyError):
        fill(model, [Job("nowhere", "copy")], [[]])
    with pytest.raises(errors.ConfigError, match="did you mean"):
        fill(model, [Job("a.weight", "nf5")], [[]])
    with pytest.raises(errors.ConfigError, match="1 lists of arrays for 2"):
        fill(model, [Job("a.weight", "copy")] * 2, [[]])
    with pytest.raises(errors.ConfigError, match="not known"):
        layout(Job("a.weight", "f32", rows=(Rows("a.weight"), Rows("stack.weight"))), model["a.weight"])
    with pytest.raises(errors.FormatError, match="contiguous"):
        fill(model, [Job("a.weight", "copy")], [[np.empty((512, 301), np.uint16).T]])
    again = np.empty((301, 512), np.uint16)
    with pytest.raises(errors.ConfigError, match="shares memory"):
        fill(model, [Job("a.weight", "copy")] * 2, [[again], [again]])
    with pytest.raises(errors.ConfigError, match="shares memory"):
        fill(model, [Job("a.bias", "copy")] * 2, [[again[0, :301]], [again.reshape(-1)[300:601]]])
    fixed = np.empty((301, 512), np.uint16)
    fixed.flags.writeable = False
    with pytest.raises(errors.FormatError, match="read-only"):
        fill(model, [Job("a.weight", "copy")], [[fixed]])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_weights_that_are_not_finite(make_model: Callable[..., Path], tmp_path: Path, threads: int) -> None:
    stored = {"a.weight": normal((900, 1024)), "b.weight": normal((700, 1024), 2, np.float32)}
    stored["a.weight"][800, 7] = np.nan
    stored["b.weight"][1, 0] = 1e5
    source = make_model(stored)
    checkpoint = wp.open_checkpoint(source)
    with pytest.raises(errors.FormatError) as converting:
        wp.convert(source.parent, tmp_path / "out", to="nf4", layers="names", only=["a.weight", "b.weight"])
    with pytest.raises(errors.FormatError) as filling:
        filled(checkpoint, [Job(name, "nf4") for name in stored], threads=threads)
    assert str(filling.value) == str(converting.value)
    assert "weight 819207 is NaN" in str(filling.value)
    with pytest.raises(errors.FormatError, match=r"weight 1024 is inf, .*b\.weight"):
        filled(checkpoint, [Job("b.weight", "nf4", through="float16")], threads=threads)
    (kept,) = filled(checkpoint, [Job("a.weight", "nf4", {"keep_nonfinite": True})], threads=threads)
    same(kept, wp.quantize(stored["a.weight"], "nf4", keep_nonfinite=True))
    (cast,) = filled(checkpoint, [Job("a.weight", "f32")], threads=threads)
    same(cast, {"": stored["a.weight"].astype(np.float32)})


@pytest.mark.parametrize("format", ["copy", "bitsandbytes:nf4"])
def test_a_file_that_was_cut_short(make_model: Callable[..., Path], format: str) -> None:
    source = make_model({"a.weight": normal((64, 64)), "b.weight": normal((64, 64))})
    checkpoint = wp.open_checkpoint(source)
    with source.open("r+b") as file:
        file.truncate(source.stat().st_size - 1)
    with pytest.raises(errors.CheckpointError, match=r"file ends at byte .*tensor \"b.weight\", file .*model.saf"):
        filled(checkpoint, [Job(name, format) for name in checkpoint])


def test_progress_is_told_and_can_stop_the_work(model: wp.Checkpoint) -> None:
    jobs = [Job("large.weight", "gguf:q4_k")] * 40
    seen = []
    filled(model, jobs, on_progress=lambda *told: seen.append(told))
    assert seen
    assert all(0 <= read <= total == 40 * 2000 * 1280 * 2 for read, total, _, _ in seen)
    assert all(written <= 40 * 2000 * 720 for _, _, written, _ in seen)
    assert {name for *_, name in seen} == {"large.weight"}
    assert seen == sorted(seen)

    def stop(*told: Any) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        filled(model, jobs, on_progress=stop)
