"""Reports as text for people: tables on standard output, as wide as they need where it is no terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .progress import show_seconds
from .sizes import show_size
from .terminal import printable

if TYPE_CHECKING:
    from .demo import Demo
    from .report import CheckpointInfo, ConvertReport, DiffReport, ErrorStatistics, TensorReport
    from .targets import FormatInfo

_WIDTH_OF_FILES = 10_000
WORST_SHOWN = 20


def show_plan(report: ConvertReport) -> None:
    """Every tensor with its format and the reason, then sizes."""
    _table(
        ("tensor", "shape", "from", "to", "bytes", "why"),
        [
            (t.stored_as, _shape(t.shape), t.source_format, "=" if t.copied else t.format, str(t.output_bytes), t.why)
            for t in report.tensors
        ],
        right=(4,),
    )
    _lines(
        ("source", show_size(report.source_bytes)),
        ("result", f"{show_size(report.output_bytes)} ({report.output_bytes} bytes) in {_count(report.files, 'file')}"),
        ("bits per weight", f"{report.bits_per_weight:.2f}"),
        ("memory", f"at most {show_size(report.memory_bytes)}, {report.threads} threads"),
        ("disk", _disk(report)),
        *_layers(report),
        ("left out", ", ".join(report.left_out)),
    )


def show_conversion(report: ConvertReport) -> None:
    """The tensors with the largest errors, then totals."""
    worst = report.worst()
    if worst:
        _table(
            ("tensor", "from", "to", "bits/weight", "SNR dB", "relative RMS", "max error", "cosine"),
            [
                (t.stored_as, t.source_format, t.format, f"{t.bits_per_weight:.2f}", *_error(t.error))
                for t in worst[:WORST_SHOWN]
            ],
            right=(3, 4, 5, 6, 7),
        )
        if len(worst) > WORST_SHOWN:
            _print(f"and {len(worst) - WORST_SHOWN} more with a smaller error (all of them with --json)")
    packed = [tensor for tensor in report.tensors if ":" in tensor.format]
    error = report.error
    _lines(
        ("tensors", _kinds(report.tensors)),
        ("bits per weight", f"{report.bits_per_weight:.2f}" + (f", packed ones {_bits(packed)}" if packed else "")),
        ("SNR", "" if error is None else f"{_decibel(error.snr_db)} dB over all tensors that changed"),
        ("size", f"{show_size(report.source_bytes)} to {show_size(report.output_bytes)}"),
        ("resumed", show_size(report.resumed_bytes) if report.resumed_bytes else ""),
        (
            "time",
            f"{report.seconds:.2f} s, reading {show_size(report.read_rate)}/s, "
            f"writing {show_size(report.write_rate)}/s",
        ),
        *_layers(report),
        ("left out", ", ".join(report.left_out)),
        ("written", report.destination),
    )


def show_inspection(info: CheckpointInfo) -> None:
    """Every tensor, then totals by format."""
    _table(
        ("tensor", "shape", "dtype", "format", "bytes", "bits/weight"),
        [
            (t.name, _shape(t.shape), t.dtype, t.format or "-", str(t.bytes), f"{t.bits_per_weight:.2f}")
            for t in info.tensors
        ],
        right=(4, 5),
    )
    _print("")
    _table(
        ("format", "tensors", "weights", "size"),
        [
            (name, str(row["tensors"]), str(row["weights"]), show_size(row["bytes"]))
            for name, row in info.formats.items()
        ],
        right=(1, 2, 3),
    )
    if info.container == "gguf":
        _print("")
        _table(("key", "value"), [(key, _value(value)) for key, value in info.metadata.items()])
    _lines(
        ("container", f"{info.container}, {_count(info.files, 'file')}"),
        ("architecture", info.architecture or ""),
        ("weights", f"{info.weights} in {show_size(info.bytes)}, {info.bits_per_weight:.2f} bits per weight"),
        ("packed by", info.method or ""),
        *(("problem", problem) for problem in info.problems),
    )


def show_difference(report: DiffReport) -> None:
    """Every pair, the largest errors first, then what has no partner."""
    _table(
        ("tensor", "a", "b", "SNR dB", "relative RMS", "max error", "cosine"),
        [(p.name, p.format_a, p.format_b, *_error(p.error)) for p in report.worst()],
        right=(3, 4, 5, 6),
    )
    error = report.error
    _lines(
        ("tensors", str(len(report.tensors))),
        ("SNR", "" if error is None else f"{_decibel(error.snr_db)} dB over all"),
        *(("only in a", name) for name in report.only_in_a),
        *(("only in b", name) for name in report.only_in_b),
        *(("shapes", f"{name}: {shapes}") for name, shapes in report.mismatched.items()),
        *(("differs", name) for name in report.unequal),
        *(("skipped", f"{name}: {why}") for name, why in report.skipped.items()),
        ("time", show_seconds(report.seconds) if report.seconds >= 1 else f"{report.seconds:.2f} s"),
    )


def show_formats(formats: Sequence[FormatInfo], recipes: Sequence[FormatInfo]) -> None:
    """The table of formats and recipes, and what converts to what."""
    _table(
        ("format", "short", "bits/weight", "read", "written", "stored in", "exactness", "equal to", "read by"),
        [
            (
                row.name,
                row.short or "",
                f"{row.bits_per_weight:.4g}",
                "-" if row in recipes else "yes",
                _WRITTEN[row.encodes],
                row.container,
                row.exactness,
                row.peer,
                row.reader,
            )
            for row in (*formats, *recipes)
        ],
        right=(2,),
    )
    written = sum(row.encodes != "never" for row in formats)
    _lines(
        ("formats", f"{len(formats)} that are read, each of which converts to each of the {written} that are written"),
        ("recipes", f"{len(recipes)}, of types for the tensors of one GGUF file"),
    )


_WRITTEN = {"always": "yes", "never": "no", "with importance": "with importance"}


_WIDTH_OF_VALUES = 60
"""A chat template takes pages; its beginning is enough to know it."""


def _value(value: Any) -> str:
    """A metadata value in one short line."""
    if isinstance(value, dict):
        if "count" in value:
            return f"[{value.get('type')}], {value['count']} items"
        return f"{value.get('type')}, {value.get('bytes')} bytes"
    text = " ".join((value if isinstance(value, str) else str(value)).split())
    return text if len(text) <= _WIDTH_OF_VALUES else text[: _WIDTH_OF_VALUES - 1] + "…"


def show_demo(demo: Demo) -> None:
    """What each step of the demo found."""
    _table(
        ("format", "source", "result", "bits/weight", "SNR dB", "relative RMS", "expected", "time"),
        [
            (
                step.format,
                show_size(step.source_bytes),
                show_size(step.output_bytes),
                f"{step.bits_per_weight:.2f}",
                _decibel(step.snr_db),
                f"{step.relative_rms:.3%}",
                f"{step.expected_rms:.3%}",
                f"{step.seconds:.2f} s",
            )
            for step in demo.steps
        ],
        right=(1, 2, 3, 4, 5, 6, 7),
    )
    checks = [(step.format, text, ok) for step in demo.steps for text, ok in step.checks]
    _lines(
        ("model", f"{demo.weights} weights" + (f" in {demo.model}" if demo.kept else "")),
        *((("passed" if ok else "FAILED"), f"{name}: {text}") for name, text, ok in checks),
        *(("kept", step.destination) for step in demo.steps if demo.kept),
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    is_terminal = sys.stdout.isatty()
    for number, name in enumerate(columns):
        justify: Any = "right" if number in right else "left"
        table.add_column(name, justify=justify, no_wrap=not is_terminal or number > 0, overflow="fold")
    for row in rows:
        # Names come out of files: they are text, never markup or control sequences.
        table.add_row(*(Text(printable(cell)) for cell in row))
    _console().print(table)


def _lines(*pairs: tuple[str, str]) -> None:
    """Facts, one a line, aligned; those without a value are left out."""
    shown = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0)
    _print("")
    for name, value in shown:
        _print(f"{name:<{width}}  {printable(value)}")


def _print(text: str) -> None:
    sys.stdout.write(text.rstrip() + "\n")
    sys.stdout.flush()


def _console() -> Any:
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH_OF_FILES, highlight=False)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _error(error: ErrorStatistics | None) -> tuple[str, str, str, str]:
    if error is None:
        return "", "", "", ""
    return _decibel(error.snr_db), f"{error.relative_rms:.3%}", f"{error.max_error:.3g}", f"{error.cosine:.6f}"


def _decibel(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.2f}"


def _kinds(tensors: Sequence[TensorReport]) -> str:
    """How many tensors there are, and what was done with how many; those that are copied may be packed ones."""
    done = {
        "packed": sum(":" in tensor.format for tensor in tensors),
        "decoded": sum(":" in tensor.source_format and ":" not in tensor.format for tensor in tensors),
        "copied": sum(tensor.copied for tensor in tensors),
    }
    told = ", ".join(f"{count} {word}" for word, count in done.items() if count)
    return f"{len(tensors)}: {told}" if told else str(len(tensors))


def _bits(tensors: Sequence[Any]) -> str:
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    return f"{8 * sum(tensor.output_bytes for tensor in tensors) / weights:.2f}" if weights else "none"


def _disk(report: ConvertReport) -> str:
    if report.disk_free_bytes is None:
        return ""
    return f"{show_size(report.output_bytes)} of {show_size(report.disk_free_bytes)} free"


def _layers(report: ConvertReport) -> list[tuple[str, str]]:
    return [
        ("layers", f"{component}: {source}" if component else f"told by {source}")
        for component, source in report.layers.items()
    ]


def _count(items: Sequence[Any], word: str) -> str:
    return f"{len(items)} {word}" if len(items) == 1 else f"{len(items)} {word}s"
