"""Tensors of a checkpoint into arrays, encoded on the way: what quantizing while loading is made of.

```python
jobs = [Job(name, "bitsandbytes:nf4", through="bfloat16") for name in names]
arrays = [[make(shape, dtype) for _, _, shape, dtype, _ in layout(job, checkpoint[job.name])] for job in jobs]
arrays = fill(checkpoint, jobs, arrays)
```

Beside the arrays, memory does not grow with the checkpoint: each thread keeps one slab of a tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from .checkpoint import Checkpoint, is_element, locate, native_checkpoint
from .entry import FLOATS, Entry, Part
from .errors import ConfigError
from .mapping import Rows
from .targets import COPY, find_format


@dataclass(frozen=True)
class Job:
    """One tensor and what it becomes.

    `name` is its name in the checkpoint, `format` a name of the format table or "copy" for the
    stored bytes as they are, `params` what `quantize` takes beside the array: `block_size`,
    `double_quant`, `keep_nonfinite`, and `dtype`, the type to record as the one the weights had (by
    default `through`, or that of the checkpoint). `through` rounds the weights once, to bfloat16,
    float16 or float32, before they are encoded: as if the model had been loaded in that type.

    `rows`, where given, are rows of tensors that joined in this order are the tensor (`name` is then
    the name of one of these), `shape` the shape of the result where it is not that of the source (the
    same weights in the same order), and `add` is added to every weight before it is rounded.
    `transpose` exchanges rows and columns of a matrix, or of each matrix of a stack.
    """

    name: str
    format: str
    params: Mapping[str, Any] = field(default_factory=dict)
    through: Any = None
    rows: tuple[Rows, ...] = ()
    shape: tuple[int, ...] | None = None
    add: float | None = None
    transpose: bool = False


class Component(NamedTuple):
    """One array that a job fills.

    `suffix` is which one it is: what its name in a file has behind the tensor's and a dot ("appended") or an
    underscore ("joined"), in place of its last segment ("sibling"), or behind that segment between underscores
    ("flattened"), as `naming` says. `shape` and `dtype`, a stored type ("F32"), are those of the array; blocks of GGUF
    types are rows of "U8", and what is no element of arrays is "U8" in one dimension. If `late`, the
    array is as long as it can get, and is cut when it is filled.
    """

    suffix: str
    naming: str
    shape: tuple[int, ...]
    dtype: str
    late: bool


def layout(job: Job, entry: Entry) -> list[Component]:
    """The arrays that `job` needs, `entry` being the tensor called `job.name`: one per component of
    the format, or for "copy" one per stored array.

    Raises `FormatError` for a shape and `ConfigError` for parameters that the format cannot take.
    """
    shape = _shape(job, entry)
    if job.format == COPY:
        return [_copied(part, entry.parts[0].name) for part in _parts(job, entry, shape)]
    from . import _rust

    params = _params(job)
    params.setdefault("dtype", entry.dtype if job.through is None else _type_name(job.through))
    rows = json.loads(_rust.layout(find_format(job.format).name, list(shape), json.dumps(params)))
    return [
        Component(row["suffix"], row["naming"], *_array(row["shape"], row["dtype"], row["bytes"]), row["late"])
        for row in rows
    ]


def fill(
    checkpoint: Checkpoint,
    jobs: Sequence[Job],
    out: Sequence[Sequence[Any]],
    *,
    threads: int | None = None,
    on_progress: Callable[[int, int, int, str], None] | None = None,
) -> list[list[Any]]:
    """Carries `jobs` out into `out`: for each job its arrays, as `layout` lists them.

    Arrays are contiguous numpy arrays or torch tensors on the CPU, of any element type; only their
    sizes in bytes count. `threads` is the number of threads, by default one per processor; the
    bytes do not depend on it. `on_progress(read, total, written, tensor)`, in bytes, is called about
    ten times a second on this thread.

    Gives the arrays back, those whose length is only known at the end cut to it. Every job is
    checked before anything is read; after an error the content of the arrays is undefined.

    Raises `KeyError` for an unknown tensor, `FormatError` for a tensor that the format cannot take
    (weights that are not finite among them) and for an array of the wrong size, `CheckpointError`
    for a file that is cut short.
    """
    from . import _arrays

    if len(jobs) != len(out):
        raise ConfigError(f"{len(out)} lists of arrays for {len(jobs)} tensors")
    groups: dict[int, list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(locate(checkpoint, job.name)[0], []).append(index)
    lengths: dict[int, list[int]] = {}
    for number, indexes in groups.items():
        rows = [_row(checkpoint, jobs[index]) for index in indexes]
        flat = [_arrays.view_memory(array).data for index in indexes for array in out[index]]
        native = native_checkpoint(checkpoint, number)
        found = native.fill(json.dumps(rows), flat, threads, on_progress)
        lengths.update(zip(indexes, found, strict=True))
    return [
        [_cut(array, length) for array, length in zip(arrays, lengths[index], strict=True)]
        for index, arrays in enumerate(out)
    ]


def _cut(array: Any, length: int) -> Any:
    """The first `length` bytes of an array, which is one of bytes unless it is all of it."""
    return array if array.nbytes == length else array[:length]


def _row(checkpoint: Checkpoint, job: Job) -> dict[str, Any]:
    """How the engine is asked for one tensor."""
    format = job.format if job.format == COPY else find_format(job.format).name
    row: dict[str, Any] = {"name": locate(checkpoint, job.name)[1], "format": format}
    if job.params:
        row["params"] = _params(job)
    if job.through is not None:
        row["through"] = _type_name(job.through)
    if job.rows:
        row["rows"] = [{**rows.to_dict(), "name": locate(checkpoint, rows.name)[1]} for rows in job.rows]
    if job.shape is not None:
        row["shape"] = list(job.shape)
    if job.add is not None:
        row["add"] = job.add
    if job.transpose:
        row["transpose"] = True
    return row


def _params(job: Job) -> dict[str, Any]:
    params = {name: value for name, value in job.params.items() if value is not None}
    if "dtype" in params:
        params["dtype"] = _type_name(params["dtype"])
    return params


def _type_name(dtype: Any) -> str:
    """The stored type of `dtype`: "BF16" for itself, "bfloat16", and the types of numpy and torch."""
    if isinstance(dtype, str) and dtype in FLOATS:
        return dtype
    from . import _arrays

    return _arrays.dtype_name(dtype)


def _shape(job: Job, entry: Entry) -> tuple[int, ...]:
    """The shape of the result."""
    shape = _source_shape(job, entry)
    return (*shape[:-2], *reversed(shape[-2:])) if job.transpose else shape


def _source_shape(job: Job, entry: Entry) -> tuple[int, ...]:
    """The shape before rows and columns are exchanged."""
    if job.shape is not None:
        return job.shape
    if not job.rows:
        return entry.shape
    is_matrix = len(entry.shape) > 1
    of_entry = math.prod(entry.shape[:-1]) if is_matrix else math.prod(entry.shape)
    count = 0
    for rows in job.rows:
        if rows.count is None and rows.name != entry.name:
            raise ConfigError(
                f'the number of rows of "{rows.name}" is not known (tensor "{job.name}")',
                hint="give the job a shape, or the rows a count",
            )
        count += of_entry - rows.first if rows.count is None else rows.count
    return (count, entry.shape[-1]) if is_matrix else (count,)


def _parts(job: Job, entry: Entry, shape: tuple[int, ...]) -> Sequence[Part]:
    """The arrays that copying gives."""
    if shape == entry.shape or len(entry.parts) != 1:
        return entry.parts
    part = entry.parts[0]
    nbytes = part.nbytes * math.prod(shape) // entry.weights if entry.weights else 0
    return [Part(part.name, part.dtype, shape, nbytes)]


def _copied(part: Part, base: str) -> Component:
    shape, dtype = _array(part.shape, part.dtype, part.nbytes)
    if part.name == base:
        return Component("", "appended", shape, dtype, False)
    if part.name.startswith(f"{base}."):
        return Component(part.name.removeprefix(f"{base}."), "appended", shape, dtype, False)
    return Component(part.name.rpartition(".")[2], "sibling", shape, dtype, False)


def _array(shape: Sequence[int], dtype: str, nbytes: int) -> tuple[tuple[int, ...], str]:
    """Shape and element type of a stored array; blocks are rows of bytes."""
    if is_element(dtype):
        return tuple(shape), dtype
    if dtype in _blocks():
        weights, block_bytes = _blocks()[dtype]
        return (*shape[:-1], shape[-1] // weights * block_bytes), "U8"
    return (nbytes,), "U8"


@cache
def _blocks() -> dict[str, tuple[int, int]]:
    """Weights and bytes of a block of each GGUF type."""
    from . import _rust

    return {row["name"]: (row["block_weights"], row["block_bytes"]) for row in json.loads(_rust.types())}
