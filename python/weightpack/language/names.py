"""What the tensors of a language model are called in GGUF, and what is done to each on the way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..entry import Entry
from ..errors import CheckpointError, UnsupportedError
from ..mapping import Interleave, MappedTensor, Rows
from .families import Family

_BLOCK_NAME = re.compile(r"layers\.(\d+)\.(.+)")
_LEFT_OUT = {
    ".rotary_emb.inv_freq": "computed by the reader",
    ".attention.masked_bias": "a constant of the model class",
    ".attention.bias": "a constant of the model class",
}
"""Ends of names, and why such a tensor is not in the result."""

_NORM = re.compile(r"(^|_)norm$")


@dataclass(frozen=True)
class Names:
    """The tensors of a result, and what of the source is not among them and why."""

    tensors: tuple[MappedTensor, ...]
    left_out: Mapping[str, str]


def map_names(entries: Iterable[Entry], family: Family, layers: int, heads: int, key_heads: int) -> Names:
    """The tensors of a model with `layers` blocks of `heads` query heads and `key_heads` key heads.

    Raises `UnsupportedError` for a name that the family does not have, `CheckpointError` where a
    tensor that the reader needs is missing.
    """
    tensors: list[MappedTensor] = []
    left_out: dict[str, str] = {}
    found: set[str] = set()
    for entry in entries:
        reason = next((why for end, why in _LEFT_OUT.items() if entry.name.endswith(end)), None)
        if reason is None and family.is_tied and entry.name == "lm_head.weight":
            reason = "the reader takes the embedding as output layer"
        if reason is not None:
            left_out[entry.name] = reason
            continue
        kind, layer, suffix = _place(entry, family, layers)
        name = f"{kind}.{suffix}" if layer is None else f"blk.{layer}.{kind}.{suffix}"
        if name in found:
            raise CheckpointError(f'two tensors would be called "{name}" (tensor "{entry.name}")')
        found.add(name)
        tensors.append(_tensor(entry, family, name, kind, layer, heads, key_heads))
    missing = [name for name in _needed(family, layers) if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f'the model has no tensor that would be called "{missing[0]}"{more}')
    return Names(tuple(tensors), left_out)


def _place(entry: Entry, family: Family, layers: int) -> tuple[str, int | None, str]:
    """Name in GGUF without block and suffix, block, and suffix of a tensor."""
    module, _, suffix = entry.name.removeprefix("model.").rpartition(".")
    kind, layer = family.top.get(module), None
    found = _BLOCK_NAME.fullmatch(module)
    if found is not None:
        module, layer = found[2], int(found[1])
        kind = family.block.get(module)
    if kind is None or not (suffix == "weight" or (suffix == "bias" and module in family.biases)):
        raise UnsupportedError(
            f'{family.name} has no place for tensor "{entry.name}"', hint="--arch none keeps the names of the source"
        )
    if layer is not None and layer >= layers:
        raise UnsupportedError(f'config.json says {layers} layers (tensor "{entry.name}")')
    return kind, layer, suffix


def _tensor(
    entry: Entry, family: Family, name: str, kind: str, layer: int | None, heads: int, key_heads: int
) -> MappedTensor:
    groups = {"attn_q": heads, "attn_k": key_heads}.get(kind) if family.is_permuted else None
    interleave = None
    if groups is not None:
        rows = entry.shape[0] if entry.shape else 0
        if rows % (2 * groups):
            raise CheckpointError(
                f'{rows} rows are not {groups} heads of an even size (tensor "{entry.name}", shape {list(entry.shape)})'
            )
        interleave = Interleave(groups)
    is_norm = _NORM.search(kind) is not None
    is_vector = is_norm or len(entry.shape) <= 1
    return MappedTensor(
        name,
        (Rows(entry.name, interleave=interleave),),
        add=family.norm_offset if is_norm and family.norm_offset else None,
        kind=kind,
        layer=layer,
        keep=("norm" if is_norm else "bias") if is_vector else "",
        plain="f32" if is_vector else "",
    )


def _needed(family: Family, layers: int) -> Iterable[str]:
    """Names without which the reader refuses a file. An output layer is not among them: where there
    is none, it takes the embedding."""
    yield from ("token_embd.weight", "output_norm.weight")
    for layer in range(layers):
        for kind in family.block.values():
            yield f"blk.{layer}.{kind}.weight"
