"""A large weight packed in slabs of rows, on the CPU.

torchao's arithmetic keeps several copies of a whole weight in float32: 4 to 15 times the weight. Rows
that share no scale with others can be packed some at a time, into the same bytes. Whether they do is
asked of torchao: it packs the whole and a slab on the meta device, and each array of the result must grow
with the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .._lazy import require
from . import torchao_engine
from .torchao_weights import arrays_of, check_finite, pack_whole, quantize, settle_zeros, trial

_PURPOSE = "pack weights for torchao"
SLAB_BYTES = 16 << 20
"""Bytes of the weight that are packed at a time."""
_TILE = 128
"""Swizzled scales come in tiles of this many rows."""


def pack(module: Any, leaf: str, config: Any, *, name: str) -> None:
    """Packs parameter `leaf` of a module in place, by `config`; `name` is the parameter's full name.

    Raises `FormatError` for a weight that is not finite, or that torchao leaves as it is.
    """
    weight = getattr(module, leaf)
    is_zero = check_finite(weight, name)
    made = None
    if leaf == "weight" and weight.numel():
        made = torchao_engine.pack(weight, config)
        if made is None and not is_zero:
            made = pack_in_slabs(weight.detach(), config)
    if made is None:
        pack_whole(module, leaf, config, name=name, is_zero=is_zero)
    else:
        module._parameters[leaf] = require("torch", _PURPOSE).nn.Parameter(made, requires_grad=False)


def pack_in_slabs(weight: Any, config: Any) -> Any:
    """The packed tensor of a matrix that is finite and not all zero, or `None` where it is small, elsewhere
    than on the CPU, or packed only as a whole."""
    torch = require("torch", _PURPOSE)
    if weight.device.type != "cpu" or weight.dim() != 2:
        return None
    rows, columns = weight.shape
    row_bytes = max(1, columns * weight.element_size())
    slab_rows = max(_TILE, SLAB_BYTES // row_bytes // _TILE * _TILE)
    if rows <= slab_rows or not _by_rows_alone(config):
        return None
    whole = trial(config, (rows, columns), weight.dtype, "meta")
    if isinstance(whole, Exception):
        return None
    grown = arrays_of(whole)
    if not _grows(config, weight, slab_rows, grown):
        return None
    packed = {name: torch.empty(array.shape, dtype=array.dtype) for name, array in grown.items()}
    places = dict.fromkeys(packed, 0)
    for slab in _slabs(weight, slab_rows):
        for name, array in arrays_of(_packed(torch, slab, config)).items():
            start, places[name] = places[name], places[name] + array.numel()
            _bytes(torch, packed[name])[start * array.itemsize : places[name] * array.itemsize] = _bytes(torch, array)
    attributes = whole.__tensor_flatten__()[1]
    return type(whole).__tensor_unflatten__(packed, attributes, whole.shape, whole.stride())


def _by_rows_alone(config: Any) -> bool:
    """Whether the search for scales looks at nothing but their own rows."""
    algorithm = getattr(config, "intx_choose_qparams_algorithm", "affine")
    return getattr(algorithm, "value", algorithm) == "affine"


def _grows(config: Any, weight: Any, slab_rows: int, whole: dict[str, Any]) -> bool:
    """Whether the arrays of the slabs, one after the other, are as long as those of the whole."""
    rows, columns = weight.shape
    count, rest = divmod(rows, slab_rows)
    lengths = dict.fromkeys(whole, 0)
    for times, height in ((count, slab_rows), (1, rest)):
        if height:
            part = trial(config, (height, columns), weight.dtype, "meta")
            if isinstance(part, Exception):
                return False
            arrays = arrays_of(part)
            lengths = {name: length + times * arrays[name].numel() for name, length in lengths.items()}
    return all(lengths[name] == array.numel() for name, array in whole.items())


def _slabs(weight: Any, slab_rows: int) -> Iterator[Any]:
    for start in range(0, weight.shape[0], slab_rows):
        yield weight[start : start + slab_rows]


def _packed(torch: Any, slab: Any, config: Any) -> Any:
    module = torch.nn.Linear(1, 1, device="meta")
    module.weight = torch.nn.Parameter(slab, requires_grad=False)
    quantize(module, "weight", config)
    settle_zeros(torch, module.weight)
    return module.weight


def _bytes(torch: Any, array: Any) -> Any:
    return array.detach().contiguous().reshape(-1).view(torch.uint8)
