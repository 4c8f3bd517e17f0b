"""Tensors of a model as the engine's source: where they lie, their bytes are read slab by slab."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from .errors import FormatError
from .quantizers.dtypes import stored_name


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
        """Stored type, "BF16"."""
        return stored_name(self.tensor.dtype)

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
        tensor = self.tensor.detach()
        if tensor.device.type == "meta":
            raise FormatError(f'"{self.name}" is not in memory: bring the model back from the disk first')
        if tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_neg():
            from . import _arrays

            return _arrays.view(tensor).data
        return Reader(tensor)


class Reader:
    """Bytes of a tensor that no array of this machine's memory holds in order: one on an accelerator, or
    one that is not contiguous. Only what is asked for is brought together."""

    def __init__(self, tensor: Any) -> None:
        while tensor.dim() > 1 and tensor.shape[0] == 1:
            tensor = tensor[0]
        self._tensor = tensor

    def __call__(self, offset: int, count: int) -> Any:
        """`count` bytes from byte `offset` on, as a flat array."""
        from . import _arrays

        size = int(self._tensor.element_size())
        first, end = offset // size, -(-(offset + count) // size)
        data = _arrays.view(self._elements(first, end).cpu()).data
        return data[offset - first * size :][:count]

    def _elements(self, first: int, end: int) -> Any:
        tensor = self._tensor
        if tensor.dim() < 2:
            return tensor.reshape(-1)[first:end]
        per_row = prod(tensor.shape[1:])
        row = first // per_row
        rows = tensor[row : -(-end // per_row)]
        return rows.reshape(-1)[first - row * per_row : end - row * per_row]


def distinct(state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` without further names of the same memory seen in the same way."""
    seen: set[tuple[Any, ...]] = set()
    kept = {}
    for name, tensor in state.items():
        key = tuple((part.device, part.data_ptr(), part.shape, part.stride(), part.dtype) for part in _parts(tensor))
        if tensor.device.type != "meta" and tensor.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = tensor
    return kept


def _parts(tensor: Any) -> list[Any]:
    """The tensors that have memory: those that `tensor` is made of, or itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names = tensor.__tensor_flatten__()[0]
    return [part for name in names for part in _parts(getattr(tensor, name))]
