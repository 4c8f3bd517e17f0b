"""Recipes: which type each tensor of a model gets, as data.

A recipe is a table in one of the files beside this module (`recipes/gguf/*.toml`), one file for
each family: `llama.cpp` for language models, `image` for diffusion models. A recipe has a `type`
for everything that none of its `rules` names; the first rule that matches decides, and after it
each rule of `adjust` may change the type again. A rule is the name of one of the family's `sets`,
or a table of conditions and the `type` that follows from them:

| condition | matches |
|---|---|
| `kinds` | what the tensor is for, or a group of those (`[groups]`) |
| `contains` | one of these texts in the tensor's name |
| `layers` | `first 4`, `first 1/8`, `middle 3/4`, `more bits` (the first eighth, the last, and each third between) |
| `by` | `count`: the layer is always the number of tensors of that kind before this one |
| `gqa_from`, `experts`, `experts_from`, `size`, `architecture`, `not_architecture` | facts of the model |
| `importance` | whether there is an importance vector for the model |
| `divides` | whether the block of the recipe's own type divides the row |
| `stacked` | whether the tensor is a stack of matrices (experts) |
| `from` | the type so far (in `adjust`) |

Everything here is a function of its arguments; nothing of a model is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import ConfigError, WeightpackError
from .mapping import Facts
from .overrides import load_toml
from .targets import FormatInfo, choose, format_table, match

FOLDER = Path(__file__).parent / "recipes" / "gguf"
LLAMA, IMAGE = "llama.cpp", "image"
FAMILY_FILES = {LLAMA: "llama_cpp.toml", IMAGE: "image.toml"}
OUTPUT, TOKEN_EMBEDDING, OTHER = "output", "token_embd", "other"
VALUES = ("attn_v", "attn_qkv", "attn_kv_b")
"""Kinds that hold the values of attention, which are counted together."""
_CONDITIONS = frozenset(
    (
        *("kinds", "contains", "layers", "by", "gqa_from", "experts", "experts_from", "size", "architecture"),
        *("not_architecture", "importance", "divides", "stacked", "from", "type", "why"),
    )
)


@dataclass(frozen=True, slots=True)
class Tensor:
    """What recipes know of one tensor.

    `position` is the number of tensors of this kind before it, and `count` how many there are;
    `layer` is the layer in its name. `divides` says whether the block of the recipe's own type
    divides its rows, `stacked` whether it is a stack of matrices.
    """

    name: str
    kind: str
    layer: int | None
    position: int = 0
    count: int = 0
    divides: bool = True
    stacked: bool = False


@dataclass(frozen=True)
class Recipe:
    """One mixture of types: `type` and those that its rules give are names without `gguf:`."""

    name: str
    family: str
    file_type: int
    type: str
    rules: tuple[Mapping[str, Any], ...]
    adjust: tuple[Mapping[str, Any], ...]
    need_importance: frozenset[str]

    @property
    def types(self) -> frozenset[str]:
        """Every type that it may give."""
        return frozenset((self.type, *(rule["type"] for rule in (*self.rules, *self.adjust))))

    def choose(self, tensor: Tensor, facts: Facts, importance: bool = False) -> tuple[str, str]:
        """The type of `tensor` in a model of these `facts`, and the reason."""
        rule = next((rule for rule in self.rules if _matches(rule, tensor, facts, importance, None)), None)
        chosen, why = self.type, f"{self.name}: {tensor.kind}"
        if rule is not None:
            chosen, why = rule["type"], f"{self.name}: {_reason(rule, tensor)}"
        for rule in self.adjust:
            if _matches(rule, tensor, facts, importance, chosen):
                chosen, why = rule["type"], f"{self.name}: {_reason(rule, tensor)}"
        return chosen, why

    def needs_importance(self, tensor: Tensor, chosen: str) -> bool:
        """Whether `chosen` is written for `tensor` only with an importance vector."""
        return chosen in self.need_importance and tensor.kind not in (OUTPUT, TOKEN_EMBEDDING)


@dataclass(frozen=True)
class Family:
    """The recipes of one file.

    `fallback` gives the next type for rows that a block does not divide, `fallback_last` the one
    for rows that nothing divides.
    """

    name: str
    recipes: Mapping[str, Recipe]
    fallback: Mapping[str, str]
    fallback_last: str
    kinds: Kinds
    sizes: tuple[Mapping[str, Any], ...]

    def size(self, facts: Facts) -> str:
        """The class of size that rules know a model of these facts by; empty for none."""
        for row in self.sizes:
            of_architecture = facts.architecture in row["architectures"]
            if of_architecture and facts.layers == row["layers"] and facts.gqa >= row.get("gqa_from", 0):
                return str(row["name"])
        return ""


@dataclass(frozen=True)
class Kinds:
    """Patterns that tell what a tensor is for, and which are never quantized."""

    layer: re.Pattern[str]
    kinds: tuple[tuple[str, re.Pattern[str]], ...]
    kept: tuple[tuple[str, re.Pattern[str], str, str], ...] = ()

    def of(self, name: str) -> str:
        """What the tensor called `name` is for: one of the kinds, or "other"."""
        return next((kind for kind, pattern in self.kinds if pattern.search(name)), OTHER)

    def layer_of(self, name: str) -> int | None:
        """The layer that a tensor's name says it is in."""
        match = self.layer.search(name)
        return int(match[1]) if match else None

    def why_kept(self, name: str, architecture: str) -> tuple[str, str] | None:
        """Why the tensor called `name` is never quantized and the type it then has (empty: that of
        the source), or `None` where it may be."""
        for owner, pattern, why, plain in self.kept:
            if (not owner or owner == architecture) and pattern.search(name):
                return why, plain
        return None


def positions(names: Sequence[tuple[str, str, int | None]]) -> dict[str, tuple[int, int]]:
    """For each tensor, given as name, kind and layer: how many of its kind come before it and how
    many there are, in order of layers and then names. All kinds that hold values count as one."""
    counts: dict[str, int] = {}
    before: dict[str, int] = {}
    for name, kind, _ in sorted(names, key=lambda row: (-1 if row[2] is None else row[2], row[0])):
        kind = VALUES[0] if kind in VALUES else kind
        before[name] = counts.get(kind, 0)
        counts[kind] = before[name] + 1
    groups = {name: VALUES[0] if kind in VALUES else kind for name, kind, _ in names}
    return {name: (before[name], counts[groups[name]]) for name in before}


def _matches(rule: Mapping[str, Any], tensor: Tensor, facts: Facts, importance: bool, chosen: str | None) -> bool:
    return (
        ("kinds" not in rule or tensor.kind in rule["kinds"])
        and ("contains" not in rule or any(text in tensor.name for text in rule["contains"]))
        and ("gqa_from" not in rule or facts.gqa >= rule["gqa_from"])
        and ("experts" not in rule or facts.experts == rule["experts"])
        and ("experts_from" not in rule or facts.experts >= rule["experts_from"])
        and ("size" not in rule or facts.size == rule["size"])
        and ("architecture" not in rule or facts.architecture == rule["architecture"])
        and ("not_architecture" not in rule or facts.architecture != rule["not_architecture"])
        and ("importance" not in rule or importance == rule["importance"])
        and ("divides" not in rule or tensor.divides == rule["divides"])
        and ("stacked" not in rule or tensor.stacked == rule["stacked"])
        and ("from" not in rule or chosen in rule["from"])
        and ("layers" not in rule or in_layers(rule["layers"], *_place(rule, tensor, facts)))
    )


def _place(rule: Mapping[str, Any], tensor: Tensor, facts: Facts) -> tuple[int, int]:
    """Where a tensor stands: values among all values, everything else among the layers. Experts of
    a layer are several tensors of one kind, so that with them the layer in the name counts."""
    if tensor.kind in VALUES:
        return tensor.position, tensor.count
    if facts.experts > 1 and rule.get("by") != "count" and tensor.layer is not None:
        return tensor.layer, facts.layers
    return tensor.position, facts.layers or tensor.count


def in_layers(words: str, layer: int, layers: int) -> bool:
    """Whether `layer` of `layers` is among those that `words` name."""
    if words == "more bits":
        return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    if words == "middle 3/4":
        return layers // 8 <= layer < 7 * layers // 8
    first, _, part = words.removeprefix("first ").partition("/")
    return layer < (layers // int(part) if part else int(first))


def _reason(rule: Mapping[str, Any], tensor: Tensor) -> str:
    if "why" in rule:
        return str(rule["why"])
    if "layers" not in rule:
        return tensor.kind
    where = "one of the layers with more bits" if rule["layers"] == "more bits" else f"{rule['layers']} layers"
    return f"{tensor.kind}, {where}"


@cache
def family(name: str) -> Family:
    """The recipes of family `name`. Raises `WeightpackError` when its file is not understood."""
    document = _read(FAMILY_FILES[name])
    groups, sets = document["groups"], document["sets"]
    scarce = document.get("need_importance", [])
    recipes = {}
    for table in document["recipe"]:
        recipes[table["name"]] = Recipe(
            table["name"],
            name,
            table["file_type"],
            table["type"],
            _rules(table["rules"], sets, groups, table["name"]),
            _rules(table.get("adjust", []), sets, groups, table["name"]),
            frozenset((*scarce, *table.get("need_importance", []))),
        )
    shared = _read("kinds.toml")
    kinds = Kinds(re.compile(shared["layer"]), _kinds(document.get("kind", shared["kind"])), _kept(shared["kept"]))
    sizes = tuple(document.get("size", ()))
    return Family(name, recipes, document["fallback"], document["fallback_last"], kinds, sizes)


def _read(name: str) -> dict[str, Any]:
    return load_toml((FOLDER / name).read_text("utf-8"))


def _rules(
    written: Sequence[Any], sets: Mapping[str, Any], groups: Mapping[str, Any], recipe: str
) -> tuple[Mapping[str, Any], ...]:
    rules: list[Mapping[str, Any]] = []
    for rule in written:
        rules += [rule] if isinstance(rule, Mapping) else sets[rule]
    for rule in rules:
        if unknown := set(rule) - _CONDITIONS:
            raise WeightpackError(f"recipe {recipe}: unknown condition {sorted(unknown)[0]}")
    return tuple(
        {**rule, "kinds": tuple(kind for name in rule["kinds"] for kind in groups.get(name, (name,)))}
        if "kinds" in rule
        else rule
        for rule in rules
    )


def _kinds(tables: Iterable[Mapping[str, Any]]) -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((table["name"], re.compile("|".join(table["patterns"]))) for table in tables)


def _kept(tables: Iterable[Mapping[str, Any]]) -> tuple[tuple[str, re.Pattern[str], str, str], ...]:
    return tuple(
        (table.get("architecture", ""), re.compile("|".join(table["patterns"])), table["why"], table.get("plain", ""))
        for table in tables
    )


def recipe_rows() -> tuple[FormatInfo, ...]:
    """The recipes whose types this version encodes, as rows for the table of formats."""
    formats = {row.name: row for row in format_table()}
    rows = []
    for recipe in family(LLAMA).recipes.values():
        base = formats.get(f"gguf:{recipe.type}")
        if base is not None and all(_encodes(formats.get(f"gguf:{name}")) for name in recipe.types):
            readers = "llama.cpp, ComfyUI-GGUF" if recipe.name in family(IMAGE).recipes else "llama.cpp"
            rows.append(
                FormatInfo(
                    f"gguf:{recipe.name}",
                    recipe.name,
                    "gguf",
                    "recipe",
                    "",
                    readers,
                    base.bits_per_weight,
                    "with importance" if recipe.types & recipe.need_importance else base.encodes,
                )
            )
    return tuple(rows)


def _encodes(row: FormatInfo | None) -> bool:
    return row is not None and row.encodes != "never"


def find_target(name: str) -> FormatInfo:
    """The format or recipe called `name`, by its full or short name, in any case.

    Raises `ConfigError` for a name that is neither.
    """
    # Most names are formats, and need no recipe to be read.
    return match(name, format_table()) or choose(name, (*format_table(), *recipe_rows()))


def find_recipe(target: FormatInfo, family_name: str) -> Recipe | None:
    """The recipe that `target` is for models of a family, or `None` for a format.

    Raises `ConfigError` for a recipe that the family lacks.
    """
    if target.exactness != "recipe":
        return None
    name = target.name.removeprefix("gguf:")
    recipes = family(family_name).recipes
    if name not in recipes:
        known = ", ".join(recipes)
        raise ConfigError(f"{name} is no recipe for {family_name} models", hint=f"they have {known}")
    return recipes[name]
