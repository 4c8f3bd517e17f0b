"""A process that saves models on demand, each in a child of its own that may be killed at any moment.

torch is imported once; a save is a fork away. Requests are lines of JSON on the standard input: `net`
(arguments of the net), `to`, `save` (arguments of `save_pretrained`), `die` (where the child kills
itself, see `ambush`). Answers: `start PID` right before a save begins, `end CODE` when the child is gone.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Saver:
    """The process, seen from the test."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.saving.saver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            # Where the tests run in the background, interrupts are ignored unless asked for.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def start(self, net: dict[str, Any], to: Path, die: str | None = None, **save: Any) -> int:
        """Begins a save; gives the number of the process that saves."""
        assert self._process.stdin is not None
        print(json.dumps({"net": net, "to": str(to), "die": die, "save": save}), file=self._process.stdin, flush=True)
        return self._answer("start")

    def wait(self) -> int:
        """Exit code of the save: negative for a signal, 0 for success, 1 for an error."""
        return self._answer("end")

    def _answer(self, word: str) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().split()
        if line[:1] != [word]:
            self._process.kill()
            raise AssertionError(f"expected {word}, got {line}: {self._process.communicate()[1][-2000:]}")
        return int(line[1])

    def close(self) -> str:
        """Ends the process; gives what it wrote to standard error."""
        return self._process.communicate()[1]


def ambush(where: str) -> None:
    """Kills this process at a point of the save: `keep 2` when the folder is listed for the second time,
    `progress` at the first report, `read 3` when a tensor that is not contiguous is read for the third time.

    The folder is listed first of all (1), when everything is written (2), right before the exchange (3) and
    right after it (4).
    """
    from weightpack import stored
    from weightpack.saving import parts

    kind, _, number = where.partition(" ")
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    if kind == "keep":
        list_files = parts.carried_files

        def listed(*args: Any, **options: Any) -> Any:
            count()
            return list_files(*args, **options)

        parts.carried_files = listed
    elif kind == "read":
        read = stored.Reader.__call__

        def reading(*args: Any) -> Any:
            count()
            return read(*args)

        stored.Reader.__call__ = reading  # type: ignore[method-assign]
    else:
        raise ValueError(where)


def die(*report: Any) -> None:
    """A report of progress that nobody survives."""
    os.kill(os.getpid(), signal.SIGKILL)


def net_of(seed: int = 0, transposed: bool = False, **options: Any) -> Any:
    """A net with random weights; `transposed`: weights of the blocks are not contiguous."""
    from tests.loading import nets

    net = nets.make(seed, **options)
    net.config = dict(options)
    if transposed:
        for block in net.blocks:
            block.up.weight.data = block.up.weight.data.t().contiguous().t()
    return net


@contextmanager
def _answers() -> Iterator[Any]:
    # What libraries print must not come between.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    yield out


def _save(request: dict[str, Any], out: Any) -> int:
    try:
        net = net_of(**request["net"])
        save = request["save"]
        if request["die"] == "progress":
            save["on_progress"] = die
        elif request["die"]:
            ambush(request["die"])
        print("start", os.getpid(), file=out, flush=True)
        net.save_pretrained(request["to"], **save)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Answers requests until there are no more."""
    import torch

    for module in ("tests.loading.nets", "weightpack.model_mixin", "weightpack.saving.save"):
        importlib.import_module(module)
    torch.set_num_threads(1)
    with _answers() as out:
        for line in sys.stdin:
            child = os.fork()
            if child == 0:
                os._exit(_save(json.loads(line), out))
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print("end", code, file=out, flush=True)


if __name__ == "__main__":
    main()
