"""Opening GGUF files: `open` and what it gives."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _arrays, _rust
from ..errors import CheckpointError, ConfigError, UnsupportedError
from .blocks import _slice, as_rows

_STEP_WEIGHTS = 4 << 20
"""Weights decoded at a time into an array whose rows stand apart."""


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of a file, as its header describes it."""

    name: str
    shape: tuple[int, ...]
    """Shape of the weights, the row last."""
    type: str
    """Tensor type: `F32`, `Q4_K`; `type 99` for one that this version does not know."""
    nbytes: int
    """Bytes of its data."""
    offset: int
    """First byte of its data, from the start of the file."""
    path: str
    """File that holds it."""


@dataclass(frozen=True, slots=True)
class GGUFProblem:
    """A block that cannot be meant."""

    tensor: str
    """Name of the tensor."""
    block: int
    """Number of its first such block (for plain numbers, of the element)."""
    fault: str
    """What its scale is: `NaN` or `infinite`."""


class GGUFMetadata(Mapping[str, Any]):
    """The key-value pairs of a file, in file order. A value is read when it is asked for.

    Numbers, bools and texts come as such, arrays of numbers as numpy arrays, arrays of texts as lists of
    `str`, arrays of arrays as lists of arrays.
    """

    def __init__(self, native: _rust.Checkpoint) -> None:
        self._native = native
        self._fields = {key: (kind, count) for key, kind, count in native.metadata_fields()}

    def __getitem__(self, key: str) -> Any:
        return self._native.metadata_item(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __contains__(self, key: object) -> bool:
        return key in self._fields

    def __repr__(self) -> str:
        return f"<GGUFMetadata: {len(self)} keys>"

    def type(self, key: str) -> str:
        """Type of a value as the file has it: `u32`, `str`, `[f32]`. Raises `KeyError`."""
        return self._fields[key][0]

    def count(self, key: str) -> int | None:
        """Number of items of an array, `None` for other values. Raises `KeyError`."""
        return self._fields[key][1]


class GGUFFile:
    """A GGUF file, or all files of a model that was split; see `open`.

    `path` is what was opened, `files` all files of the model, `metadata` the key-value pairs,
    `tensors` the tensors by name in file order, `warnings` what is tolerated but worth telling.
    """

    def __init__(self, path: str | os.PathLike[str], *, lenient: bool = False) -> None:
        self.path = Path(path)
        self._native: _rust.Checkpoint | None = _rust.Checkpoint.open(str(path), lenient)
        described = json.loads(self._native.describe())
        if described["container"] != "gguf":
            raise CheckpointError(f'file "{path}" is {described["container"]}, expected gguf')
        self._bytes = {str(file["path"]): int(file["bytes"]) for file in described["files"]}
        self._maps: dict[str, NDArray[np.uint8]] = {}
        self._big_endian = bool(described["big_endian"])
        self.files = tuple(self._bytes)
        self.warnings: tuple[str, ...] = tuple(described["warnings"])
        self.metadata = GGUFMetadata(self._native)
        tensors = {}
        for row in described["tensors"]:
            (part,) = row["parts"]
            path_of_file = self.files[row["file"]]
            shape = tuple(part["shape"])
            tensors[row["name"]] = GGUFTensor(
                row["name"], shape, part["dtype"], part["bytes"], part["offset"], path_of_file
            )
        self.tensors: Mapping[str, GGUFTensor] = MappingProxyType(tensors)

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GGUFFile {str(self.path)!r}: {len(self.tensors)} tensors>"

    def close(self) -> None:
        """Lets go of the files. Arrays that `raw` gave stay valid; nothing more can be read."""
        self._native = None
        self._maps.clear()

    @property
    def architecture(self) -> str | None:
        """What the file says the model is (`llama`, `flux`); `None` if it does not."""
        found = self.metadata.get("general.architecture")
        return found if isinstance(found, str) else None

    def read(
        self,
        name: str,
        dtype: Any = None,
        rows: slice | range | None = None,
        out: Any = None,
        *,
        threads: int | None = None,
    ) -> Any:
        """The weights of a tensor, decoded in float32 and rounded once to `dtype`.

        `dtype` is float32 (the default), float16, bfloat16 or float64; tensors of integers are given as
        they are stored. `rows` picks rows without reading the others: a `slice` or `range` of step 1,
        counted over all leading dimensions; the result is then [number of rows, n]. `out`, a numpy array
        or a torch tensor on the CPU, is filled instead of a new array and gives the dtype; its rows may
        stand apart.

        Returns `out`, or a new numpy array. Raises `KeyError` for an unknown name, `UnsupportedError` for
        a type that is not decoded, `FormatError` or `ConfigError` for an `out` that does not fit.
        """
        native, tensor = self._open(), self.tensors[name]
        shape = list(tensor.shape)
        every = prod(shape[:-1])
        first, last = 0, every
        if rows is not None:
            first, last, step = _slice(rows).indices(every)
            if step != 1:
                raise ConfigError(f"rows is {rows!r}, expected a step of 1")
            last = max(first, last)
            shape = [last - first, shape[-1] if shape else 1]
        stored = tensor.type if tensor.type in _INTEGERS else None
        if stored is not None and not (dtype is None or np.dtype(dtype).name == _INTEGERS[stored]):
            raise UnsupportedError(f'{stored} values are not turned into {dtype} (tensor "{name}")')
        if out is None:
            wanted = stored or _arrays.dtype_name("float32" if dtype is None else dtype)
            seen = _arrays.empty(shape, wanted, torch=False)
            native.read(name, seen.data, wanted, threads, (first, last))
            return seen.array
        target = _arrays.view_strided(out) if stored else _arrays.view_strided_output(out)
        if list(target.shape) != shape:
            raise ConfigError(f'out has shape {list(target.shape)}, expected {shape} (tensor "{name}")')
        if target.dtype is None or (dtype is not None and stored is None and _arrays.dtype_name(dtype) != target.dtype):
            raise ConfigError(f'out is {out.dtype}, and dtype says {dtype} (tensor "{name}")')
        if stored is not None and target.dtype != stored:
            raise ConfigError(f'out is {out.dtype}, expected {_INTEGERS[stored]} (tensor "{name}")')
        if target.data.flags.c_contiguous:
            native.read(name, target.data.reshape(-1), target.dtype, threads, (first, last))
            return out
        step = max(1, _STEP_WEIGHTS // max(1, shape[-1]))
        done = 0
        for place in _rows_of(target.data):
            for start in range(0, len(place), step):
                part = place[start : start + step]
                buffer = np.empty(part.shape, np.uint8)
                begin = first + done
                native.read(name, buffer.reshape(-1), target.dtype, threads, (begin, begin + len(part)))
                part[...] = buffer
                done += len(part)
        return out

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes of a tensor: uint8 [..., bytes of a row], or one run of bytes for a type that
        this version does not know.

        The array lies on the mapped file: nothing is copied or read until it is looked at, and it cannot
        be written to. It stays valid after `close`. As with every mapped file, a program that looks at
        pages of a file which was cut short meanwhile is killed by the system; `read` does not map.

        Raises `KeyError` for an unknown name, `CheckpointError` when the file has changed its length,
        `UnsupportedError` for a big-endian file.
        """
        self._open()
        tensor = self.tensors[name]
        if self._big_endian:
            raise UnsupportedError(f'file "{self.path}" is big-endian: its blocks are only read decoded')
        if tensor.path not in self._maps:
            mapped = np.memmap(tensor.path, np.uint8, "r")
            if mapped.size != self._bytes[tensor.path]:
                raise CheckpointError(f'file "{tensor.path}" changed while it was open')
            self._maps[tensor.path] = mapped.view(np.ndarray)
        data = self._maps[tensor.path][tensor.offset : tensor.offset + tensor.nbytes]
        leading = tensor.shape[:-1]
        if tensor.type.startswith("type "):
            return data
        _arrays.check_shape(tensor.shape)
        return data.reshape(*leading, tensor.nbytes // max(1, prod(leading)))

    def verify(self, *, threads: int | None = None) -> list[GGUFProblem]:
        """Reads all data and checks what ggml checks of it: that the scales of every block, and all plain
        floats, are finite numbers. Gives the first bad block of each tensor, in file order."""
        return [GGUFProblem(*problem) for problem in self._open().verify(threads, None)]

    def _open(self) -> _rust.Checkpoint:
        if self._native is None:
            raise CheckpointError(f'file "{self.path}" is closed')
        return self._native


_INTEGERS = {name: dtype.name for name, dtype in _arrays.NUMPY_DTYPES.items() if dtype.kind == "i"}


def _rows_of(array: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """The array as views of rows, in order."""
    if array.ndim <= 2:
        yield as_rows(array)
    else:
        for part in array:
            yield from _rows_of(part)


def open(path: str | os.PathLike[str], *, lenient: bool = False) -> GGUFFile:
    """Opens a GGUF file, with all its siblings if the model was split (any part may be named).

    The header is read and checked, the data is not. `lenient` takes files of careless writers: an empty
    key and data that is not aligned become `warnings`.

    Raises `CheckpointError` for a malformed file, `OSError` for one that cannot be read.

    >>> import numpy as np, tempfile, weightpack as wp
    >>> path = tempfile.mkdtemp() + "/small.gguf"
    >>> wp.gguf.write(path, {"w": np.ones((2, 32), np.float32)}, {"general.architecture": "none"}, types="Q8_0")
    >>> with wp.gguf.open(path) as file:
    ...     file.architecture, file.tensors["w"].type, file.read("w", rows=slice(1, 2)).shape
    ('none', 'Q8_0', (1, 32))
    """
    return GGUFFile(path, lenient=lenient)
