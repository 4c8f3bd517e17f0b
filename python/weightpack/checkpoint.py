"""Opening a checkpoint: its tensors by name, read on demand.

```python
with weightpack.open_checkpoint("model/") as checkpoint:
    for name, entry in checkpoint.items():
        print(name, entry.shape, entry.format, entry.nbytes)
    weight = checkpoint.read("lm_head.weight", dtype="float32")
```
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .entry import FLOATS, Entry, Part
from .errors import CheckpointError, ConfigError, UnsupportedError
from .folder import BESIDE, Model, find_models, read_json
from .model_config import quantization_section

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from . import _rust

_NUMPY = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
_ML_DTYPES = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_NAMES = {
    **{name: name.upper() for name in FLOATS.values()},
    **{numpy: stored for stored, numpy in _NUMPY.items()},
    **{numpy: stored for stored, numpy in _ML_DTYPES.items()},
}


def _open(model: Model) -> _rust.Checkpoint:
    """The files of a model; its config says what their names leave open."""
    from . import _rust

    section = quantization_section(model.config)
    if section is None and model.folder is not None and (model.folder / BESIDE).is_file():
        section = read_json(model.folder / BESIDE)
    dtype = (model.config or {}).get("dtype") or (model.config or {}).get("torch_dtype")
    return _rust.Checkpoint.open(
        str(model.weights),
        False,
        None if section is None else json.dumps(section),
        {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(str(dtype)),
    )


class Checkpoint(Mapping[str, Entry]):
    """The tensors of one checkpoint, by name. Nothing is read until it is asked for.

    A packed weight and its statistics are one tensor. In a pipeline, names begin with the
    component: `transformer/proj_out.weight`.

    `path` is what was opened, `models` what was found there, `config` the parsed `config.json` (of
    a single model), or `None`.
    """

    def __init__(self, path: str | os.PathLike[str], models: list[Model]) -> None:
        self.path = Path(path)
        self.models = models
        self.config = models[0].config if len(models) == 1 and not models[0].component else None
        self._native: list[_rust.Checkpoint] = []
        self._entries: dict[str, Entry] = {}
        self._origin: dict[str, tuple[int, str]] = {}
        self.files: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.container = ""
        for number, model in enumerate(models):
            native = _open(model)
            self._native.append(native)
            prefix = f"{model.component}/" if model.component else ""
            described = _Description(prefix).parse(native.describe())
            self.container = described["container"]
            self.files += described["files"]
            self.warnings += [f"{prefix}{warning}" for warning in described["warnings"]]
            for entry in described["tensors"]:
                self._entries[entry.name] = entry
                self._origin[entry.name] = (number, entry.name.removeprefix(prefix))

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<Checkpoint {str(self.path)!r}: {len(self)} tensors>"

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the files. Entries stay; nothing can be read afterwards."""
        self._native.clear()

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What the files say about themselves. Arrays of more than 64 items are shown as type and
        count; `metadata_value` gives them whole."""
        if len(self._native) == 1:
            value: dict[str, Any] = json.loads(self._native[0].metadata())
            return value
        return {
            model.component: json.loads(native.metadata())
            for model, native in zip(self.models, self._native, strict=True)
        }

    def metadata_value(self, key: str) -> Any:
        """One metadata value of a GGUF file, whole. Raises `KeyError` when it is absent."""
        if len(self._native) != 1:
            raise ConfigError("metadata values are read from one file, not from a pipeline")
        return self._native[0].metadata_value(key)

    def read(self, name: str, dtype: str | None = None, out: Any = None, *, threads: int | None = None) -> Any:
        """The tensor called `name` as an array of its logical shape, decoded where it is packed.

        `dtype` is the element type wanted ("float32", "bfloat16", "float16"); by default the stored
        one, for packed tensors the one they were packed from, and float32 for GGUF blocks. Values
        are decoded in float32 and rounded once. Integers are given as stored. `out` is a
        C-contiguous numpy array, or a torch tensor on the CPU, to fill and return; its type and
        shape must be those of the result.

        Raises `KeyError` for an unknown name, `UnsupportedError` for a type that is not decoded.
        """
        import numpy as np

        entry = self._entries[name]
        number, own_name = self._origin[name]
        if not self._native:
            raise CheckpointError(f'checkpoint "{self.path}" is closed')
        stored = _stored_name(dtype, entry)
        expected = _numpy_dtype(stored, name)
        if out is None:
            from ._arrays import check_shape

            check_shape(entry.shape)
            out = np.empty(entry.shape, expected)
        if isinstance(out, np.ndarray):
            given, flat = out.dtype.name, out.reshape(-1).view(np.uint8) if out.flags.c_contiguous else None
        else:
            from ._arrays import view_output

            given, flat = str(out.dtype).removeprefix("torch."), view_output(out).data
        if flat is None or tuple(out.shape) != entry.shape or given != expected.name:
            raise ConfigError(
                f"out is {given} {list(out.shape)}, expected C-contiguous {expected.name} {list(entry.shape)} "
                f'(tensor "{name}")'
            )
        self._native[number].read(own_name, flat, stored, threads)
        return out

    def stream(self, dtype: str | None = None, *, threads: int | None = None) -> Iterator[tuple[str, NDArray[Any]]]:
        """Every tensor in the order of the files, one at a time: only one is in memory."""
        for name in self._entries:
            yield name, self.read(name, dtype, threads=threads)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a model folder, a pipeline folder, a `.safetensors`, an `*.index.json` or a `.gguf`.

    Headers are read and checked, weights are not. Raises `CheckpointError` when a file is malformed
    or it is unclear which is meant, `OSError` when it cannot be read.
    """
    return Checkpoint(path, find_models(path))


def native_checkpoint(checkpoint: Checkpoint, number: int = 0) -> _rust.Checkpoint:
    """The native object behind model `number` of a checkpoint, for building plans."""
    if not checkpoint._native:
        raise CheckpointError(f'checkpoint "{checkpoint.path}" is closed')
    return checkpoint._native[number]


def locate(checkpoint: Checkpoint, name: str) -> tuple[int, str]:
    """The model that holds tensor `name`, by number, and the tensor's name there."""
    return checkpoint._origin[name]


def is_element(stored: str) -> bool:
    """Whether arrays have a type of their own for the stored type: one element per number."""
    return stored in _NUMPY or stored in _ML_DTYPES


class _Description:
    """Turns the native description into entries while it is parsed: a checkpoint may have a hundred
    thousand tensors, and a dictionary takes several times the memory of an entry."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._paths: list[str] = []

    def parse(self, text: str) -> dict[str, Any]:
        described: dict[str, Any] = json.loads(text, object_hook=self._hook)
        return described

    def _hook(self, row: dict[str, Any]) -> Any:
        if "parts" in row:
            name, shape = self._prefix + row["name"], tuple(row["shape"])
            stored, weights, path = row["stored_bytes"], row["weights"], self._paths[row["file"]]
            return Entry(name, shape, row["dtype"], row["format"], stored, weights, tuple(row["parts"]), path)
        if "header_bytes" in row:
            # Files stand before the tensors in the description.
            self._paths.append(str(row["path"]))
            return row
        if "shape" in row:
            return Part(row["name"], row["dtype"], tuple(row["shape"]), row["bytes"])
        return row


def _stored_name(dtype: str | None, entry: Entry) -> str:
    """The storage type to ask for, in the words of the type table."""
    if dtype is None:
        return entry.dtype if entry.is_plain or entry.dtype in FLOATS else "F32"
    name = str(dtype).removeprefix("torch.").removeprefix("numpy.")
    stored = _NAMES.get(name.lower(), name.upper())
    if stored not in FLOATS:
        if stored == entry.dtype:
            return stored
        raise ConfigError(
            f'dtype "{dtype}" is none of {", ".join(_NAMES[name] for name in ("f64", "f32", "f16"))}, BF16'
        )
    if not entry.is_float:
        raise ConfigError(f'tensor "{entry.name}" holds {entry.dtype}, which is not cast to {dtype}')
    return stored


def _numpy_dtype(stored: str, name: str) -> Any:
    import numpy as np

    if stored in _NUMPY:
        return np.dtype(_NUMPY[stored])
    if stored in _ML_DTYPES:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, _ML_DTYPES[stored]))
    raise UnsupportedError(f'{stored} is not decoded by this version (tensor "{name}")')
