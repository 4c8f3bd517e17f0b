"""A GGUF file that is to be: the tensors of a model as the engine's source, and what is made of them."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import _rust
from ..decision import GGML_DIMENSIONS
from ..stored import Stored

MEMORY_BYTES = 32 << 20


class Draft:
    """`tensors` are rows of the engine's request in the order of the file, `pairs` are `(key, type, value)`,
    and `header` is a GGUF file whose pairs are carried over."""

    def __init__(self) -> None:
        self.tensors: list[dict[str, Any]] = []
        self.pairs: list[tuple[str, str, Any]] = []
        self.header: bytes | None = None
        self.most_dimensions = GGML_DIMENSIONS
        self._rows: dict[str, tuple[str, list[int]]] = {}
        self._arrays: list[Any] = []

    def source(self, name: str, dtype: str, shape: Sequence[int], tensor: Any) -> None:
        """Makes the bytes of `tensor` known as `name`, elements or blocks of `dtype`. Raises `FormatError` for
        a tensor that has no content."""
        if name not in self._rows:
            self._rows[name] = (dtype, list(shape))
            self._arrays.append(Stored(name, tensor).source())

    def write(
        self,
        model: str,
        destination: Path,
        *,
        overwrite: bool,
        threads: int | None,
        on_progress: Callable[[int, int, int, str], None] | None,
    ) -> None:
        """Writes the file beside `destination`, and puts it there in one step."""
        rows = [(name, dtype, shape) for name, (dtype, shape) in self._rows.items()]
        sources = [_rust.Checkpoint.from_arrays(model, rows, self._arrays, time.time_ns())]
        output: dict[str, Any] = {
            "container": "gguf",
            "stem": destination.stem,
            "metadata": [list(pair) for pair in self.pairs],
            "max_dimensions": self.most_dimensions,
            "tensors": self.tensors,
        }
        with contextlib.ExitStack() as stack:
            if self.header is not None:
                output["metadata_from"] = len(sources)
                sources.append(stack.enter_context(_opened(self.header)))
            request = {
                "destination": os.fspath(destination),
                "kind": "file",
                "outputs": [output],
                "options": {
                    "max_memory_bytes": MEMORY_BYTES,
                    "verify": False,
                    "keep_nonfinite": True,
                    "threads": threads,
                },
            }
            plan = _rust.Plan.build(json.dumps(request), sources)
            plan.run(overwrite=overwrite, resume=False, on_progress=on_progress)


@contextlib.contextmanager
def _opened(header: bytes) -> Iterator[_rust.Checkpoint]:
    """A GGUF file that is in memory, open: the engine reads them from a disk."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pairs.gguf")
        path.write_bytes(header)
        yield _rust.Checkpoint.open(str(path))
