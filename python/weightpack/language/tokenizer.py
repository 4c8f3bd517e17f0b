"""The tokenizer of a model folder, as the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .families import Family
from .hyperparameters import Pair
from .piece_model import read_piece_model
from .special_tokens import chat_template, special_tokens
from .text_files import read_json, read_text
from .vocabulary import AddedToken, Vocabulary, added_tokens, from_pieces, from_tokenizer_json


@dataclass(frozen=True)
class Tokenizer:
    """All pairs that describe a tokenizer, and warnings for the person."""

    metadata: tuple[Pair, ...]
    warnings: tuple[str, ...] = ()


def read_tokenizer(folder: Path, config: Mapping[str, Any], family: Family, count: int) -> Tokenizer | None:
    """The tokenizer of the model in `folder`, whose embedding has `count` rows; `None` where the
    folder holds none.

    A `tokenizer.model` is taken before a `tokenizer.json`, as llama.cpp's scripts do: it has the
    scores that the other lacks.
    """
    pieces, described = folder / "tokenizer.model", folder / "tokenizer.json"
    tokenizer = read_json(described)
    if not pieces.is_file() and tokenizer is None:
        return None
    settings = read_json(folder / "tokenizer_config.json")
    if pieces.is_file():
        model = read_piece_model(pieces)
        vocabulary = from_pieces(model, _added(folder, tokenizer, settings), count)
        if not model.adds_space:
            vocabulary.adds_space = False
    else:
        vocabulary = from_tokenizer_json(tokenizer or {}, count)
    _settle_space(vocabulary, settings, family)
    pairs = vocabulary.metadata()
    pairs += special_tokens(tokenizer, settings, config, count)
    pairs += chat_template(settings, _template_files(folder))
    return Tokenizer(tuple(pairs), tuple(vocabulary.warnings))


def _settle_space(vocabulary: Vocabulary, settings: Mapping[str, Any] | None, family: Family) -> None:
    if family.name.startswith("gemma") and vocabulary.model == "llama":
        vocabulary.adds_space = False
        return
    told = (settings or {}).get("add_prefix_space")
    if family.architecture == "llama" and isinstance(told, bool) and vocabulary.adds_space is None:
        vocabulary.adds_space = told


def _added(folder: Path, tokenizer: Mapping[str, Any] | None, settings: Mapping[str, Any] | None) -> list[AddedToken]:
    """Tokens that take the place of those in a `tokenizer.model`."""
    found: list[AddedToken] = []
    simple = read_json(folder / "added_tokens.json") or {}
    for text, number in simple.items():
        found += [replace(token, is_special=False) for token in added_tokens([{"id": number, "content": text}])]
    decoder = (settings or {}).get("added_tokens_decoder")
    if decoder is None and tokenizer is not None:
        decoder = tokenizer.get("added_tokens")
    return found + added_tokens(decoder)


def _template_files(folder: Path) -> dict[str, str]:
    main = folder / "chat_template.jinja"
    if main.is_file():
        files = {"default": read_text(main)}
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            files[path.stem] = read_text(path)
        return files
    told = (read_json(folder / "chat_template.json") or {}).get("chat_template")
    return {"default": told} if isinstance(told, str) else {}
