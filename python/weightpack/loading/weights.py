"""Weights on their way from the file into the model: read, packed and set in batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._lazy import require
from ..entry import FLOATS
from ..errors import CheckpointError, FormatError
from ..placement import DISK, Placement
from ..quantizers.dtypes import of_stored, stored_name
from ..quantizers.modules import owner
from ..streaming import Job, layout
from .heap import give_back
from .host import Target
from .keys import Logical
from .source import Weights

BATCH_BYTES = 128 << 20
"""Bytes of arrays that are filled at a time. Those that become parameters on the CPU stay; the rest is
let go of before the next batch."""
PASSING_BYTES = 32 << 20
"""Bytes of full-precision weights that are held at a time on their way to a backend's own packer."""


@dataclass
class _Item:
    """One target, the jobs that bring it into memory, and their arrays."""

    target: Target
    jobs: list[Job] = field(default_factory=list)
    out: list[list[Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """Component names, where the arrays of the only job are those of a packed weight."""
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Component name to job and array, where the components are read as they are stored."""
    given: list[Any] | None = None
    """The tensors themselves, where they are in memory already."""
    components: dict[str, Any] | None = None
    """The components of a packed weight, where they are in memory already."""

    is_passing: bool = False
    """Whether what is read is packed, or put together, from memory."""

    @property
    def nbytes(self) -> int:
        arrays = [*(array for arrays in self.out for array in arrays), *(self.given or ())]
        return sum(int(array.nbytes) for array in arrays)


class Loader:
    """Fills one model. `dtype_of(name)` is the `torch.dtype` of a floating tensor that is not packed,
    `None` for the stored one; `set_tensor(name, tensor, device)` puts it in its place."""

    def __init__(
        self,
        model: Any,
        weights: Weights,
        logical: Mapping[str, Logical],
        quantizer: Any,
        placement: Placement,
        *,
        dtype_of: Callable[[str], Any],
        torch_dtype: Any,
        set_tensor: Callable[[str, Any, str], None],
        threads: int | None,
        on_progress: Callable[[int, int, str], None] | None,
    ) -> None:
        self._torch = require("torch", "load models")
        self._model = model
        self._weights = weights
        self._logical = logical
        self._quantizer = quantizer
        self._placement = placement
        self._dtype_of = dtype_of
        self._torch_dtype = torch_dtype
        self._set_tensor = set_tensor
        self._threads = threads
        self._on_progress = on_progress
        self._passed = 0

    def load(self, targets: Sequence[Target]) -> None:
        """Reads and sets all of them; what fails is told with the tensor's name."""
        batch: list[_Item] = []
        size = passing = done = 0
        total = sum(self._stored_bytes(target) for target in targets)
        for target in targets:
            item = self._item(target)
            nbytes = item.nbytes
            more = nbytes if item.is_passing else 0
            if batch and (size + nbytes > BATCH_BYTES or passing + more > PASSING_BYTES):
                self._flush(batch)
                batch, size, passing = [], 0, 0
            batch.append(item)
            size += nbytes
            passing += more
            done += self._stored_bytes(target)
            if self._on_progress is not None:
                self._on_progress(done, total, target.name)
        self._flush(batch)
        if self._passed:
            give_back()

    def _stored_bytes(self, target: Target) -> int:
        return sum(self._logical[source].stored_bytes for source in target.sources)

    # What to read.

    def _item(self, target: Target) -> _Item:
        item = _Item(target, is_passing=target.merge is not None)
        tensor = self._logical[target.sources[0]]
        if tensor.is_packed and target.merge is None and (self._is_quantized(target.name) or tensor.entry is None):
            return self._stored_components(item, tensor)
        if self._is_quantized(target.name) and target.merge is None:
            chosen = self._quantizer.packing(self._model, target.name)
            if chosen is not None:
                return self._packed(item, tensor, chosen)
            item.is_passing = True
            return self._whole(item, target.sources, None)
        return self._whole(item, target.sources, None if target.merge else self._dtype_of(target.name))

    def _is_quantized(self, name: str) -> bool:
        quantizer = self._quantizer
        on_disk = self._placement.of(name) == DISK
        return quantizer is not None and not on_disk and quantizer.check_if_quantized_param(self._model, name)

    def _stored_components(self, item: _Item, tensor: Logical) -> _Item:
        arrays = {name: self._weights.array(entry.parts[number].name) for name, (entry, number) in tensor.parts.items()}
        if not item.target.rows and all(array is not None for array in arrays.values()):
            item.components = {name: self._kept(array) for name, array in arrays.items()}
            return item
        numbers: dict[str, int] = {}
        for component, (entry, number) in tensor.parts.items():
            if entry.name not in numbers:
                numbers[entry.name] = len(item.jobs)
                rows = item.target.rows if component == "" else ()
                self._add(item, Job(entry.name, "copy", rows=rows), entry)
            item.parts[component] = (numbers[entry.name], number)
        return item

    def _packed(self, item: _Item, tensor: Logical, chosen: Any) -> _Item:
        assert tensor.entry is not None
        target = item.target
        in_memory = self._weights.array(tensor.entry.parts[0].name) is not None and not self._weights.is_lent
        if in_memory:
            # The quantizer packs it itself.
            return self._whole(item, target.sources, None)
        job = Job(
            tensor.entry.name,
            chosen.format,
            params=chosen.params,
            through=chosen.through,
            rows=target.rows,
            shape=chosen.shape or target.shape,
            add=target.add,
            transpose=chosen.transpose,
        )
        self._add(item, job, tensor.entry)
        item.names = [component.suffix for component in layout(job, tensor.entry)]
        return item

    def _whole(self, item: _Item, sources: Sequence[str], dtype: Any) -> _Item:
        held = [self._held(source, item.target) for source in sources]
        if all(value is not None for value in held):
            item.given = held
            return item
        for source in sources:
            entry = self._logical[source].entry
            if entry is None:
                raise CheckpointError(f'"{source}" is packed, and the model has no packed layer for it')
            target = item.target
            stored = entry.dtype if entry.is_plain else "F32"
            wanted = stored if dtype is None or not entry.is_float else stored_name(dtype)
            if (entry.is_plain and wanted == stored and target.add is None) or wanted not in FLOATS:
                job = Job(entry.name, "copy", rows=target.rows, shape=target.shape)
            else:
                kind = FLOATS[wanted]
                job = Job(entry.name, kind, rows=target.rows, shape=target.shape, add=target.add)
            self._add(item, job, entry)
        return item

    def _held(self, source: str, target: Target) -> Any | None:
        """A plain tensor that is in memory and needs no rows taken out of it."""
        entry = self._logical[source].entry
        if entry is None or not entry.is_plain or target.rows or target.add is not None:
            return None
        return self._weights.array(entry.parts[0].name)

    def _kept(self, array: Any) -> Any:
        """An array that the model may keep."""
        return array if self._weights.is_lent else array.clone()

    def _add(self, item: _Item, job: Job, entry: Any) -> None:
        torch = self._torch
        item.jobs.append(job)
        item.out.append([torch.empty(part.shape, dtype=of_stored(part.dtype)) for part in layout(job, entry)])

    # What becomes of it.

    def _flush(self, batch: list[_Item]) -> None:
        jobs = [job for item in batch for job in item.jobs]
        out = [arrays for item in batch for arrays in item.out]
        if jobs:
            filled = iter(self._weights.fill(jobs, out, self._threads))
            for item in batch:
                item.out = [next(filled) for _ in item.jobs]
        self._passed += sum(item.nbytes for item in batch if item.is_passing)
        while batch:
            self._settle(batch.pop(0))
        if self._passed >= 2 * PASSING_BYTES:
            give_back()
            self._passed = 0

    def _settle(self, item: _Item) -> None:
        target = item.target
        device = self._placement.of(target.name)
        is_quantized = self._is_quantized(target.name)
        if item.parts or item.names or item.components:
            if not is_quantized:
                raise CheckpointError(f'"{target.sources[0]}" is packed, and "{target.name}" takes no packed weight')
            if item.components:
                value: Any = item.components
            elif item.parts:
                value = {name: item.out[job][number] for name, (job, number) in item.parts.items()}
            else:
                value = dict(zip(item.names, item.out[0], strict=True))
        else:
            tensors = item.given if item.given is not None else [arrays[0] for arrays in item.out]
            value = self._finished(target, tensors)
        if is_quantized:
            self._quantizer.create_quantized_param(
                self._model, target.name, value, device=device, dtype=self._torch_dtype
            )
            return
        wanted = self._dtype_of(target.name)
        if value.is_floating_point() and wanted is not None and value.dtype != wanted:
            value = value.to(wanted)
        elif item.given is not None:
            value = self._kept(value)
        self._set_tensor(target.name, value, device)

    def _finished(self, target: Target, tensors: list[Any]) -> Any:
        if target.merge is not None:
            return target.merge(tensors)
        value = tensors[0]
        if target.shape is not None and tuple(value.shape) != target.shape:
            value = value.reshape(target.shape)
        module, leaf = owner(self._model, target.name)
        expected = getattr(module, leaf, None)
        if expected is None:
            raise FormatError(f'the model has no "{target.name}"')
        return value
