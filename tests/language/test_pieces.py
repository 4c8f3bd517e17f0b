"""Vocabularies of sentencepiece: from their own file, and from a `tokenizer.json`."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from weightpack.errors import CheckpointError, UnsupportedError
from weightpack.language.piece_model import BPE, BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_piece_model
from weightpack.language.vocabulary import SPACE, added_tokens, from_pieces, from_tokenizer_json

from .models import VECTORS


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def text_field(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def piece(text: str, score: float = 0.0, kind: int | None = None) -> bytes:
    data = text_field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
    return text_field(1, data + (b"" if kind is None else varint(3 << 3) + varint(kind)))


def model(*pieces: bytes, kind: int = BPE, adds_space: bool = True) -> bytes:
    trained, normal = varint(3 << 3) + varint(kind), varint(3 << 3) + varint(adds_space)
    return b"".join(pieces) + text_field(2, trained) + text_field(3, normal)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_every_field_is_read(tmp_path: Path) -> None:
    kinds = [UNKNOWN, CONTROL, CONTROL, USER_DEFINED, UNUSED, BYTE]
    pieces = [piece(f"p{n}", -n, kind) for n, kind in enumerate(kinds)]
    data = model(*pieces, piece("é", -0.5)) + text_field(9, b"unknown") + varint(10 << 3 | 1) + bytes(8)
    found = read_piece_model(write(tmp_path / "m", data))
    assert [(p.text, p.score, p.type) for p in found.pieces] == [
        *((f"p{n}", -float(n), kind) for n, kind in enumerate(kinds)),
        ("é", -0.5, NORMAL),
    ]
    assert found.is_bpe
    assert found.adds_space
    bare = read_piece_model(write(tmp_path / "n", model(piece("a"), kind=1, adds_space=False)))
    assert (bare.is_bpe, bare.adds_space) == (False, False)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "holds no pieces"),
        (b"\x0a\x05abc", "expected 5 bytes from byte 2"),
        (b"\x80", "inside a number"),
        (b"\xff" * 11, "more than ten bytes"),
        (b"\x0b", "field of wire type 3"),
        (text_field(1, text_field(1, b"\xff\xfe")), "codec can't decode"),
        (piece("a", kind=9), "piece of type 9"),
        (b"{}", "not a sentencepiece model"),
    ],
)
def test_what_is_no_model(tmp_path: Path, data: bytes, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        read_piece_model(write(tmp_path / "m", data))


def test_a_model_cut_anywhere_is_refused_or_shorter(tmp_path: Path) -> None:
    whole = (VECTORS / "pieces" / "tokenizer.model").read_bytes()
    count = len(read_piece_model(VECTORS / "pieces" / "tokenizer.model").pieces)
    for cut in range(0, len(whole), 7):
        try:
            found = read_piece_model(write(tmp_path / "m", whole[:cut]))
        except CheckpointError:
            continue
        assert len(found.pieces) <= count


def test_against_sentencepiece(peer: Any) -> None:
    path = VECTORS / "pieces" / "tokenizer.model"
    theirs = peer("sentencepiece").SentencePieceProcessor(model_file=str(path))
    mine = read_piece_model(path)
    assert len(mine.pieces) == theirs.vocab_size()
    for number, one in enumerate(mine.pieces):
        assert (one.text, one.score) == (theirs.id_to_piece(number), theirs.get_score(number))
        assert (one.type == BYTE) == theirs.is_byte(number)
        assert (one.type == CONTROL) == theirs.is_control(number)
        assert (one.type == UNKNOWN) == theirs.is_unknown(number)


def test_numbers_without_a_piece_and_pieces_without_a_row(tmp_path: Path) -> None:
    found = read_piece_model(write(tmp_path / "m", model(piece("<unk>", 0, UNKNOWN), piece("a", -1), piece("b", -2))))
    added = added_tokens([{"id": 3, "content": "<|x|>"}, {"id": 9, "content": "far"}])
    vocabulary = from_pieces(found, added, 5)
    assert vocabulary.texts == ["<unk>", "a", "b", "<|x|>", "[PAD4]"]
    assert vocabulary.types == [UNKNOWN, NORMAL, NORMAL, CONTROL, UNUSED]
    assert vocabulary.scores == [0, -1, -2, -1000, -10000]
    assert vocabulary.warnings == ['token "far" has number 9, and the model 5 rows']
    assert "1 pieces" in from_pieces(found, [], 2).warnings[0]
    unigram = read_piece_model(write(tmp_path / "u", model(piece("a"), kind=1)))
    assert "unigram" in from_pieces(unigram, [], 1).warnings[0]


def described(**changes: Any) -> dict[str, Any]:
    """A `tokenizer.json` as transformers writes it for a vocabulary of sentencepiece."""
    texts = ["<unk>", "<0x41>", "a", "b", "c", SPACE, "ab", "abc", SPACE + "ab"]
    return {
        "added_tokens": [{"id": 0, "content": "<unk>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False},
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": {text: number for number, text in enumerate(texts)},
            "merges": [["a", "b"], ["ab", "c"], [SPACE, "ab"]],
        },
        **changes,
    }


def test_scores_are_the_places_of_the_merges() -> None:
    vocabulary = from_tokenizer_json(described(), 10)
    assert (vocabulary.model, vocabulary.pre, vocabulary.adds_space) == ("llama", "default", True)
    assert vocabulary.types == [CONTROL, BYTE, *[NORMAL] * 7, UNUSED]
    assert vocabulary.scores is not None
    assert vocabulary.scores[6:9] == [0.0, -1.0, -2.0]
    assert vocabulary.merges is None


@pytest.mark.parametrize(
    ("normalizer", "splitter", "adds"),
    [
        ([{"type": "Prepend", "prepend": SPACE}, "replace"], None, True),
        (["replace"], None, False),
        (["replace"], {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}, False),
        ([], {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False}, False),
    ],
)
def test_spaces(normalizer: list[Any], splitter: Any, adds: bool) -> None:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [replace if step == "replace" else step for step in normalizer]
    tokenizer = described(normalizer={"type": "Sequence", "normalizers": steps}, pre_tokenizer=splitter)
    assert from_tokenizer_json(tokenizer, 10).adds_space is adds


def changed(**changes: Any) -> dict[str, Any]:
    return described(model={**described()["model"], **changes})


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (described(pre_tokenizer={"type": "Whitespace"}), "treats spaces in a way"),
        # "abc" is also "a" and "bc", which no merge makes.
        (
            changed(vocab={**described()["model"]["vocab"], "bc": 9}, merges=[["a", "b"], ["ab", "c"], ["b", "c"]]),
            "score",
        ),
        # The pairs of "abc" do not stand together.
        (
            changed(
                vocab={**described()["model"]["vocab"], "bc": 9},
                merges=[["a", "b"], ["ab", "c"], ["b", "c"], [SPACE, "ab"], ["a", "bc"]],
            ),
            "score",
        ),
        (described(model={"type": "Unigram", "vocab": []}), "holds a Unigram vocabulary"),
        (described(model={"type": "WordPiece"}), "holds a WordPiece vocabulary"),
    ],
)
def test_what_cannot_be_told_is_refused(tokenizer: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        from_tokenizer_json(tokenizer, 10)


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (changed(vocab={}), "has no vocabulary"),
        (changed(vocab={"a": -1}), "has number -1"),
        (changed(vocab={"a": 10}), "the model 10 rows"),
        (changed(merges=[]), "has no merges"),
        (changed(merges=["abc"]), "is no pair"),
        (described(added_tokens=[{"id": "0"}]), "has no number"),
    ],
)
def test_what_contradicts_itself_is_refused(tokenizer: dict[str, Any], why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        from_tokenizer_json(tokenizer, 10)


def test_merges_of_both_spellings_are_the_same() -> None:
    old = changed(merges=["a b", "ab c", f"{SPACE} ab"])
    assert from_tokenizer_json(old, 10) == from_tokenizer_json(described(), 10)
    assert json.loads(json.dumps(old))


def test_a_converted_vocabulary_has_the_scores_it_was_made_from() -> None:
    tokenizer = json.loads((VECTORS / "pieces-json" / "tokenizer.json").read_text("utf-8"))
    own = read_piece_model(VECTORS / "pieces" / "tokenizer.model")
    count = len(own.pieces)
    mine, theirs = from_tokenizer_json(tokenizer, count), from_pieces(own, [], count)
    assert mine.texts == theirs.texts
    assert mine.scores is not None
    assert theirs.scores is not None
    made = {left + right for left, right in map(tuple, tokenizer["model"]["merges"])}
    merged = [number for number, text in enumerate(mine.texts) if text in made]
    assert len(merged) > 100
    assert [mine.scores[n] for n in merged] == [theirs.scores[n] for n in merged]
    assert {n for n in range(count) if mine.types[n] == BYTE} == {n for n in range(count) if theirs.types[n] == BYTE}
