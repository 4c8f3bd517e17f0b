"""A model that came from a GGUF file, on its way back: the names, the order and the pairs of that file.

| tensor of the file | what is written |
|---|---|
| blocks in the model | these blocks, rows in the order of the file |
| plain, and the model's values are those that were loaded | the stored bytes |
| plain, changed | the values in memory, in the file's type if that holds them, else in the model's |
| decoded while loading, or merged since | the values in memory, in the model's type |
| not in the model (computed by it, or passed over) | the stored bytes |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .._lazy import require
from ..entry import FLOATS, Entry
from ..errors import ConfigError, FormatError, UnsupportedError
from ..gguf.blocks import dequantize
from ..loading.gguf_origin import Origin, holds
from ..mapping import MappedTensor, Rows
from ..quantizers.dtypes import of_stored, stored_name
from ..stored import Stored
from .gguf_draft import Draft

_PURPOSE = "save models"
_STEP = 1 << 15
"""Values that are looked at at a time: they stay in the cache, and torch starts no threads for so few."""
_FOLDER = "a path that does not end in .gguf gets a folder, which holds every parameter"


def draft_back(state: Mapping[str, Any], parameters: Sequence[Stored], origin: Origin) -> Draft:
    """The file `origin` with the tensors of `state`, by their names in the model. `parameters` are all that a
    checkpoint of the model would hold, by their names there.

    Raises `ConfigError` for a parameter that has no place in the file, and for a tensor of the file that
    neither the model nor `origin` has.
    """
    draft = Draft()
    draft.header = origin.header
    for entry in origin.entries:
        draft.most_dimensions = max(draft.most_dimensions, len(entry.shape))
        made = origin.made_of.get(entry.name)
        if made is not None:
            _add(draft, entry, made, state, origin)
        elif entry.name in origin.kept:
            _add_kept(draft, entry, origin)
        else:
            raise ConfigError(
                f'the file that the model came from holds "{entry.name}", {entry.nbytes} bytes that the model '
                "has no place for, and they were not kept",
                hint=_FOLDER,
            )
    claimed = {_place(state[rows.name]) for made in origin.made_of.values() for rows in made.sources}
    for stored in parameters:
        if _place(stored.tensor) not in claimed and stored.tensor.numel():
            _add_more(draft, stored, origin)
    return draft


def _add(draft: Draft, entry: Entry, made: MappedTensor, state: Mapping[str, Any], origin: Origin) -> None:
    tensors = []
    for rows in made.sources:
        if rows.name not in state:
            raise ConfigError(
                f'the model has no "{rows.name}" any more, which "{entry.name}" of its file was',
                hint="adapters are merged, or taken off, before the model is saved",
            )
        tensors.append(state[rows.name])
        if tensors[-1].device.type == "meta":
            raise FormatError(f'"{rows.name}" is not in memory: bring the model back from the disk first')
    if entry.name in origin.kept and _is_unchanged(entry, made, tensors, origin.kept[entry.name]):
        _add_kept(draft, entry, origin)
        return
    kind, tensors, suffix = _of_one_type(tensors)
    wanted = _written_type(entry, made, kind, tensors)
    sources = []
    for rows, tensor in zip(made.sources, tensors, strict=True):
        name = f"{rows.name}{suffix}"
        draft.source(name, kind, entry.shape if rows.is_whole else _shape_by_rows(tensor, entry), tensor)
        sources.append(Rows(name, rows.first, rows.count, rows.interleave))
    row: dict[str, Any] = {"checkpoint": 0, "name": sources[0].name, "as": entry.name, "format": "copy"}
    if not (len(sources) == 1 and sources[0].is_whole):
        row |= {"rows": [rows.to_dict() for rows in sources], "shape": list(entry.shape)}
    if wanted != kind or made.add is not None:
        row["format"] = FLOATS[wanted]
    if made.add is not None:
        row["add"] = made.add
    draft.tensors.append(row)


def _add_kept(draft: Draft, entry: Entry, origin: Origin) -> None:
    name = f"stored {entry.name}"
    draft.source(name, entry.dtype, entry.shape, origin.kept[entry.name])
    draft.tensors.append({"checkpoint": 0, "name": name, "as": entry.name, "format": "copy"})


def _add_more(draft: Draft, stored: Stored, origin: Origin) -> None:
    """A parameter that was not in the file."""
    if origin.prefix is None:
        raise ConfigError(
            f'"{stored.name}" was not in the file that the model came from, and its name there is not known',
            hint=_FOLDER,
        )
    name, kind = f"more {stored.name}", _kind(stored.tensor)
    shape = _shape(stored.tensor)
    draft.source(name, kind, shape, stored.tensor)
    draft.most_dimensions = max(draft.most_dimensions, len(shape))
    row = {"checkpoint": 0, "name": name, "as": origin.prefix + stored.name, "format": "copy"}
    draft.tensors.append(row)


def _kind(tensor: Any) -> str:
    """Type of blocks, or of elements, as files name it."""
    return str(getattr(tensor, "quant_type", None) or stored_name(tensor.dtype))


def _shape(tensor: Any) -> tuple[int, ...]:
    """Shape of the weights."""
    return tuple(getattr(tensor, "quant_shape", None) or tensor.shape)


def _place(tensor: Any) -> tuple[Any, int]:
    return tensor.device, tensor.data_ptr()


def _shape_by_rows(tensor: Any, entry: Entry) -> tuple[int, ...]:
    """The tensor's shape in rows as `entry` has them."""
    weights = math.prod(_shape(tensor))
    return (weights // entry.shape[-1], entry.shape[-1]) if len(entry.shape) > 1 else (weights,)


def _of_one_type(tensors: Sequence[Any]) -> tuple[str, list[Any], str]:
    """Their common type, the tensors in it, and what tells them from those that are as they were. Blocks beside
    plain numbers are decoded."""
    kinds = {_kind(tensor) for tensor in tensors}
    if len(kinds) == 1:
        return kinds.pop(), list(tensors), ""
    plain = kinds & FLOATS.keys()
    wanted = plain.pop() if len(plain) == 1 else "F32"
    dtype = of_stored(wanted)
    made = [tensor.dequantize(dtype) if _kind(tensor) not in FLOATS else tensor.to(dtype) for tensor in tensors]
    return wanted, made, f" as {wanted}"


def _written_type(entry: Entry, made: MappedTensor, kind: str, tensors: Sequence[Any]) -> str:
    """The type that a tensor is written in whose values are of type `kind`."""
    if kind not in FLOATS:
        if made.add is not None or (kind != entry.dtype and entry.is_plain and entry.dtype not in FLOATS):
            raise UnsupportedError(f'"{entry.name}" is {entry.dtype} in its file, and {kind} in the model')
        return kind
    if entry.is_plain and entry.dtype in FLOATS:
        dtype = of_stored(entry.dtype)
        if made.add is not None or holds(dtype, of_stored(kind)):
            return entry.dtype
        if all(_fits(tensor, dtype) for tensor in tensors):
            return entry.dtype
    # Readers built on ggml take vectors in float32 alone.
    return kind if len(entry.shape) > 1 else "F32"


def _fits(tensor: Any, dtype: Any) -> bool:
    """Whether `dtype` has all values of a tensor, some of which are looked at at a time."""
    parts = tensor.detach().reshape(-1).split(_STEP)
    return all(bool((part.to(dtype).to(part.dtype) == part).all()) for part in parts)


def _is_unchanged(entry: Entry, made: MappedTensor, tensors: Sequence[Any], kept: Any) -> bool:
    """Whether the model's tensors hold what loading makes of the stored bytes."""
    if not all(tensor.is_floating_point() for tensor in tensors):
        return False
    torch = require("torch", _PURPOSE)
    if entry.is_plain:
        loaded = kept.view(of_stored(entry.dtype)).reshape(entry.shape).float()
    else:
        loaded = dequantize(kept, entry.dtype, dtype=torch.float32).reshape(entry.shape)
    if made.add is not None:
        loaded = loaded - made.add
    found = torch.cat([_in_file_order(rows, t.cpu(), entry) for rows, t in zip(made.sources, tensors, strict=True)])
    return bool(torch.equal(found.reshape(entry.shape), loaded.to(found.dtype)))


def _in_file_order(rows: Rows, tensor: Any, entry: Entry) -> Any:
    """The rows of one tensor that are part of `entry`."""
    found = tensor.reshape(_shape_by_rows(tensor, entry))
    if rows.count is not None:
        found = found[rows.first : rows.first + rows.count]
    if rows.interleave is not None:
        groups, parts = rows.interleave.groups, rows.interleave.parts
        found = found.reshape(groups, parts, -1, *found.shape[1:]).transpose(1, 2).reshape(found.shape)
    return found
