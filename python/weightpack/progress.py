"""How far a long run is: a bar on a terminal, a line every ten seconds elsewhere. Always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from .sizes import show_size

SECONDS_BETWEEN_LINES = 10.0
_WINDOW_SECONDS = 5.0


class Rates:
    """Bytes read and written per second over the last few seconds, and the time that is left."""

    def __init__(self, now: float) -> None:
        self._points: list[tuple[float, int, int]] = [(now, 0, 0)]

    def update(self, now: float, read: int, written: int) -> tuple[float, float]:
        """Takes the running totals at time `now`; gives both rates."""
        self._points.append((now, read, written))
        while len(self._points) > 2 and now - self._points[0][0] > _WINDOW_SECONDS:
            self._points.pop(0)
        then, read_then, written_then = self._points[0]
        elapsed = max(now - then, 1e-9)
        return (read - read_then) / elapsed, (written - written_then) / elapsed

    @staticmethod
    def left(read: int, total: int, rate: float) -> str:
        """Time until `total` is read, as people write it."""
        if read >= total:
            return "0 s"
        return show_seconds((total - read) / rate) if rate > 0 else "?"


def show_seconds(seconds: float) -> str:
    """A duration for people.

    >>> show_seconds(3725)
    '1 h 02 min'
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class ProgressLines:
    """Writes one line each ten seconds; nothing at all for a run shorter than that."""

    def __init__(self, verb: str, stream: TextIO | None = None, every: float = SECONDS_BETWEEN_LINES) -> None:
        self._verb = verb
        self._stream = sys.stderr if stream is None else stream
        self._every = every
        self._last = time.monotonic()
        self._rates = Rates(self._last)

    def __call__(self, read: int, total: int, written: int, tensor: str) -> None:
        now = time.monotonic()
        read_rate, write_rate = self._rates.update(now, read, written)
        if now - self._last < self._every:
            return
        self._last = now
        percent = 100 * read / total if total else 100.0
        self._stream.write(
            f"{self._verb}: {percent:.0f} %, {show_size(read)} of {show_size(total)}, "
            f"reading {show_size(read_rate)}/s, writing {show_size(write_rate)}/s, "
            f"{Rates.left(read, total, read_rate)} left\n"
        )
        self._stream.flush()

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class ProgressBar:
    """A bar with both rates and the time left, drawn by rich and removed at the end."""

    def __init__(self, verb: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._rates = Rates(time.monotonic())
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[detail]}"),
            console=Console(stderr=True),
            transient=True,
            expand=True,
        )
        self._task: Any = self._progress.add_task(verb, total=None, detail="")

    def __call__(self, read: int, total: int, written: int, tensor: str) -> None:
        read_rate, write_rate = self._rates.update(time.monotonic(), read, written)
        detail = (
            f"{show_size(read)} of {show_size(total)}, {show_size(read_rate)}/s in, "
            f"{show_size(write_rate)}/s out, {Rates.left(read, total, read_rate)}"
        )
        self._progress.update(self._task, completed=read, total=total or 1, detail=detail)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


def progress(verb: str) -> ProgressBar | ProgressLines:
    """A bar if standard error is a terminal, else lines."""
    return ProgressBar(verb) if sys.stderr.isatty() else ProgressLines(verb)
