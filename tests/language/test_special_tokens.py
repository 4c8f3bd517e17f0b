"""Special tokens and chat templates: as llama.cpp's scripts find them (golden data)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from weightpack.language.special_tokens import chat_template, special_tokens

from .models import VECTORS

ADDED = [
    {"id": number, "content": text, "special": True}
    for number, text in enumerate(["<unk>", "<s>", "</s>", "<pad>", "<turn>", "<mask>"])
]


def template(single: str, pair: str) -> dict[str, Any]:
    def parts(text: str) -> list[dict[str, Any]]:
        return [
            {"Sequence": {"id": word, "type_id": 0}} if word in ("A", "B") else {"SpecialToken": {"id": word}}
            for word in text.split()
        ]

    return {"type": "TemplateProcessing", "single": parts(single), "pair": parts(pair)}


BYTES = {"type": "ByteLevel"}
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "named": (None, NAMED, {}),
    "numbers of the config": (None, {}, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}),
    "a list of ends": (None, NAMED, {"eos_token_id": [2, 4], "pad_token_id": None}),
    "flags": (None, {**NAMED, "add_bos_token": True, "add_eos_token": False}, {}),
    "bytes": (BYTES, {**NAMED, "add_bos_token": True}, {}),
    "begins": (template("<s> A", "<s> A <s> B"), NAMED, {}),
    "begins and ends": (template("<s> A </s>", "<s> A </s> B </s>"), NAMED, {}),
    "ends otherwise": (template("<s> A <turn>", "<s> A <turn> <s> B <turn>"), NAMED, {}),
    "separates": (template("<s> A", "<s> A </s> B"), NAMED, {}),
    "in a sequence": ({"type": "Sequence", "processors": [BYTES, template("<s> A", "<s> A <s> B")]}, NAMED, {}),
    "begins with another": (template("<pad> A", "<pad> A <pad> B"), NAMED, {}),
    "first is not named": (template("<s> A", "<s> A B"), {"eos_token": "</s>"}, {}),
    "class and separator": (None, {"cls_token": "<s>", "sep_token": "</s>"}, {}),
    "all": (None, {**NAMED, "pad_token": "<pad>", "mask_token": "<mask>", "sep_token": "<turn>"}, {}),
    "unknown text": (None, {**NAMED, "pad_token": "<none>"}, {"pad_token_id": 3}),
    "out of range": (None, NAMED, {"pad_token_id": 99}),
    "no settings": (template("<s> A", "<s> A <s> B"), None, {"bos_token_id": 1}),
}


EXPECTED = json.loads((VECTORS / "special_tokens.json").read_text("utf-8"))["cases"]


def files(name: str) -> dict[str, Any]:
    """What a folder of this case holds, by file name."""
    processor, settings, config = CASES[name]
    tokenizer = {"added_tokens": ADDED, "post_processor": processor, "model": {}}
    written = {"tokenizer.json": tokenizer, "config.json": config}
    return written if settings is None else {**written, "tokenizer_config.json": settings}


@pytest.mark.parametrize("name", CASES)
def test_as_llama_cpp_finds_them(name: str) -> None:
    found = files(name)
    settings = found.get("tokenizer_config.json")
    pairs = special_tokens(found["tokenizer.json"], settings, found["config.json"], len(ADDED))
    assert {key: value for key, _, value in pairs} == EXPECTED[name]


def test_objects_with_a_text_are_texts() -> None:
    settings = {**NAMED, "eos_token": {"content": "</s>"}}
    tokenizer = files("begins and ends")["tokenizer.json"]
    assert special_tokens(tokenizer, settings, {}, 6) == special_tokens(tokenizer, NAMED, {}, 6)


def test_templates_by_name() -> None:
    assert chat_template(None, {"default": "x"}) == []
    assert chat_template({}, {}) == []
    assert chat_template({"chat_template": "a"}, {"default": "b"}) == [("tokenizer.chat_template", "str", "a")]
    assert chat_template({}, {"default": "b"}) == [("tokenizer.chat_template", "str", "b")]
    several = [{"name": "default", "template": "d"}, {"name": "tool use", "template": "t"}, {"name": "x"}]
    assert chat_template({"chat_template": several}, {}) == [
        ("tokenizer.chat_template.tool_use", "str", "t"),
        ("tokenizer.chat_templates", "[str]", ["tool_use"]),
        ("tokenizer.chat_template", "str", "d"),
    ]
