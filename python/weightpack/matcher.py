"""Which modules an entry of a skip list names: the one matcher for every backend.

An entry of `modules_to_not_convert`, `llm_int8_skip_modules` or `keep_in_fp32` is one of

| entry | names |
|---|---|
| `proj`, `attn.to_q`, `model.layers.0` | paths in which these whole segments follow each other, and all below |
| `layers.*.mlp`, `proj_?` | the same with `*` and `?` inside segments, as in file names |
| `re:^blocks\\.[0-3]\\.` | modules whose path the regular expression finds |

So `attn.to_q` names `blocks.0.attn.to_q`, and `blocks.1` names neither `blocks.10` nor
`single_blocks.1`. An entry that ends in `.weight` or `.bias` names the module of that parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .errors import ConfigError

_PARAMETERS = (".weight", ".bias")


class Matcher:
    """The modules that `entries` name. Raises `ConfigError` for an entry that is not a pattern.

    >>> matcher = Matcher(["attn.to_q", "layers.0"])
    >>> matcher.find("blocks.3.attn.to_q"), matcher.find("layers.01")
    ('attn.to_q', None)
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self.entries = tuple(entries)
        self._compiled = [(entry, _compile(entry)) for entry in self.entries]

    def find(self, path: str) -> str | None:
        """The first entry that names the module at `path` (dots between segments), or `None`."""
        for entry, pattern in self._compiled:
            if pattern.search(path):
                return entry
        return None

    def matches(self, path: str) -> bool:
        """Whether any entry names the module at `path`."""
        return self.find(path) is not None

    def unused(self, paths: Sequence[str]) -> list[str]:
        """The entries that name none of `paths`: most often a slip of the pen."""
        return [entry for entry, pattern in self._compiled if not any(pattern.search(path) for path in paths)]


def _compile(entry: str) -> re.Pattern[str]:
    if not isinstance(entry, str) or not entry.strip("."):
        raise ConfigError(f"{entry!r} does not name a module")
    if entry.startswith("re:"):
        try:
            return re.compile(entry[3:])
        except re.error as error:
            raise ConfigError(f'"{entry}" is not a regular expression: {error}') from error
    for ending in _PARAMETERS:
        entry = entry.removesuffix(ending)
    segments = [_segment(segment) for segment in entry.strip(".").split(".")]
    return re.compile(r"(?:^|\.)" + r"\.".join(segments) + r"(?=\.|$)")


def _segment(text: str) -> str:
    """A regular expression for one segment; `*` and `?` stay inside it."""
    wild = {"*": "[^.]*", "?": "[^.]"}
    return "".join(wild.get(letter) or re.escape(letter) for letter in text)
