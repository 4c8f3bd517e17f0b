"""The vocabulary of a `tokenizer.model`: what sentencepiece stores, read without sentencepiece.

The file is one protocol buffer message, `ModelProto`:

```
field 1, repeated   a piece: 1 text (string), 2 score (f32), 3 type (1 normal, 2 unknown, 3 control,
                    4 user defined, 5 unused, 6 byte; 1 where absent)
field 2             how it was trained: 3 model type (1 unigram, 2 BPE; 1 where absent)
field 3             normalization: 3 whether a space goes before the text (true where absent)
```

Source: sentencepiece 0.2, `sentencepiece_model.proto`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens; sentencepiece, llama.cpp and GGUF use the same numbers."""

BPE = 2

MOST_BYTES = 256 * 1024 * 1024
"""Largest file that is read. The largest vocabularies in use take a few megabytes."""

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Piece:
    """One token: its text, its score, and its type."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class PieceModel:
    """A whole vocabulary. `is_bpe` says that pieces were found by merging, `adds_space` that a space
    goes before the text."""

    pieces: tuple[Piece, ...]
    is_bpe: bool
    adds_space: bool


def read_piece_model(path: Path) -> PieceModel:
    """Reads a `tokenizer.model`. Raises `CheckpointError` where it is none."""
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise CheckpointError(f'larger than {MOST_BYTES} bytes, expected a vocabulary (file "{path}")')
    pieces: list[Piece] = []
    kind, adds_space = 1, True
    try:
        for field, wire, value in _fields(data):
            if wire != _LENGTH:
                continue
            if field == 1:
                pieces.append(_piece(value))
            elif field == 2:
                kind = _last_number(value, 3, 1)
            elif field == 3:
                adds_space = bool(_last_number(value, 3, 1))
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f'not a sentencepiece model: {error} (file "{path}")') from None
    if not pieces:
        raise CheckpointError(f'holds no pieces (file "{path}")')
    return PieceModel(tuple(pieces), kind == BPE, adds_space)


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for field, wire, value in _fields(data):
        if field == 1 and wire == _LENGTH:
            text = value.decode("utf-8")
        elif field == 2 and wire == _FOUR_BYTES:
            (score,) = struct.unpack("<f", value)
        elif field == 3 and wire == _VARINT:
            kind = int.from_bytes(value, "little")
    if not NORMAL <= kind <= BYTE:
        raise ValueError(f"piece of type {kind}")
    return Piece(text, score, kind)


def _last_number(data: bytes, wanted: int, default: int) -> int:
    for field, wire, value in _fields(data):
        if field == wanted and wire == _VARINT:
            default = int.from_bytes(value, "little")
    return default


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Number, wire type and content of each field of a message; a number's content is its value in
    little-endian bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        if wire == _VARINT:
            number, position = _varint(data, position)
            value = number.to_bytes(8, "little")
        else:
            if wire == _LENGTH:
                count, position = _varint(data, position)
            elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
                count = 8 if wire == _EIGHT_BYTES else 4
            else:
                raise ValueError(f"field of wire type {wire} at byte {position}")
            value = data[position : position + count]
            if len(value) != count:
                raise ValueError(f"ends at byte {len(data)}, expected {count} bytes from byte {position}")
            position += count
        yield key >> 3, wire, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError(f"ends at byte {len(data)}, inside a number")
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & (2**64 - 1), position
    raise ValueError(f"number of more than ten bytes before byte {position}")
