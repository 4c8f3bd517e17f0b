"""Tensors as bytes: wherever they lie and however they are strided, in slabs of any size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from safetensors.torch import load_file  # noqa: E402

from weightpack.errors import FormatError  # noqa: E402
from weightpack.saving.parts import Part, write  # noqa: E402
from weightpack.stored import Reader, Stored  # noqa: E402


def pattern(*shape: int, dtype: Any = torch.float32) -> Any:
    count = 1
    for size in shape:
        count *= size
    data = torch.arange(count, dtype=torch.int64) % 251
    return data.to(dtype).reshape(shape) if dtype != torch.bool else (data % 3 == 0).reshape(shape)


def cases() -> dict[str, Any]:
    """Tensors that have no bytes in order, and some that have."""
    found = {
        "in order": pattern(5, 7),
        "transposed": pattern(33, 65).t(),
        "transposed deep": pattern(2, 3, 50, 40).transpose(1, 3),
        "channels last": pattern(3, 8, 5, 6).contiguous(memory_format=torch.channels_last),
        "expanded": pattern(1, 9).expand(40, 9),
        "expanded from one": torch.tensor(3.5).expand(17),
        "every third": pattern(100)[::3],
        "columns": pattern(64, 64)[:, 5:11],
        "one row": pattern(30, 40).t()[None, None],
        "few long rows": pattern(3, 5000).t().contiguous().t(),
        "negated": torch.complex(pattern(9, 4), pattern(9, 4)).conj().imag,
        "negated and transposed": torch.complex(pattern(9, 4), pattern(9, 4)).conj().imag.t(),
        "complex": torch.complex(pattern(9, 4), pattern(9, 4)),
        "conjugated": torch.complex(pattern(9, 4), pattern(9, 4)).conj(),
        "conjugated and transposed": torch.complex(pattern(9, 4), pattern(9, 4)).conj().t(),
        "one of a column": pattern(4, 4).t()[2:3, 1],
        "scalar": torch.tensor(7.25),
        "scalar of a column": pattern(4, 4).t()[2, 1],
        "empty": torch.zeros(0),
        "empty and wide": torch.zeros(3, 0, 5).transpose(0, 2),
        "subclass": torch.nn.Parameter(pattern(6, 8).t()),
    }
    for dtype in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ):
        found[f"{dtype} transposed"] = pattern(12, 31, dtype=dtype).t()
        found[f"{dtype}"] = pattern(12, 31, dtype=dtype)
    return found


CASES = cases()


def bytes_of(tensor: Any) -> bytes:
    dense = tensor.detach().resolve_neg().resolve_conj().clone(memory_format=torch.contiguous_format)
    return bytes(dense.reshape(-1).view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("name", CASES)
def test_any_piece_is_what_the_whole_has_there(name: str) -> None:
    tensor = CASES[name]
    whole = bytes_of(tensor)
    read = Reader(tensor.detach())
    for step in (1, 3, 16, 61, 4096, max(1, len(whole))):
        if len(whole) // step > 700:
            continue
        pieces = [read(first, min(step, len(whole) - first)).tobytes() for first in range(0, len(whole), step)]
        assert b"".join(pieces) == whole, step
    for first, count in ((0, 0), (len(whole) // 2, len(whole) // 3), (len(whole) // 3 + 1, len(whole) // 2)):
        assert read(first, count).tobytes() == whole[first : first + count]


def test_no_more_is_brought_together_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a tensor that is few long rows."""
    from weightpack import _arrays

    most = 0
    view = _arrays.view

    def watched(array: Any) -> Any:
        nonlocal most
        most = max(most, array.numel() * array.element_size())
        return view(array)

    monkeypatch.setattr(_arrays, "view", watched)
    for tensor in (pattern(2, 400, 500).transpose(1, 2), pattern(400, 1000).t(), pattern(200_000, 2).t()):
        read = Reader(tensor)
        for first in range(0, tensor.numel() * 4, 100_000):
            read(first, min(100_000, tensor.numel() * 4 - first))
    assert most <= 100_000 + 2 * 4


@pytest.mark.parametrize("threads", [1, 3])
def test_all_of_them_in_one_file(tmp_path: Path, threads: int) -> None:
    stored = [Stored(name, tensor) for name, tensor in CASES.items()]
    write("made", tmp_path / "out", [Part(stored, "model")], max_shard_bytes=1 << 40, threads=threads)
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert held.keys() == CASES.keys()
    for name, tensor in CASES.items():
        assert (held[name].dtype, held[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes_of(held[name]) == bytes_of(tensor), name


def test_what_has_no_content_or_no_type_is_refused(tmp_path: Path) -> None:
    for tensor, told in (
        (torch.zeros(3, device="meta"), '"lost" is not in memory'),
        (torch.zeros(3, dtype=torch.complex32), "complex32"),
        (torch.zeros(3, 3).to_sparse(), "sparse"),
    ):
        with pytest.raises(FormatError, match=told):
            write("made", tmp_path / "out", [Part([Stored("lost", tensor)], "model")], max_shard_bytes=100)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["more", "bytes", "nothing"])
def test_readers_that_give_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def read(self: Any, offset: int, count: int) -> Any:
        return {"more": torch.zeros(count + 1).numpy(), "bytes": b"x" * count, "nothing": None}[kind]

    monkeypatch.setattr(Reader, "__call__", read)
    part = Part([Stored("odd", pattern(4, 4).t())], "model")
    with pytest.raises(Exception, match="gave something else than 64 bytes"):
        write("made", tmp_path / "out", [part], max_shard_bytes=100)
    assert list(tmp_path.iterdir()) == []


def test_readers_that_fail_do_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On many threads at once, while the one that waits for them reports progress."""
    import threading
    import time

    seen = threading.Event()

    def fail(self: Any, offset: int, count: int) -> Any:
        time.sleep(0.01)
        raise MemoryError(f"no room for {count} bytes")

    monkeypatch.setattr(Reader, "__call__", fail)
    parts = [Part([Stored(f"t{number}", pattern(300, 300).t()) for number in range(40)], "model")]
    with pytest.raises(FormatError, match=r"MemoryError: no room for 360000 bytes \(tensor \"t0\"\)$"):
        write("made", tmp_path / "out", parts, max_shard_bytes=1000, threads=8, on_progress=lambda *_: seen.set())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cuda
def test_tensors_of_an_accelerator(tmp_path: Path) -> None:
    stored = [Stored(name, tensor.detach().cuda()) for name, tensor in CASES.items()]
    write("made", tmp_path / "out", [Part(stored, "model")], max_shard_bytes=1 << 40)
    held = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in CASES.items():
        assert bytes_of(held[name]) == bytes_of(tensor), name


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from weightpack.saving.parts import Part, write
from weightpack.stored import Stored

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024

kind = sys.argv[1]
tensors = [torch.full((4096, 4096), number, dtype=torch.int16) for number in range(9)]
if kind == "transposed":
    tensors = [tensor.t() for tensor in tensors]
elif kind == "few long rows":
    tensors = [torch.zeros(9 << 24, dtype=torch.int16).reshape(2, -1, 4096).transpose(1, 2)]
# What saving needs of the libraries is there before.
write("made", Path(sys.argv[2], "first"), [Part([Stored("a", torch.zeros(8, 8).t())], "model")], max_shard_bytes=9**9)
before, peak, over = anonymous(), 0, threading.Event()

def sample():
    global peak
    while not over.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)

sampler = threading.Thread(target=sample)
sampler.start()
stored = [Stored(str(number), tensor) for number, tensor in enumerate(tensors)]
write("made", Path(sys.argv[2], "out"), [Part(stored, "model")], max_shard_bytes=10**8, threads=2)
over.set()
sampler.join()
print(sum(tensor.nbytes for tensor in tensors), peak - before)
"""


@pytest.mark.parametrize("kind", ["in order", "transposed", "few long rows"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, kind, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, grown = map(int, done.stdout.split())
    assert size > 300e6
    assert grown <= 64e6
