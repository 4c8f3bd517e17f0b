"""Tensors of a model as the engine's source: where they lie, their bytes are read slab by slab."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ._lazy import require
from .errors import FormatError
from .quantizers.dtypes import STORED


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint to be: its name there and where its bytes come from.

    `with_previous`: it stays in the weights file of the one before, because a reader looks for it there.
    """

    name: str
    tensor: Any
    with_previous: bool = False

    @property
    def dtype(self) -> str:
        """Stored type, "BF16". Raises `FormatError` for one that files have no name for."""
        name = str(self.tensor.dtype).removeprefix("torch.")
        if name not in STORED:
            raise FormatError(f'"{self.name}" has elements of {name}, which safetensors files have no type for')
        return STORED[name]

    @property
    def shape(self) -> list[int]:
        """Sizes, slowest dimension first."""
        return [int(size) for size in self.tensor.shape]

    @property
    def bytes(self) -> int:
        """Data bytes, of a tensor made of several all of theirs."""
        return sum(int(part.numel() * part.element_size()) for part in _parts(self.tensor))

    def source(self) -> Any:
        """The bytes in the machine's memory as they are, or a function that reads some of them.

        Raises `FormatError` for a tensor that has no content.
        """
        if isinstance(self.tensor, Computed):
            return self.tensor.read
        tensor = self.tensor.detach()
        if tensor.device.type == "meta":
            raise FormatError(f'"{self.name}" is not in memory: bring the model back from the disk first')
        if str(tensor.layout) != "torch.strided":
            raise FormatError(f'"{self.name}" is sparse ({tensor.layout}), and files hold dense tensors')
        is_lazy = tensor.is_neg() or tensor.is_conj()
        if tensor.device.type == "cpu" and tensor.is_contiguous() and not is_lazy:
            from . import _arrays

            return _arrays.view(tensor).data
        return Reader(tensor)


class Reader:
    """Bytes of a tensor that no array of this machine's memory holds in order: one on an accelerator, or
    one that is not contiguous. Only what is asked for is brought together."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __call__(self, offset: int, count: int) -> Any:
        """`count` bytes from byte `offset` on, as a flat array."""
        from . import _arrays

        size = int(self._tensor.element_size())
        first, end = offset // size, -(-(offset + count) // size)
        pieces = _elements(self._tensor, first, end)
        flat = pieces[0] if len(pieces) == 1 else require("torch", "save models").cat(pieces)
        data = _arrays.view(flat.cpu().resolve_conj()).data
        return data[offset - first * size :][:count]


def _elements(tensor: Any, first: int, end: int) -> list[Any]:
    """Elements `first` up to `end` of a tensor in order, as flat ones that make no more than they hold."""
    if first >= end or not tensor.numel():
        return [tensor.new_empty(0)]
    if tensor.dim() < 2:
        return [tensor.reshape(-1)[first:end]]
    per_row = prod(tensor.shape[1:])
    row = first // per_row
    if end <= (row + 1) * per_row:
        return _elements(tensor[row], first - row * per_row, end - row * per_row)
    # Whole rows, and parts of the one before and the one behind them.
    whole, last = -(-first // per_row), end // per_row
    pieces = [tensor[whole:last].reshape(-1)]
    if first < whole * per_row:
        pieces = [*_elements(tensor[row], first - row * per_row, per_row), *pieces]
    if last * per_row < end:
        pieces.extend(_elements(tensor[last], 0, end - last * per_row))
    return pieces


class Computation:
    """Several tensors that are made at once: when a byte of the first is asked for, until as many bytes have
    been read as they have together."""

    def __init__(self, run: Callable[[], Mapping[str, Any]]) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._made: Mapping[str, Any] | None = None
        self._left_bytes = 0

    def result(self, name: str) -> Any:
        """One of the tensors."""
        with self._lock:
            return self._made[name] if self._made is not None else self._run()[name]

    def read(self, name: str, offset: int, count: int) -> Any:
        """Bytes of one of the tensors."""
        with self._lock:
            if self._made is None:
                self._made = self._run()
                self._left_bytes = sum(int(one.numel() * one.element_size()) for one in self._made.values())
            tensor = self._made[name]
            self._left_bytes -= count
            if self._left_bytes <= 0:
                self._made = None
        return Reader(tensor.detach())(offset, count)


class Computed:
    """A tensor of a computation, which is not there yet. `like` is one without values of its type and shape,
    `device` where it will be."""

    def __init__(self, computation: Computation, name: str, like: Any, device: Any) -> None:
        self._computation = computation
        self._name = name
        self._like = like
        self.dtype = like.dtype
        self.shape = like.shape
        self.device = device

    def numel(self) -> int:
        """Number of elements."""
        return int(self._like.numel())

    def element_size(self) -> int:
        """Bytes of an element."""
        return int(self._like.element_size())

    def detach(self) -> Any:
        """The tensor itself."""
        return self._computation.result(self._name)

    def read(self, offset: int, count: int) -> Any:
        """`count` bytes from byte `offset` on, as a flat array."""
        return self._computation.read(self._name, offset, count)


def distinct(state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` without further names of the same memory seen in the same way."""
    seen: set[tuple[Any, ...]] = set()
    kept = {}
    for name, tensor in state.items():
        key = place_of(tensor)
        if tensor.device.type != "meta" and tensor.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = tensor
    return kept


def place_of(tensor: Any) -> tuple[Any, ...]:
    """What two tensors have in common if they are the same memory seen in the same way."""
    return tuple((part.device, part.data_ptr(), part.shape, part.stride(), part.dtype) for part in _parts(tensor))


def _parts(tensor: Any) -> list[Any]:
    """The tensors that have memory: those that `tensor` is made of, or itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names = tensor.__tensor_flatten__()[0]
    return [part for name in names for part in _parts(getattr(tensor, name))]
