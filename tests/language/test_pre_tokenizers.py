"""How a way of splitting text is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from weightpack.errors import UnsupportedError
from weightpack.language.pre_tokenizers import ROWS, find_pre_tokenizer
from weightpack.language.vocabulary import from_tokenizer_json

from .models import VECTORS

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = {**BYTES, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def described(steps: list[dict[str, Any]], ignores: bool = False, normalizer: Any = None) -> dict[str, Any]:
    pre = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    return {"pre_tokenizer": pre, "normalizer": normalizer, "model": {"ignore_merges": ignores}}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_found(row: Any) -> None:
    words = {"bytes": lambda: BYTES, "gpt-2": lambda: GPT2, "digits": lambda: DIGITS}
    steps = [split(step[1]) if step[0] == "split" else words[step[0]]() for step in row.steps]
    assert find_pre_tokenizer(described(steps, row.ignores_merges)) == row.name


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2"])
def test_the_files_of_the_golden_models(name: str) -> None:
    tokenizer = json.loads((VECTORS / name / "tokenizer.json").read_text("utf-8"))
    assert find_pre_tokenizer(tokenizer) == name


LLAMA3 = ROWS[0].steps[0][1]


@pytest.mark.parametrize(
    "tokenizer",
    [
        described([split(LLAMA3 + "x"), BYTES], True),
        described([split(LLAMA3, "MergedWithPrevious"), BYTES], True),
        described([split(LLAMA3, invert=True), BYTES], True),
        described([split(LLAMA3), {**BYTES, "add_prefix_space": True}], True),
        described([split(LLAMA3), BYTES, DIGITS], True),
        described([split(LLAMA3), BYTES], True, {"type": "Lowercase"}),
        described([{"type": "Whitespace"}]),
        {"model": {}},
    ],
)
def test_another_way_has_no_name(tokenizer: dict[str, Any]) -> None:
    assert find_pre_tokenizer(tokenizer) is None
    vocabulary = {**tokenizer, "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}
    with pytest.raises(UnsupportedError, match="splits text in a way") as caught:
        from_tokenizer_json(vocabulary, 3)
    assert caught.value.hint is not None
    assert "--arch none" in caught.value.hint


def test_matches_that_are_kept_and_gaps_that_are_removed_are_one() -> None:
    kept = described([split(LLAMA3), BYTES], True)
    removed = described([split(LLAMA3, "Removed", True), BYTES], True)
    assert find_pre_tokenizer(kept) == find_pre_tokenizer(removed) == "llama-bpe"
