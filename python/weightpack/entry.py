"""What is known of one tensor before its weights are read."""

from __future__ import annotations

from dataclasses import dataclass

FLOATS = {"F64": "f64", "F32": "f32", "F16": "f16", "BF16": "bf16"}
"""Stored element types that formats encode, and the short name of the format that stores each."""


@dataclass(frozen=True, slots=True)
class Part:
    """One stored array of a tensor: its name in the file, element type, shape and size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a checkpoint, as its header describes it.

    `shape` is the logical shape, slowest dimension first. `format` is the full name of the format
    that decodes it, or `None` where none does (integers, unknown types). `dtype` is the element
    type that decoding gives back; for plain tensors and GGUF blocks the stored type. `nbytes` counts all stored
    arrays, `parts`, of the tensor; `file` is the path of the file that holds it. One that `is_mixed` consists of
    rows in different formats, which are decoded before they are one tensor, and never copied.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: str | None
    nbytes: int
    weights: int
    parts: tuple[Part, ...] = ()
    file: str = ""
    is_mixed: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is stored as ordinary elements, one number each."""
        return len(self.parts) <= 1 and (self.format is None or ":" not in self.format)

    @property
    def is_float(self) -> bool:
        """Whether the tensor holds floating point numbers that a format encodes."""
        return self.format is not None or self.dtype in FLOATS

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, statistics included; 0 for an empty tensor."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0
