"""Which type each tensor of a GGUF file gets, and why.

- Vectors and norms become f32. Convolutions, position embeddings, routers and whatever else llama.cpp
  never quantizes stay in source precision, as do the tensors that an architecture names.
- Every other matrix takes the type of the recipe (see `weightpack.recipes`), or the one type asked
  for.
- Rows that a block does not divide fall back: to the next type of the family's table and then to
  f16 ("auto"), to q8_0, to f16, to the source's precision ("keep"), or not at all ("error").

Sources that are GGUF themselves are only touched where a type changes: vectors keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from . import recipes
from .decision import Decision, GgufChoices, Target, as_float, keep, pack
from .entry import Entry
from .errors import UnsupportedError
from .layers import own_name
from .targets import CASTS

FALLBACKS = ("auto", "error", "q8_0", "f16", "keep")
Fallback = Literal["auto", "error", "q8_0", "f16", "keep"]
INSTEAD = " instead of "
"""What the reason of a fallback holds."""
SMALL_WEIGHTS = 1024
"""Tensors of diffusion models with no more weights than this are stored in f32."""


def built_in(entries: Sequence[Entry], target: Target) -> Callable[[Entry], Decision]:
    """The rule for one of `entries` that no pattern speaks about."""
    choices = target.gguf
    family = recipes.family(choices.family)
    kinds = {}
    for entry in entries:
        mapped = choices.mapped.get(entry.name)
        kind = (mapped.kind if mapped else "") or family.kinds.of(entry.name)
        layer = mapped.layer if mapped and mapped.layer is not None else family.kinds.layer_of(entry.name)
        kinds[entry.name] = (kind, layer)
    tied = not any(kind == recipes.OUTPUT for kind, _ in kinds.values())
    # Values are counted whether or not they are quantized, everything else only where it is.
    kept = {entry.name: _kept(entry, target, family) for entry in entries}
    places = recipes.positions(
        [(name, kind, layer) for name, (kind, layer) in kinds.items() if kept[name] is None or kind in recipes.VALUES]
    )
    facts = replace(choices.facts, size=choices.facts.size or family.size(choices.facts))

    def decide(entry: Entry) -> Decision:
        settled = kept[entry.name]
        if settled is not None:
            return settled
        kind, layer = kinds[entry.name]
        if kind == recipes.TOKEN_EMBEDDING and tied:
            kind = recipes.OUTPUT
        name, why = target.format.name, _noun(entry, kind)
        if choices.recipe is not None:
            recipe = choices.recipe
            divides = target.fits(f"gguf:{recipe.type}", entry.shape, {}) is None
            stacked = len(entry.shape) == 3 and entry.shape[0] > 1
            place = places.get(entry.name, (0, 0))
            tensor = recipes.Tensor(entry.name, kind, layer, *place, divides, stacked)
            chosen, why = recipe.choose(tensor, facts, choices.importance is not None)
            name, why = fall_back(entry, target, f"gguf:{chosen}", why)
            if recipe.needs_importance(tensor, name.removeprefix("gguf:")) and not choices.has_importance(entry.name):
                raise _needs_importance(entry, name)
        else:
            name, why = fall_back(entry, target, name, why)
        return packed(entry, target, name, why)

    return decide


def fall_back(entry: Entry, target: Target, name: str, why: str) -> tuple[str, str]:
    """The format in place of `name` where its block does not divide the rows of `entry` ("copy" for
    source precision), and the reason."""
    reason = target.fits(name, entry.shape, {})
    if reason is None or name in CASTS:
        return name, why
    short = name.removeprefix("gguf:")
    reason = reason.removeprefix(f"{short}: ")
    policy = target.gguf.fallback
    if policy == "error":
        raise UnsupportedError(
            f'{short}: {reason} (tensor "{entry.name}", shape {list(entry.shape)})',
            hint="--fallback chooses what such tensors become",
        )
    if policy == "keep":
        return "copy", f"{reason}: kept{INSTEAD}{short}"
    family = recipes.family(target.gguf.family)
    follower = "q8_0" if policy == "q8_0" else family.fallback.get(short) if policy == "auto" else None
    following = f"gguf:{follower}"
    known = target.gguf.encodes.get(following, "always") == "always"
    if follower is None or not known or target.fits(following, entry.shape, {}) is not None:
        following = family.fallback_last
    return following, f"{reason}: {following.removeprefix('gguf:')} {INSTEAD.strip()} {short}"


def packed(entry: Entry, target: Target, name: str, why: str) -> Decision:
    """The tensor in format `name`, unless that takes what is not there or not allowed."""
    if name == "copy":
        return keep(entry, target, why)
    choices = target.gguf
    is_block = (entry.format or "").startswith("gguf:")
    if is_block and choices.from_gguf and (name != entry.format or entry.is_mixed) and not choices.requantize:
        raise UnsupportedError(
            f'tensor "{entry.name}" is packed as {entry.format} already, and would lose precision a second time as '
            f"{name}",
            hint="convert the model it was made from, or allow it with --requantize",
        )
    if name in CASTS:
        return as_float(entry, name, why)
    encodes = choices.encodes.get(name, "always")
    if encodes == "never":
        raise UnsupportedError(f'{name} is only decoded by this version (tensor "{entry.name}")')
    if encodes == "with importance" and name != entry.format and not choices.has_importance(entry.name):
        raise _needs_importance(entry, name)
    return pack(entry, target, name, why)


def _needs_importance(entry: Entry, name: str) -> UnsupportedError:
    return UnsupportedError(
        f'{name} is written with an importance vector only, and tensor "{entry.name}" has none',
        hint="name an imatrix file with --importance, or another type with --assign REGEX=FORMAT",
    )


def _kept(entry: Entry, target: Target, family: recipes.Family) -> Decision | None:
    """What becomes of a tensor that is never quantized; `None` for any other."""
    choices = target.gguf
    if not entry.is_float:
        return keep(entry, target, "not floating point")
    mapped = choices.mapped.get(entry.name)
    if mapped is not None and mapped.keep and mapped.plain:
        return _plain(entry, target, mapped.plain, mapped.keep)
    rows = [size for size in entry.shape[:-1] if size != 1]
    if len(entry.shape) <= 1:
        return _plain(entry, target, "f32", "norm, bias or other vector")
    if family.name == recipes.IMAGE and entry.weights <= SMALL_WEIGHTS:
        return _plain(entry, target, "f32", "small")
    if mapped is not None and mapped.keep:
        return keep(entry, target, mapped.keep)
    why = family.kinds.why_kept(entry.name, choices.facts.architecture)
    if why is not None:
        return _plain(entry, target, why[1], why[0])
    if _has_gguf_names(entry, choices):
        if not entry.name.endswith("weight"):
            return keep(entry, target, "not the weight of a layer")
        if len(rows) > 2 or not rows or (family.name == recipes.IMAGE and len(entry.shape) != 2):
            return keep(entry, target, "convolution" if len(rows) > 1 else "not a matrix")
        return None
    return _kept_by_host_name(entry, target)


def _has_gguf_names(entry: Entry, choices: GgufChoices) -> bool:
    return (
        entry.name in choices.mapped
        or entry.name.startswith(("blk.", "enc.blk.", "dec.blk."))
        or (entry.name in ("token_embd.weight", "output.weight"))
    )


def _kept_by_host_name(entry: Entry, target: Target) -> Decision | None:
    module, _, leaf = entry.name.rpartition(".")
    name = own_name(module)
    if "norm" in name and name != "linear" and len(entry.shape) == 2 and leaf == "weight":
        return _plain(entry, target, "f32", "norm")
    if leaf == "bias" or leaf.endswith("_bias"):
        return _plain(entry, target, "f32", "bias")
    if len(entry.shape) > 3 or (len(entry.shape) == 3 and "expert" not in entry.name):
        return keep(entry, target, "convolution" if len(entry.shape) > 3 or "conv" in name else "not a matrix")
    if leaf != "weight" and "expert" not in entry.name:
        return keep(entry, target, "not the weight of a layer")
    if "conv" in name:
        return keep(entry, target, "convolution")
    if "position" in name or name == "wpe" or "relative_attention_bias" in name or "token_type" in name:
        why = "position or type embedding, which is looked up and never multiplied"
        return keep(entry, target, why)
    if name in ("gate", "router", "shared_expert_gate"):
        return keep(entry, target, "router of experts")
    return None


def _plain(entry: Entry, target: Target, name: str, why: str) -> Decision:
    if not name or (target.gguf.from_gguf and entry.is_plain):
        return keep(entry, target, why)
    return as_float(entry, name, why)


def _noun(entry: Entry, kind: str) -> str:
    if kind != recipes.OTHER:
        return kind
    return "embedding" if "emb" in own_name(entry.name.rpartition(".")[0]) else "matrix"
