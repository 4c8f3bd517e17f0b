"""What a person says about single tensors: patterns, assignments, recipes.

For each tensor the first of these that speaks decides:

1. `keep` patterns: the tensor stays in source precision;
2. `assign` patterns, in the order given: the tensor takes that format;
3. a recipe's `keep` patterns;
4. a recipe's rules, in the order written;
5. `only` patterns, if there are any: a tensor that none of them matches stays in source precision;
6. the built-in rules of `weightpack.rules`.

Patterns are regular expressions that may match anywhere in the tensor's name (`re.search`).

A recipe is a TOML file:

```toml
default = "nf4"               # optional: the format of tensors that no rule names
keep = ["lm_head", "embed"]   # optional: patterns of tensors that stay as they are

[[rule]]                      # any number, the first that matches decides
match = "attn.*v_proj"
format = "int8"               # a format, or "keep"
why = "values are sensitive"  # optional: shown in the plan
```
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .targets import COPY

MOST_RECIPE_BYTES = 1 << 20


@dataclass(frozen=True)
class Rule:
    """One pattern, the format it gives (a full name, or "copy"), and the reason shown in the plan."""

    pattern: re.Pattern[str]
    format: str
    why: str
    origin: str
    """How the person wrote it, for messages about it."""


@dataclass
class Overrides:
    """All patterns of one conversion, in order of precedence, and which of them were ever used."""

    rules: list[Rule] = field(default_factory=list)
    only: list[re.Pattern[str]] = field(default_factory=list)
    _used: set[str] = field(default_factory=set)

    def choose(self, name: str, others: Sequence[str] = ()) -> Rule | None:
        """The rule that decides the tensor called `name`, if one speaks. `others` are more names of
        the same tensor (those it has in the source)."""
        names = (name, *others)
        chosen = None
        for rule in self.rules:
            if any(rule.pattern.search(known) for known in names):
                self._used.add(rule.origin)
                chosen = chosen or rule
        if self.only:
            hits = [pattern for pattern in self.only if any(pattern.search(known) for known in names)]
            self._used.update(f"--only {pattern.pattern}" for pattern in hits)
            if chosen is None and not hits:
                return Rule(self.only[0], COPY, "no --only pattern matches it", "only")
        return chosen

    def unused(self) -> list[str]:
        """One sentence for each pattern that has matched no tensor so far."""
        origins = [rule.origin for rule in self.rules] + [f"--only {pattern.pattern}" for pattern in self.only]
        return [f"{origin} matches no tensor" for origin in dict.fromkeys(origins) if origin not in self._used]


@dataclass(frozen=True)
class Recipe:
    """The contents of a recipe file."""

    default: str | None
    keep: tuple[Rule, ...]
    rules: tuple[Rule, ...]


def build(
    find: Callable[[str], str],
    *,
    keep: Iterable[str] = (),
    only: Iterable[str] = (),
    assign: Iterable[str] = (),
    recipe: Recipe | None = None,
) -> Overrides:
    """Puts patterns in order of precedence. `find` turns a format's name into its full name.

    Each item of `assign` reads `REGEX=FORMAT`; the last `=` divides. Raises `ConfigError` for a
    pattern or format that cannot be understood.
    """
    rules = [Rule(compile_pattern(text, "--keep"), COPY, f"--keep {text}", f"--keep {text}") for text in _several(keep)]
    for text in _several(assign):
        pattern, equals, name = text.rpartition("=")
        if not equals or not pattern or not name:
            raise ConfigError(f'--assign "{text}" is not REGEX=FORMAT', hint="for example --assign 'v_proj=q8_0'")
        origin = f"--assign {text}"
        rules.append(Rule(compile_pattern(pattern, "--assign"), _format(name, find), origin, origin))
    if recipe is not None:
        rules += [*recipe.keep, *recipe.rules]
    return Overrides(rules, [compile_pattern(text, "--only") for text in _several(only)])


def read_recipe(
    path: str | Path, find: Callable[[str], str], find_default: Callable[[str], str] | None = None
) -> Recipe:
    """Reads a recipe file. `find_default` turns the name of its default into a full name, by default
    as `find` does with those of rules. Raises `ConfigError` that names the file and the entry at fault."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f'recipe "{path}" is not a file')
    if path.stat().st_size > MOST_RECIPE_BYTES:
        raise ConfigError(f'recipe "{path}" is larger than {MOST_RECIPE_BYTES} bytes')
    try:
        document = load_toml(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f'recipe "{path}" is not TOML: {error}') from error
    where = f'recipe "{path}"'
    _check_keys(document, ("default", "keep", "rule"), where)

    default = document.get("default")
    if default is not None:
        default = (find_default or find)(_text(default, f"{where}: default"))
    keep = document.get("keep", [])
    if not isinstance(keep, list):
        raise ConfigError(f"{where}: keep is not a list of patterns")
    kept = [_text(text, f"{where}: keep") for text in keep]
    tables = document.get("rule", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{where}: rules are written as [[rule]] tables")
    rules = []
    for number, table in enumerate(tables, 1):
        here = f"{where}: rule {number}"
        _check_keys(table, ("match", "format", "why"), here)
        for key in ("match", "format"):
            if key not in table:
                raise ConfigError(f'{here} has no "{key}"')
        text = _text(table["match"], f"{here}: match")
        why = _text(table.get("why", f"recipe: {text}"), f"{here}: why")
        name = _format(_text(table["format"], f"{here}: format"), find)
        rules.append(Rule(compile_pattern(text, here), name, why, f"recipe rule {number} ({text})"))
    return Recipe(
        default,
        tuple(Rule(compile_pattern(text, where), COPY, f"recipe: keep {text}", f"recipe keep {text}") for text in kept),
        tuple(rules),
    )


def compile_pattern(text: str, origin: str) -> re.Pattern[str]:
    """A regular expression, or a `ConfigError` that says where it was written."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f'{origin}: "{text}" is not a regular expression: {error}') from error


def _several(values: Iterable[str]) -> list[str]:
    if isinstance(values, str):
        return [values]
    return list(values)


def _format(name: str, find: Callable[[str], str]) -> str:
    return COPY if name.strip().lower() in ("keep", COPY) else find(name)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where} is not a string: {value!r}")
    return value


def _check_keys(table: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"known: {', '.join(known)}"
            raise ConfigError(f'{where}: unknown key "{key}"', hint=hint)


def load_toml(text: str) -> dict[str, Any]:
    """A TOML document. Raises `ValueError` for text that is none."""
    # The standard library has a TOML reader since Python 3.11; before, the same code is a package.
    document: dict[str, Any] = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli").loads(text)
    return document
