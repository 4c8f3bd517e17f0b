"""How text is split before byte pairs are merged: told from `tokenizer.json`, named as llama.cpp
names it (`tokenizer.ggml.pre`).

llama.cpp's own scripts tell it by a hash over the tokens of a test sentence, which only works for
vocabularies that the list of hashes knows. Here the rules themselves are compared: what a file asks
for must be what a row of `ROWS` asks for, in every part that changes tokens.

Source: llama.cpp as of ggml 0.25.3, `src/llama-vocab.cpp` (regular expressions, `ignore_merges`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .text_files import object_at, objects_at

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

_BYTES = ("bytes",)
_GPT2 = ("gpt-2",)
_DIGITS = ("digits",)

Step = tuple[str, ...]
"""One step of splitting: its kind, and the regular expression where it has one."""


@dataclass(frozen=True)
class Row:
    """One way of splitting.

    `name` is llama.cpp's, `steps` what is done in order. `ignores_merges`: a word that is a token is
    taken whole (`None` where the reader's answer is the same for both). `normalizers` are those
    that a file may ask for; llama.cpp applies none, so that text it gets is taken to be normal.
    """

    name: str
    steps: tuple[Step, ...]
    ignores_merges: bool = False
    normalizers: frozenset[str | None] = frozenset({None})


ROWS: tuple[Row, ...] = (
    Row("llama-bpe", (("split", _LLAMA3), _BYTES), ignores_merges=True),
    Row("smaug-bpe", (("split", _LLAMA3), _BYTES)),
    Row("qwen2", (("split", _QWEN2), _BYTES), normalizers=frozenset({None, "NFC"})),
    Row("tekken", (("split", _TEKKEN), _BYTES), ignores_merges=True),
    Row("smollm", (_DIGITS, _GPT2)),
    Row("gpt-2", (_GPT2,)),
)


def find_pre_tokenizer(tokenizer: Mapping[str, Any]) -> str | None:
    """The name that llama.cpp has for how this `tokenizer.json` splits text, or `None`."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    if steps is None:
        return None
    ignores = bool(object_at(tokenizer.get("model"), "tokenizer.json: model").get("ignore_merges"))
    normalizer = object_at(tokenizer.get("normalizer"), "tokenizer.json: normalizer")
    kind = str(normalizer.get("type")) if normalizer else None
    for row in ROWS:
        if row.steps == steps and row.ignores_merges == ignores and kind in row.normalizers:
            return row.name
    return None


def _steps(described: Any) -> tuple[Step, ...] | None:
    """The steps of a pre-tokenizer; `None` where one of them is of a kind that no row has."""
    if not isinstance(described, Mapping):
        return None
    kind = described.get("type")
    if kind == "Sequence":
        parts = objects_at(described.get("pretokenizers"), "tokenizer.json: pretokenizers")
        inner = [_steps(one) for one in parts]
        return None if None in inner else tuple(step for steps in inner for step in steps or ())
    if kind == "ByteLevel":
        if described.get("add_prefix_space"):
            return None
        return (_GPT2,) if described.get("use_regex", True) else (_BYTES,)
    if kind == "Digits" and described.get("individual_digits"):
        return (_DIGITS,)
    pattern = described.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    isolated = described.get("behavior") == "Isolated" and not described.get("invert")
    # What a pattern that matches all text leaves between two matches is empty, so that taking the
    # matches out and taking what lies between them are the same.
    removed = described.get("behavior") == "Removed" and described.get("invert")
    if kind == "Split" and isinstance(regex, str) and (isolated or removed):
        return (("split", regex),)
    return None
