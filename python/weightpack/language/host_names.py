"""The way back: the tensors of a GGUF file under the names that transformers has for them.

Everything that `names` does to a tensor is undone: the order of query and key rows, and what is
added to norms. The second is only undone within the rounding of f32. Of metadata, `host_config`
makes a `config.json` where it says enough.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..entry import Entry
from ..errors import CheckpointError, UnsupportedError
from ..mapping import Interleave, MappedTensor, Rows
from .families import FAMILIES, Family
from .names import Names

_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(.+)")


def family_of(architecture: str) -> Family | None:
    """The family whose files call themselves `architecture`; of several that share it, the first,
    since their tensors have the same names."""
    return next((family for family in FAMILIES if family.architecture == architecture), None)


def host_names(entries: Iterable[Entry], metadata: Mapping[str, Any]) -> Names:
    """The tensors of a file with this metadata, as transformers names them.

    Raises `UnsupportedError` for an architecture or a tensor whose name there is not known.
    """
    architecture = str(metadata.get("general.architecture", ""))
    family = family_of(architecture)
    if family is None:
        known = ", ".join(dict.fromkeys(family.architecture for family in FAMILIES))
        raise UnsupportedError(
            f'the names that a host has for tensors of architecture "{architecture}" are not known',
            hint=f"known: {known}",
        )
    heads = _count(metadata, f"{architecture}.attention.head_count")
    key_heads = _count(metadata, f"{architecture}.attention.head_count_kv", heads)
    modules = {kind: module for module, kind in family.block.items()}
    tops = {kind: module for module, kind in family.top.items()}
    tensors: list[MappedTensor] = []
    left_out: dict[str, str] = {}
    for entry in entries:
        if entry.name == "rope_freqs.weight":
            left_out[entry.name] = "computed by the host"
            continue
        found = _BLOCK_NAME.fullmatch(entry.name)
        kind, _, suffix = (found[2] if found is not None else entry.name).rpartition(".")
        module = (modules if found is not None else tops).get(kind)
        if module is None or suffix not in ("weight", "bias"):
            raise UnsupportedError(f'{architecture} has no name of a host for tensor "{entry.name}"')
        prefix = "" if module == "lm_head" else "model." if found is None else f"model.layers.{found[1]}."
        groups = {"attn_q": heads, "attn_k": key_heads}.get(kind) if family.is_permuted else None
        tensors.append(
            MappedTensor(
                f"{prefix}{module}.{suffix}",
                (Rows(entry.name, interleave=None if groups is None else _undo(entry, groups)),),
                add=-family.norm_offset if kind.endswith("norm") and family.norm_offset else None,
            )
        )
    return Names(tuple(tensors), left_out)


def _undo(entry: Entry, groups: int) -> Interleave:
    """The order that puts the halves of each head one after the other again."""
    rows = entry.shape[0] if entry.shape else 0
    if not rows or rows % (2 * groups):
        raise CheckpointError(
            f'{rows} rows are not {groups} heads of an even size (tensor "{entry.name}", shape {list(entry.shape)})'
        )
    return Interleave(groups, rows // groups // 2)


def _count(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedError(f"metadata {key} is {value!r}, expected one number of heads")
    return value
