"""Tokens with a meaning of their own: which they are, and which are put around a text.

`tokenizer_config.json` names them by text, `tokenizer.json` gives texts their numbers and says in
its post-processor what is added, `config.json` has numbers where neither speaks.

Source of the rules: `gguf.vocab.SpecialVocab` as of ggml 0.25.3. One difference: texts are compared
however they are spelled, as text or as an object with one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .hyperparameters import Pair
from .text_files import object_at, objects_at

KEYS = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "mask": "mask",
    "eot": "eot",
    "eom": "eom",
}
"""Kinds of special tokens, and the word in the GGUF key (the misspelling is the format's)."""

_DECLARED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_ADDED = ("bos", "eos", "sep")


@dataclass
class SpecialTokens:
    """The text of each kind, and whether it is added around a text where that is known."""

    texts: dict[str, str] = field(default_factory=dict)
    added: dict[str, bool] = field(default_factory=dict)


def special_tokens(
    tokenizer: Mapping[str, Any] | None,
    settings: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    count: int,
) -> list[Pair]:
    """The pairs for special tokens of a vocabulary of `count`.

    `tokenizer`, `settings` and `config` are `tokenizer.json`, `tokenizer_config.json` and
    `config.json`, the first two where they exist.
    """
    found = _declared(settings)
    if tokenizer is not None:
        _apply_post_processor(found, tokenizer.get("post_processor"))
    for kind in _ADDED:
        flag = (settings or {}).get(f"add_{kind}_token")
        if isinstance(flag, bool):
            found.added.setdefault(kind, flag)

    numbers: dict[str, Any] = {}
    for token in objects_at((tokenizer or {}).get("added_tokens"), "tokenizer.json: added_tokens"):
        numbers.setdefault(str(token.get("content")), token.get("id"))
    pairs: list[Pair] = []
    for kind, word in KEYS.items():
        number = numbers.get(found.texts.get(kind, ""))
        if settings is None or number is None:
            number = config.get(f"{kind}_token_id") if kind in (*_DECLARED, *found.texts) else None
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < count:
            pairs.append((f"tokenizer.ggml.{word}_token_id", "u32", number))
    pairs += [(f"tokenizer.ggml.add_{kind}_token", "bool", found.added[kind]) for kind in _ADDED if kind in found.added]
    return pairs


def _declared(settings: Mapping[str, Any] | None) -> SpecialTokens:
    found = SpecialTokens()
    for kind in _DECLARED:
        entry = (settings or {}).get(f"{kind}_token")
        text = entry.get("content") if isinstance(entry, Mapping) else entry
        if isinstance(text, str):
            found.texts[kind] = text
    return found


def _apply_post_processor(found: SpecialTokens, described: Any) -> None:
    for kind, other in (("bos", "cls"), ("eos", "sep")):
        if kind not in found.texts and other in found.texts:
            found.texts[kind] = found.texts[other]
    if not isinstance(described, Mapping):
        return
    inner = objects_at(described.get("processors"), "tokenizer.json: processors")
    for processor in inner or [described]:
        if processor.get("type") == "ByteLevel":
            found.added.setdefault("bos", False)
            found.added.setdefault("eos", False)
        elif processor.get("type") == "TemplateProcessing":
            _apply_template(found, processor)


def _apply_template(found: SpecialTokens, template: Mapping[str, Any]) -> None:
    where = "tokenizer.json: post_processor"
    single, pair = objects_at(template.get("single"), where), objects_at(template.get("pair"), where)
    first = last = None
    if len(single) > 1:
        first, last = _special(single[0]), _special(single[-1])
    if first is not None:
        # A text that begins with a token begins with the one that is called so, or that of a class.
        found.texts.setdefault("bos", first)
        found.texts.setdefault("cls", first)
        found.added["bos"] = first in (found.texts["bos"], found.texts["cls"])
    if last is not None:
        if last != found.texts.get("eos"):
            # A text ends with this one, so what is called its end ends a turn.
            if "eos" in found.texts:
                found.texts.setdefault("eot", found.texts["eos"])
            found.texts["eos"] = last
        found.added["eos"] = True
    if pair and first is not None and _special(pair[0]) == first:
        pair = pair[1:]
    if pair and last is not None and _special(pair[-1]) == last:
        pair = pair[:-1]
    if len(pair) > 2 and _sequence(pair[0]) == "A" and _sequence(pair[-1]) == "B":
        between = [_special(one) for one in pair[1:-1]]
        ends = (found.texts.get("sep"), found.texts.get("eos"))
        separates = between[0] is not None and between[0] in ends and last is None
        separates = separates or (len(between) == 2 and between[1] is not None and between[1] in ends)
        found.added["sep"] = separates
        if separates and "sep" not in found.texts and "eos" in found.texts:
            found.texts["sep"] = found.texts["eos"]


def _special(part: Mapping[str, Any]) -> str | None:
    text = object_at(part.get("SpecialToken"), "tokenizer.json: SpecialToken").get("id")
    return text if isinstance(text, str) else None


def _sequence(part: Mapping[str, Any]) -> str | None:
    text = object_at(part.get("Sequence"), "tokenizer.json: Sequence").get("id")
    return text if isinstance(text, str) else None


def chat_template(settings: Mapping[str, Any] | None, files: Mapping[str, str]) -> list[Pair]:
    """The pairs for chat templates: `files` are template texts of their own files by name, the main
    one under "default"."""
    if settings is None:
        return []
    told = settings.get("chat_template")
    if isinstance(told, str):
        return [("tokenizer.chat_template", "str", told)]
    named = dict(files)
    if isinstance(told, list):
        named = {
            str(one.get("name", "")): one["template"]
            for one in told
            if isinstance(one, Mapping) and isinstance(one.get("template"), str)
        }
    templates = {re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in named.items() if name}
    default = templates.pop("default", None)
    pairs: list[Pair] = [(f"tokenizer.chat_template.{name}", "str", text) for name, text in templates.items()]
    if templates:
        pairs.append(("tokenizer.chat_templates", "[str]", sorted(templates)))
    if default is not None:
        pairs.append(("tokenizer.chat_template", "str", default))
    return pairs
