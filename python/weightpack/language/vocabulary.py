"""The tokens of a model as a reader of GGUF lists them, from either of the two kinds of files.

A vocabulary is as long as the embedding has rows: numbers without a token get a placeholder that is
never found in a text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .hyperparameters import Pair
from .piece_model import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, PieceModel
from .pre_tokenizers import find_pre_tokenizer
from .text_files import object_at, objects_at

SPACE = "\u2581"
"""The sign that stands for a space in vocabularies of sentencepiece."""

_ADDED_SCORE, _PLACEHOLDER_SCORE = -1000.0, -10000.0
_BYTE_TEXT = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_NONE_HINT = "--arch none keeps the names of the source and writes no vocabulary"


@dataclass
class Vocabulary:
    """Text, type and (for pieces) score of each token. `model` and `pre` are the reader's names for
    how they are found, `merges` the pairs of a byte-pair vocabulary in order."""

    model: str
    pre: str
    texts: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    adds_space: bool | None = None
    warnings: list[str] = field(default_factory=list)

    def metadata(self) -> list[Pair]:
        """The pairs that list the tokens."""
        pairs: list[Pair] = []
        if self.adds_space is not None:
            pairs.append(("tokenizer.ggml.add_space_prefix", "bool", self.adds_space))
        pairs += [
            ("tokenizer.ggml.model", "str", self.model),
            ("tokenizer.ggml.pre", "str", self.pre),
            ("tokenizer.ggml.tokens", "[str]", self.texts),
        ]
        if self.scores is not None:
            pairs.append(("tokenizer.ggml.scores", "[f32]", self.scores))
        pairs.append(("tokenizer.ggml.token_type", "[i32]", self.types))
        if self.merges is not None:
            pairs.append(("tokenizer.ggml.merges", "[str]", self.merges))
        return pairs


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is looked for before a text is split."""

    number: int
    text: str
    is_special: bool

    @property
    def type(self) -> int:
        """Its type. Some that models use as control tokens are not marked so."""
        return CONTROL if self.is_special or _looks_special(self.text) else USER_DEFINED


def _looks_special(text: str) -> bool:
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def added_tokens(rows: Any) -> list[AddedToken]:
    """The added tokens of a `tokenizer.json` (a list), or of `added_tokens_decoder` (an object from
    numbers)."""
    if isinstance(rows, Mapping):
        named = {number: object_at(row, f"added token {number}") for number, row in rows.items()}
        rows = [{**row, "id": int(number) if number.isdecimal() else None} for number, row in named.items()]
    found = []
    for row in objects_at(rows, "added tokens"):
        number, text = row.get("id"), row.get("content")
        if isinstance(number, bool) or not isinstance(number, int) or number < 0 or not isinstance(text, str):
            raise CheckpointError(f"added token {row!r} has no number or no text")
        found.append(AddedToken(number, text, bool(row.get("special"))))
    return found


def from_pieces(model: PieceModel, added: Iterable[AddedToken], count: int) -> Vocabulary:
    """The vocabulary of a `tokenizer.model`, with `added` tokens in place of its own."""
    texts, types, scores = _placeholders(count)
    vocabulary = Vocabulary("llama", "default", texts, types, scores)
    if not model.is_bpe:
        vocabulary.warnings.append(
            "tokenizer.model holds a unigram vocabulary, and llama.cpp merges pieces by score: tokens can differ"
        )
    for number, piece in enumerate(model.pieces[:count]):
        texts[number], scores[number] = piece.text, piece.score
        types[number] = NORMAL if piece.type == USER_DEFINED else piece.type
    _put_added(vocabulary, added)
    if len(model.pieces) > count:
        vocabulary.warnings.append(f"{len(model.pieces) - count} pieces of tokenizer.model have no row in the model")
    return vocabulary


def _placeholders(count: int) -> tuple[list[str], list[int], list[float]]:
    return [f"[PAD{n}]" for n in range(count)], [UNUSED] * count, [_PLACEHOLDER_SCORE] * count


def _put_added(vocabulary: Vocabulary, added: Iterable[AddedToken]) -> None:
    count = len(vocabulary.texts)
    for token in added:
        if token.number >= count:
            vocabulary.warnings.append(f'token "{token.text}" has number {token.number}, and the model {count} rows')
            continue
        # The reader looks for these in the text as it is, before spaces are replaced.
        text = token.text if token.type == CONTROL else token.text.replace(SPACE, " ")
        vocabulary.texts[token.number], vocabulary.types[token.number] = text, token.type
        if vocabulary.scores is not None:
            vocabulary.scores[token.number] = _ADDED_SCORE


def from_tokenizer_json(tokenizer: Mapping[str, Any], count: int) -> Vocabulary:
    """The vocabulary of a `tokenizer.json`.

    Raises `UnsupportedError` where the reader would find other tokens, `CheckpointError` where the
    file contradicts itself or the model.
    """
    model = tokenizer.get("model")
    kind = model.get("type", "BPE") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or kind != "BPE":
        raise UnsupportedError(
            f"tokenizer.json holds a {kind} vocabulary, and llama.cpp reads byte pairs here",
            hint=f"with the tokenizer.model beside it the model converts; {_NONE_HINT}",
        )
    texts, types, scores = _placeholders(count)
    pairs = _pairs(model.get("merges"))
    for text, number in _numbers(model.get("vocab")):
        if number >= count:
            raise CheckpointError(f'tokenizer.json: token "{text}" has number {number}, and the model {count} rows')
        texts[number], types[number] = text, NORMAL
    added = added_tokens(tokenizer.get("added_tokens"))
    if model.get("byte_fallback"):
        vocabulary = _pieces_of_json(tokenizer, texts, types, scores, pairs)
    else:
        name = find_pre_tokenizer(tokenizer)
        if name is None:
            raise UnsupportedError(
                "tokenizer.json splits text in a way that llama.cpp has no known name for", hint=_NONE_HINT
            )
        merges = [" ".join(part.replace(" ", chr(256 + ord(" "))) for part in pair) for pair in pairs]
        vocabulary = Vocabulary("gpt2", name, texts, types, merges=merges)
    _put_added(vocabulary, added)
    return vocabulary


def _numbers(vocab: Any) -> Iterable[tuple[str, int]]:
    if not isinstance(vocab, Mapping) or not vocab:
        raise CheckpointError("tokenizer.json has no vocabulary")
    for text, number in vocab.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise CheckpointError(f'tokenizer.json: token "{text}" has number {number!r}')
        yield text, number


def _pairs(merges: Any) -> list[tuple[str, str]]:
    if not isinstance(merges, list) or not merges:
        raise CheckpointError("tokenizer.json has no merges")
    pairs = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, Sequence) or len(parts) != 2 or not all(isinstance(p, str) and p for p in parts):
            raise CheckpointError(f"tokenizer.json: merge {merge!r} is no pair")
        pairs.append((parts[0], parts[1]))
    return pairs


def _pieces_of_json(
    tokenizer: Mapping[str, Any],
    texts: list[str],
    types: list[int],
    scores: list[float],
    pairs: Sequence[tuple[str, str]],
) -> Vocabulary:
    """Pieces with bytes as a last resort, as converted from sentencepiece: the score of a piece is
    the place of the merge that makes it.

    The reader merges the neighbours whose joined text has the highest score, whichever pair it is;
    the file merges the pair that comes first. Both find the same tokens where the pairs of each
    piece stand together and every way to put it together is among them, which is checked.
    """
    adds_space = _adds_space(tokenizer)
    if adds_space is None:
        raise UnsupportedError(
            "tokenizer.json treats spaces in a way that llama.cpp does not know",
            hint=f"with the tokenizer.model beside it the model converts; {_NONE_HINT}",
        )
    ranks: dict[str, int] = {}
    previous = None
    together = True
    for left, right in pairs:
        text = left + right
        if text != previous and text in ranks:
            together = False
        ranks.setdefault(text, len(ranks))
        previous = text
    known = {text for text, kind in zip(texts, types, strict=True) if kind == NORMAL}
    among = set(pairs)
    special = {token.text for token in added_tokens(tokenizer.get("added_tokens"))}
    complete = all(
        (text[:cut], text[cut:]) in among
        for text in known - special
        if _BYTE_TEXT.fullmatch(text) is None
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    )
    if not (together and complete and ranks.keys() <= known):
        raise UnsupportedError(
            "the merges in tokenizer.json cannot be told by one score for each piece, and llama.cpp reads no more",
            hint=f"with the tokenizer.model beside it the model converts; {_NONE_HINT}",
        )
    for number, text in enumerate(texts):
        if types[number] != NORMAL:
            continue
        if _BYTE_TEXT.fullmatch(text):
            types[number], scores[number] = BYTE, 0.0
        else:
            scores[number] = -float(ranks.get(text, len(ranks)))
    return Vocabulary("llama", "default", texts, types, scores, adds_space=adds_space)


def _adds_space(tokenizer: Mapping[str, Any]) -> bool | None:
    """Whether a space goes before the text; `None` where spaces are treated in another way."""
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepended = {"type": "Prepend", "prepend": SPACE}
    normalizer = object_at(tokenizer.get("normalizer"), "tokenizer.json: normalizer")
    is_one = normalizer and normalizer.get("type") != "Sequence"
    steps = [normalizer] if is_one else objects_at(normalizer.get("normalizers"), "tokenizer.json: normalizers")
    splitter = object_at(tokenizer.get("pre_tokenizer"), "tokenizer.json: pre_tokenizer")
    if not splitter:
        return {2: True, 1: False}.get(len(steps)) if steps in ([prepended, replaced], [replaced]) else None
    if splitter.get("type") == "Metaspace" and not steps and splitter.get("replacement") == SPACE:
        if splitter.get("split", True):
            return None
        scheme = splitter.get("prepend_scheme", "always")
        return {"always": True, "first": True, "never": False}.get(str(scheme))
    if splitter.get("type") == "Split" and steps == [replaced]:
        # Gemma splits at spaces that are no longer there.
        split_at_space = splitter.get("pattern") == {"String": " "}
        return False if split_at_space else None
    return None
