"""Lists of modules that a host leaves unpacked, as each host reads them.

`config.json` of a bitsandbytes checkpoint names the modules that are not packed
(`llm_int8_skip_modules`). Hosts read that list loosely, and each in its own way:

| entry | transformers 5.23 | diffusers 0.42 |
|---|---|---|
| `a.b` | it and all below it; paths that end in `a.b`, even `xa.b` | it; paths with `a.b.` in them |
| `b` | also every path that ends in `b` | also every module whose own name is `b` |
| `a.*` | a regular expression, from the start up to the end of a segment | taken literally |

The list written here therefore holds full paths, and every packed layer that a host would take for
one of them is left unpacked as well, until list and file agree. Hosts try every entry on every
module, so a long list names the modules below which nothing is packed instead of each layer.

Sources: `should_convert_module` of transformers 5.23, `_replace_with_bnb_linear` of diffusers 0.42.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

LONG_LIST = 128
"""Entries from which on a list is shortened. Python keeps 512 compiled patterns; a host that goes
through more of them for each module takes minutes to hours to load."""

_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


def skipped_by_transformers(skip_list: Sequence[str], module: str) -> bool:
    """Whether transformers leaves the layer at path `module` unpacked, given `skip_list`.

    An entry is a regular expression from the start of the path to the end of a segment, or the
    literal end of the path.

    >>> skipped_by_transformers(["lm_head"], "lm_head")
    True
    >>> skipped_by_transformers(["model.layers.1"], "model.layers.11.mlp.up_proj")
    False
    >>> skipped_by_transformers(["proj"], "model.layers.0.mlp.up_proj")
    True
    """
    return _TransformersList(skip_list).entry_for(module) is not None


def skipped_by_diffusers(skip_list: Sequence[str], module: str) -> bool:
    """Whether diffusers leaves the layer at path `module` unpacked, given `skip_list`.

    An entry is the name of the layer, its whole path, or any run of characters in the path that a
    dot follows.

    >>> skipped_by_diffusers(["transformer_blocks.0"], "single_transformer_blocks.0.proj_out")
    True
    >>> skipped_by_diffusers(["attn.to_q"], "transformer_blocks.0.attn.to_q")
    False
    """
    return _DiffusersList(skip_list).entry_for(module) is not None


def is_skipped(host: str | None, skip_list: Sequence[str], module: str) -> bool:
    """Whether `host` leaves the layer at path `module` unpacked; with `None`, whether any host does."""
    hosts = list(_HOSTS.values()) if host is None else [_HOSTS[host]]
    return any(made(skip_list).entry_for(module) is not None for made in hosts)


class _TransformersList:
    def __init__(self, entries: Iterable[str]) -> None:
        self._entries = list(entries)
        # One pattern for all entries is only a quick way of ruling most paths out.
        self._any = re.compile(rf"(?:{'|'.join(f'(?:{entry})' for entry in self._entries) or '(?!)'}){_BOUNDARY}")
        self._ends = tuple(self._entries)

    def entry_for(self, module: str) -> str | None:
        if not self._any.match(module) and not module.endswith(self._ends):
            return None
        for entry in self._entries:
            if module.endswith(entry) or re.match(rf"(?:{entry}){_BOUNDARY}", module):
                return entry
        return None


class _DiffusersList:
    def __init__(self, entries: Iterable[str]) -> None:
        self._entries = list(entries)
        self._names = frozenset(self._entries)

    def entry_for(self, module: str) -> str | None:
        name = module.rpartition(".")[2]
        if name in self._names:
            return name
        if module in self._names:
            return module
        return next((entry for entry in self._entries if f"{entry}." in module), None)


def settle(
    host: str | None,
    packed: Iterable[str],
    kept: Iterable[str],
    *,
    fixed: Sequence[str] = (),
    prefix: str = "",
) -> tuple[list[str], dict[str, str]]:
    """The list to write, and the packed layers that must be left unpacked because of it.

    `packed` and `kept` are module paths of the model, `fixed` the entries that the host adds by
    itself (what it keeps in float32). `prefix` is the name under which the host's task models hold
    the bare model: a list written for `model.layers.0.x` must also work where the file is loaded as
    the bare model, whose layer is `layers.0.x`. `host` is "transformers", "diffusers", or `None`
    where either may read the file.

    The second result maps each further layer to the entry that a host would take it for. Both are
    sorted, and applying the list to the remaining packed layers skips none of them.
    """
    packed, kept = set(packed), set(kept)
    if len(kept) > LONG_LIST:
        entries, caught = _settle(host, packed, shorten(kept, packed), fixed, prefix)
        if not caught or len(kept) > 10 * LONG_LIST:
            return entries, caught
    return _settle(host, packed, kept, fixed, prefix)


def shorten(kept: Iterable[str], packed: Iterable[str]) -> set[str]:
    """Names the highest module below which no layer is packed, in place of every kept layer in it.

    >>> shorten({"a.experts.0.up", "a.experts.1.up", "a.gate"}, {"a.shared.up"}) == {"a.experts", "a.gate"}
    True
    """
    mixed = {path[:end] for path in packed for end in _ends(path)}
    return {next((path[:end] for end in _ends(path) if path[:end] not in mixed), path) for path in kept}


def _ends(path: str) -> list[int]:
    """Where each segment of a path ends, the first one first."""
    return [index for index, character in enumerate(path) if character == "."] + [len(path)]


def _settle(
    host: str | None, packed: set[str], kept: set[str], fixed: Sequence[str], prefix: str
) -> tuple[list[str], dict[str, str]]:
    hosts = list(_HOSTS.values()) if host is None else [_HOSTS[host]]
    dot = f"{prefix}." if prefix else ""
    remaining = set(packed)
    entries = set(kept)
    caught: dict[str, str] = {}
    new = entries | set(fixed)
    while new:
        lists = [made(sorted(new)) for made in hosts]
        found: dict[str, str] = {}
        for module in remaining:
            views = {module, module.removeprefix(dot)}
            hit = next((entry for one in lists for view in views if (entry := one.entry_for(view))), None)
            if hit is not None:
                found[module] = hit
        caught.update(found)
        remaining -= found.keys()
        entries |= found.keys()
        new = set(found)

    # The short form is an aid, and is left out where it would reach further than the long one.
    views_of_packed = {view for module in remaining for view in (module, module.removeprefix(dot))}
    bare = {entry.removeprefix(dot) for entry in entries if dot and entry.startswith(dot)} - entries
    for entry in sorted(bare):
        lists = [made([entry]) for made in hosts]
        if any(one.entry_for(view) is not None for one in lists for view in views_of_packed):
            bare.discard(entry)
    return sorted(entries | bare), dict(sorted(caught.items()))


_HOSTS: dict[str, type[_TransformersList] | type[_DiffusersList]] = {
    "transformers": _TransformersList,
    "diffusers": _DiffusersList,
}
