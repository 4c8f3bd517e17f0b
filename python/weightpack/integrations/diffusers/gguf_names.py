"""What diffusers' own functions for single files make of a checkpoint's names, without a weight.

Each class has a function that turns the original names into its own, and on the way cuts and joins
tensors by rows. It is given stand-ins that only remember which rows of which tensor they are; what
they have become is a list of rows for the engine, and packed rows stay packed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ..._lazy import require
from ...mapping import MappedTensor, Rows

_PURPOSE = "name the tensors of its models"
_PREFIX = "model.diffusion_model."
"""Some functions only know names behind this; files of one model alone leave it out."""


def gguf_names(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[MappedTensor] | None:
    """The tensors of `model`, a diffusers model, in a file whose tensors have these shapes; `None` where
    diffusers has no function for its class, or one that does more than cut and join rows."""
    known = require("diffusers.loaders.single_file_model", _PURPOSE).SINGLE_FILE_LOADABLE_CLASSES
    row = next((known[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in known), None)
    if row is None:
        return None
    own = set(model.state_dict())
    best: list[MappedTensor] | None = None
    for prefix in ("", _PREFIX):
        stand_ins = {prefix + name: StandIn.whole(name, shape) for name, shape in shapes.items()}
        try:
            made = row["checkpoint_mapping_fn"](config=model.config, checkpoint=stand_ins)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            continue
        found = [value.mapped(name, shapes) for name, value in made.items() if isinstance(value, StandIn)]
        if sum(tensor.name in own for tensor in found) > sum(tensor.name in own for tensor in best or ()):
            best = found
    return best


class StandIn:
    """A tensor of `shape` that is made of rows of stored ones, in this order. A row is a run along the
    last dimension, and of a vector one element. `runs` is `None` once a change of shape has put rows
    of another length in it: it may then only be used as it is.
    """

    def __init__(self, shape: Sequence[int], runs: Sequence[tuple[str, int, int]], *, has_rows: bool = True) -> None:
        self.shape = tuple(shape)
        self._runs = tuple(runs)
        self._has_rows = has_rows

    @classmethod
    def whole(cls, name: str, shape: tuple[int, ...]) -> StandIn:
        """A stored tensor as it is."""
        return cls(shape, [(name, 0, _rows(shape))])

    def mapped(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> MappedTensor:
        """What it has become, as the tensor `name`."""
        first, begin, count = self._runs[0]
        if len(self._runs) == 1 and (begin, count) == (0, _rows(shapes[first])):
            return MappedTensor(name, (Rows(first),), None if self.shape == shapes[first] else self.shape)
        total = sum(count for _, _, count in self._runs)
        joined = (total, self.shape[-1]) if len(shapes[first]) > 1 else (total,)
        rows = tuple(Rows(source, begin, count) for source, begin, count in self._runs)
        return MappedTensor(name, rows, None if self.shape == joined else self.shape)

    # What the functions do with tensors.

    ndim = property(lambda self: len(self.shape))

    def size(self, dim: int | None = None) -> Any:
        """As a tensor's."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As a tensor's."""
        return len(self.shape)

    def numel(self) -> int:
        """As a tensor's."""
        return prod(self.shape)

    def _same(self, *args: Any, **options: Any) -> StandIn:
        return self

    clone = contiguous = detach = to = float = cpu = _same

    def chunk(self, chunks: int, dim: int = 0) -> tuple[StandIn, ...]:
        """As a tensor's, by rows."""
        size = -(-self.shape[0] // chunks)
        return self.split(size, dim)

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> tuple[StandIn, ...]:
        """As a tensor's, by rows."""
        if dim not in (0, -len(self.shape)):
            raise TypeError("not by rows")
        if isinstance(sizes, int):
            sizes = [min(sizes, self.shape[0] - first) for first in range(0, self.shape[0], sizes)]
        if sum(sizes) != self.shape[0]:
            raise ValueError(f"parts of {list(sizes)} of {self.shape[0]} rows")
        firsts = [sum(sizes[:number]) for number in range(len(sizes))]
        return tuple(self[first : first + size] for first, size in zip(firsts, sizes, strict=True))

    def __getitem__(self, key: Any) -> StandIn:
        if not isinstance(key, slice):
            raise TypeError("not by rows")
        first, last, step = key.indices(self.shape[0])
        if step != 1 or last < first or not self._has_rows:
            raise TypeError("not by rows")
        unit = _rows(self.shape) // max(1, self.shape[0])
        wanted, end = first * unit, last * unit
        runs, place = [], 0
        for name, begin, count in self._runs:
            low, high = max(wanted, place), min(end, place + count)
            if low < high:
                runs.append((name, begin + low - place, high - low))
            place += count
        return StandIn((last - first, *self.shape[1:]), runs)

    def reshape(self, *shape: Any) -> StandIn:
        """As a tensor's."""
        sizes = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if -1 in sizes:
            sizes[sizes.index(-1)] = self.numel() // max(1, -prod(sizes))
        if prod(sizes) != self.numel():
            raise ValueError(f"shape {sizes} of {self.numel()} elements")
        same_rows = bool(sizes) and bool(self.shape) and len(sizes) > 1 and sizes[-1] == self.shape[-1]
        return StandIn(sizes, self._runs, has_rows=self._has_rows and (same_rows or tuple(sizes) == self.shape))

    view = reshape

    def squeeze(self, *dims: int) -> StandIn:
        """As a tensor's."""
        drop = {dim % len(self.shape) for dim in dims} or set(range(len(self.shape)))
        return self.reshape([size for dim, size in enumerate(self.shape) if size != 1 or dim not in drop])

    def unsqueeze(self, dim: int) -> StandIn:
        """As a tensor's."""
        sizes = list(self.shape)
        sizes.insert(dim if dim >= 0 else dim + len(sizes) + 1, 1)
        return self.reshape(sizes)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("cat", "concat", "concatenate"):
            return _joined(*args, **(kwargs or {}))
        if name in ("chunk", "split", "reshape", "squeeze", "unsqueeze", "clone"):
            return getattr(args[0], name)(*args[1:], **(kwargs or {}))
        raise TypeError(f"{name} is not by rows")


def _joined(tensors: Sequence[Any], dim: int = 0) -> StandIn:
    first = tensors[0]
    if dim not in (0, -len(first.shape)) or not all(
        isinstance(one, StandIn) and one._has_rows and one.shape[1:] == first.shape[1:] for one in tensors
    ):
        raise TypeError("not by rows")
    runs: list[tuple[str, int, int]] = []
    for name, begin, count in (run for one in tensors for run in one._runs):
        if runs and runs[-1][0] == name and runs[-1][1] + runs[-1][2] == begin:
            # Parts that were cut from each other are one again.
            runs[-1] = (name, runs[-1][1], runs[-1][2] + count)
        else:
            runs.append((name, begin, count))
    return StandIn((sum(one.shape[0] for one in tensors), *first.shape[1:]), runs)


def _rows(shape: Sequence[int]) -> int:
    return prod(shape[:-1]) if len(shape) > 1 else prod(shape)
