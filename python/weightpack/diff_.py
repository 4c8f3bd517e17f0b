"""Two checkpoints in any two formats, tensor by tensor."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

from .checkpoint import Checkpoint, locate, native_checkpoint, open_checkpoint
from .errors import CheckpointError
from .inspect_ import shown_format
from .report import DiffReport, ErrorStatistics, PairReport

__all__ = ["DiffReport", "diff"]

Progress = Callable[[int, int, int, str], None]


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> DiffReport:
    """Compares the tensors of checkpoint `b` with those of the same name in `a`, the reference.

    Both are decoded slab by slab, so neither is ever in memory. Gives relative RMS error, SNR,
    largest error and cosine for every pair of floating point tensors; integer tensors are compared
    byte for byte. Names that stand in one only, and pairs of different shape, are listed.
    """
    began = time.perf_counter()
    with open_checkpoint(a) as first, open_checkpoint(b) as second:
        shared = [name for name in first if name in second]
        if not shared:
            raise CheckpointError(f'"{a}" and "{b}" have no tensor name in common')
        mismatched: dict[str, str] = {}
        skipped: dict[str, str] = {}
        unequal: list[str] = []
        measured: dict[tuple[int, int], list[tuple[str, str, str]]] = {}
        for name in shared:
            one, other = first[name], second[name]
            if one.shape != other.shape:
                mismatched[name] = f"{list(one.shape)} and {list(other.shape)}"
            elif one.is_float and other.is_float:
                (number_a, name_a), (number_b, name_b) = locate(first, name), locate(second, name)
                measured.setdefault((number_a, number_b), []).append((name, name_a, name_b))
            elif one.dtype == other.dtype and one.is_plain and other.is_plain:
                skipped[name] = f"{one.dtype}, compared byte for byte"
                if not _is_equal(first, second, name):
                    unequal.append(name)
            else:
                skipped[name] = f"{shown_format(one)} and {shown_format(other)} are not comparable"

        pairs: dict[str, PairReport] = {}
        for (number_a, number_b), names in measured.items():
            found = json.loads(
                _native_diff(first, number_a, second, number_b, [(x, y) for _, x, y in names], threads, on_progress)
            )
            for (name, _, _), row in zip(names, found, strict=True):
                error = ErrorStatistics.from_dict(row["error"])
                if error is None:
                    skipped[name] = "not measured"
                    continue
                formats = shown_format(first[name]), shown_format(second[name])
                pairs[name] = PairReport(name, name, first[name].shape, *formats, error)
        return DiffReport(
            a=str(a),
            b=str(b),
            tensors=tuple(pairs[name] for name in shared if name in pairs),
            only_in_a=tuple(name for name in first if name not in second),
            only_in_b=tuple(name for name in second if name not in first),
            mismatched=mismatched,
            skipped=skipped,
            unequal=tuple(unequal),
            seconds=time.perf_counter() - began,
        )


def _native_diff(
    first: Checkpoint,
    number_a: int,
    second: Checkpoint,
    number_b: int,
    pairs: list[tuple[str, str]],
    threads: int | None,
    on_progress: Progress | None,
) -> str:
    from . import _rust

    return _rust.diff(
        native_checkpoint(first, number_a), native_checkpoint(second, number_b), pairs, threads, on_progress
    )


def _is_equal(first: Checkpoint, second: Checkpoint, name: str) -> bool:
    return bool(first.read(name).tobytes() == second.read(name).tobytes())
