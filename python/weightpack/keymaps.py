"""Names of diffusion models: diffusers' and those of the reference implementations, which readers of
single files know (ComfyUI, stable-diffusion.cpp, diffusers' own `from_single_file`).

A map is a data file beside this module (`keymaps/<architecture>.toml`):

- `rules`, pairs of patterns, diffusers' name first: one tensor, only renamed. `{i}` stands for a
  number, `{p}` for `weight` or `bias`.
- `[[join]]`: the tensors of a list, joined by rows. `split` says how many rows each has, for the way
  back: as many as the others ("equal"), or as many as the joined matrix has columns, the last one
  taking what is left ("columns").
- `[[swap]]`: the two halves of the rows stand the other way round.
- `[[rule]]`: as in `rules`, with conditions.
- `[[optional]]`: a rule, or with a list a join, for tensors that not every model of the class has.
- `layers`, in any of the tables: `last` or `not last`, where `{i}` is counted up to the last block.
- `keep`: parts of reference names whose tensors stay in source precision; `f32`: those that become
  f32, because no linear layer reads them.

A tensor that no rule names is refused, and so is a model that lacks one that a rule needs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .entry import Entry
from .errors import UnsupportedError
from .mapping import ArchitecturePlan, Facts, MappedTensor, Rows
from .overrides import load_toml

FOLDER = Path(__file__).parent / "keymaps"
NAMES = ("flux", "sd3", "wan", "ltxv", "qwen_image")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "")
"""What single files put in front of every name."""


@dataclass(frozen=True)
class Rule:
    """`hosts`, diffusers' names, joined are `target`, the reference name."""

    hosts: tuple[str, ...]
    target: str
    layers: str = ""
    swap: bool = False
    split: str = "equal"
    optional: bool = False


@dataclass(frozen=True)
class Keymap:
    """One architecture: an `Architecture` in the sense of `weightpack.mapping`."""

    name: str
    classes: tuple[str, ...]
    detect: tuple[str, ...]
    rules: tuple[Rule, ...]
    keep: tuple[str, ...]
    f32: tuple[str, ...]

    def plan(self, entries: Sequence[Entry], config: Mapping[str, Any] | None, folder: Path | None) -> ArchitecturePlan:
        """The layout under the reference names. A model that has them already keeps them; what a
        single file holds besides (a text encoder, a VAE) is left out."""
        names = [entry.name for entry in entries]
        prefix = self.prefix(names)
        left_out: dict[str, str] = {}
        if prefix is None:
            tensors = self._from_host(entries)
        else:
            tensors, left_out = self._as_stored(entries, prefix)
        return ArchitecturePlan(
            tensors,
            (("general.architecture", "str", self.name),),
            Facts(self.name),
            "image",
            left_out,
        )

    def prefix(self, names: Collection[str]) -> str | None:
        """What stands before the reference names, or `None` where the names are diffusers'."""
        known = set(names)
        if all(rule.hosts == (rule.target,) for rule in self.rules):
            return next((p for p in PREFIXES if all(p + name in known for name in self.detect)), "")
        return next((p for p in PREFIXES if all(p + name in known for name in self.detect)), None)

    def host_plan(self, entries: Sequence[Entry]) -> ArchitecturePlan:
        """The way back: reference names become diffusers'."""
        prefix = self.prefix([entry.name for entry in entries])
        if prefix is None:
            raise UnsupportedError(f"the tensors do not have the names of a {self.name} file")
        by_name = {e.name.removeprefix(prefix): e for e in entries if e.name.startswith(prefix)}
        left_out = {e.name: "no part of the model" for e in entries if not e.name.startswith(prefix)}
        tensors: list[MappedTensor] = []
        for rule, (target,), hosts in self._expand([rule_in_reverse(rule) for rule in self.rules], by_name):
            entry = by_name[target]
            pieces = _cut(rule, entry, by_name, target)
            tensors += [MappedTensor(name, rows) for name, rows in zip(hosts, pieces, strict=True)]
        return ArchitecturePlan(tuple(tensors), (), Facts(self.name), "image", left_out)

    def _from_host(self, entries: Sequence[Entry]) -> tuple[MappedTensor, ...]:
        by_name = {entry.name: entry for entry in entries}
        tensors = []
        for rule, hosts, (target,) in self._expand(
            [(rule, rule.hosts, (rule.target,)) for rule in self.rules], by_name
        ):
            rows = tuple(Rows(name) for name in hosts)
            if rule.swap:
                half = _rows_of(by_name[hosts[0]]) // 2
                rows = (Rows(hosts[0], half), Rows(hosts[0], 0, half))
            tensors.append(self._mapped(target, rows))
        return tuple(tensors)

    def _as_stored(self, entries: Sequence[Entry], prefix: str) -> tuple[tuple[MappedTensor, ...], dict[str, str]]:
        inside = [entry.name.removeprefix(prefix) for entry in entries if entry.name.startswith(prefix)]
        left_out = {entry.name: "no part of the model" for entry in entries if not entry.name.startswith(prefix)}
        rules = [(rule, (rule.target,), (rule.target,)) for rule in self.rules]
        used = self._expand(rules, dict.fromkeys(inside))
        return tuple(self._mapped(target, (Rows(prefix + target),)) for _, (target,), _ in used), left_out

    def _mapped(self, target: str, rows: tuple[Rows, ...]) -> MappedTensor:
        if any(part in target for part in self.f32):
            return MappedTensor(target, rows, keep=f"{self.name} reads it as plain numbers", plain="f32")
        if any(part in target for part in self.keep):
            return MappedTensor(target, rows, keep=f"{self.name} keeps it in source precision")
        return MappedTensor(target, rows)

    def _expand(
        self, rules: Sequence[tuple[Rule, tuple[str, ...], tuple[str, ...]]], names: Collection[str]
    ) -> Iterable[tuple[Rule, tuple[str, ...], tuple[str, ...]]]:
        """Every use of a rule: the names it takes and those it gives, in the order of `names`.

        Raises `UnsupportedError` for a name that no rule takes, and for one that is missing.
        """
        patterns = [(number, _compile(text)) for number, row in enumerate(rules) for text in row[1]]
        last = self._last_layers(names)
        found: dict[tuple[int, tuple[tuple[str, str], ...]], None] = {}
        for name in names:
            for number, pattern in patterns:
                match = pattern.fullmatch(name)
                if match and _in_layers(rules[number][0].layers, name, match, last):
                    found[number, tuple(match.groupdict().items())] = None
                    break
            else:
                raise self._unknown(name)
        self._check_complete(rules, found, last)
        for number, bound in found:
            rule, taken, given = rules[number]
            sources = tuple(_fill(text, bound) for text in taken)
            for name in sources:
                if name not in names:
                    raise self._missing(name)
            yield rule, sources, tuple(_fill(text, bound) for text in given)

    def _check_complete(
        self,
        rules: Sequence[tuple[Rule, tuple[str, ...], tuple[str, ...]]],
        found: Collection[tuple[int, tuple[tuple[str, str], ...]]],
        last: Mapping[str, int],
    ) -> None:
        for number, (rule, taken, _) in enumerate(rules):
            if rule.optional:
                continue
            text = taken[0]
            mine = [dict(bound) for other, bound in found if other == number]
            endings = sorted({bound["p"] for bound in mine if "p" in bound} | ({"weight"} if "{p}" in text else set()))
            top = last.get(text.partition(".{i}")[0], -1)
            layers = [str(layer) for layer in range(top + 1)] if "{i}" in text else [""]
            if rule.layers:
                layers = [layer for layer in layers if (layer == str(top)) == (rule.layers == "last")]
            for layer in layers:
                for ending in endings or [""]:
                    wanted = {key: value for key, value in (("i", layer), ("p", ending)) if value}
                    if wanted not in mine:
                        raise self._missing(_fill(text, tuple(wanted.items())))

    def _last_layers(self, names: Iterable[str]) -> dict[str, int]:
        last: dict[str, int] = {}
        for name in names:
            match = re.match(r"(.+?)\.(\d+)\.", name)
            if match:
                last[match[1]] = max(last.get(match[1], 0), int(match[2]))
        return last

    def _unknown(self, name: str) -> UnsupportedError:
        return UnsupportedError(
            f'{self.name} has no place for tensor "{name}"', hint="--arch none keeps the names of the source"
        )

    def _missing(self, name: str) -> UnsupportedError:
        return UnsupportedError(
            f'{self.name} needs tensor "{name}", which the source lacks',
            hint="--arch none keeps the names of the source",
        )


def rule_in_reverse(rule: Rule) -> tuple[Rule, tuple[str, ...], tuple[str, ...]]:
    """A rule with what it takes and gives, the way back."""
    return rule, (rule.target,), rule.hosts


def find(name: str | None, config: Mapping[str, Any] | None, tensors: Collection[str]) -> Keymap | None:
    """The map called `name`, or the one for a model of this class or with these names, or `None`."""
    if name is not None:
        return read_keymap(name) if name in NAMES else None
    kind = (config or {}).get("_class_name")
    for known in NAMES:
        keymap = read_keymap(known)
        if kind in keymap.classes or (kind is None and _has(keymap, tensors)):
            return keymap
    return None


def _has(keymap: Keymap, tensors: Collection[str]) -> bool:
    names = set(tensors)
    return any(all(prefix + name in names for name in keymap.detect) for prefix in PREFIXES)


@cache
def read_keymap(name: str) -> Keymap:
    """The map of an architecture, from its file."""
    document = load_toml((FOLDER / f"{name}.toml").read_text("utf-8"))
    rules = [Rule((host,), target) for host, target in document["rules"]]
    for kind in ("rule", "join", "swap", "optional"):
        for table in document.get(kind, ()):
            hosts = table["from"] if isinstance(table["from"], list) else [table["from"]]
            layers, split = table.get("layers", ""), table.get("split", "equal")
            rules.append(Rule(tuple(hosts), table["to"], layers, kind == "swap", split, kind == "optional"))
    return Keymap(
        document["name"],
        tuple(document["classes"]),
        tuple(document["detect"]),
        tuple(rules),
        tuple(document["keep"]),
        tuple(document["f32"]),
    )


@cache
def _compile(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{p\}", "(?P<p>weight|bias)"))


def _fill(text: str, bound: Iterable[tuple[str, str]]) -> str:
    for key, value in bound:
        text = text.replace(f"{{{key}}}", value)
    return text


def _in_layers(words: str, name: str, match: re.Match[str], last: Mapping[str, int]) -> bool:
    if not words:
        return True
    top = last.get(name[: match.start("i") - 1], -1)
    return (int(match["i"]) == top) == (words == "last")


def _rows_of(entry: Entry) -> int:
    return math.prod(entry.shape[:-1]) if len(entry.shape) > 1 else math.prod(entry.shape)


def _cut(rule: Rule, entry: Entry, by_name: Mapping[str, Entry], target: str) -> list[tuple[Rows, ...]]:
    """The rows of `entry` for each of a rule's hosts."""
    total = _rows_of(entry)
    if rule.swap:
        half = total // 2
        return [(Rows(entry.name, half), Rows(entry.name, 0, half))]
    count = len(rule.hosts)
    if count == 1:
        return [(Rows(entry.name),)]
    size = total // count
    if rule.split == "columns":
        weight = by_name.get(target.removesuffix(".bias") + ".weight", entry) if target.endswith(".bias") else entry
        size = weight.shape[-1]
    if size * (count - 1) >= total or (rule.split == "equal" and size * count != total):
        raise UnsupportedError(f'tensor "{entry.name}" of shape {list(entry.shape)} does not part into {count}')
    pieces = [(Rows(entry.name, number * size, size),) for number in range(count - 1)]
    return [*pieces, (Rows(entry.name, size * (count - 1)),)]
