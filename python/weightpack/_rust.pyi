"""The native module. Thin: arguments in, bytes moved with the interpreter released, results out.

Structured arguments and results cross as JSON text; `weightpack.convert`, `weightpack.inspect_` and
`weightpack.checkpoint` turn them into dataclasses.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Checkpoint",
    "Plan",
    "Writer",
    "__version__",
    "decode",
    "decode_rows",
    "diff",
    "encode",
    "formats",
    "layout",
    "pack_int4",
    "types",
    "unpack_int4",
]

__version__: str

def formats() -> str:
    """JSON list of the format table: name, short, container, exactness, peer, reader, bits_per_weight, encodes."""

def layout(format: str, shape: list[int], params: str) -> str:
    """JSON list of components: suffix, naming ("appended", "sibling", "joined" or
    "flattened"), dtype, shape, bytes, late. `params` is a JSON object."""

def encode(
    format: str,
    shape: list[int],
    params: str,
    data: NDArray[np.uint8],
    dtype: str,
    out: list[NDArray[np.uint8]],
    threads: int | None,
    importance: NDArray[np.float32] | None = None,
) -> list[int]:
    """Encodes a whole array into one byte array per component; gives each one's final length in bytes."""

def decode(
    format: str,
    shape: list[int],
    params: str,
    parts: list[NDArray[np.uint8]],
    out: NDArray[np.uint8],
    dtype: str,
    threads: int | None,
) -> None:
    """Decodes component byte arrays into `out`, rounded once to `dtype`."""

def decode_rows(
    format: str,
    columns: int,
    data: NDArray[np.uint8],
    out: NDArray[np.uint8],
    dtype: str,
    threads: int | None,
) -> None:
    """Decodes rows of `columns` weights: `data` and `out` are two-dimensional, their rows may stand apart."""

def types() -> str:
    """JSON list of GGUF's tensor types: id, name, block_weights, block_bytes, format (or null), encodes."""

def pack_int4(codes: NDArray[np.uint8], order: str) -> NDArray[np.uint8]: ...
def unpack_int4(packed: NDArray[np.uint8], order: str, count: int) -> NDArray[np.uint8]: ...
@final
class Checkpoint:
    """The checked headers of one checkpoint's files. Holds the files open; reads weights on demand."""

    @staticmethod
    def open(path: str, lenient: bool = False, quantization: str | None = None, dtype: str | None = None) -> Checkpoint:
        """`path`: a .safetensors, an *.index.json beside its shards, or a .gguf (any part of a split one).
        `lenient`: an empty key and data that is not aligned are warnings, in a .gguf.
        `quantization`: JSON of the model's `quantization_config`, `dtype` the type of its weights where they are
        not packed ("BF16"): what packed weights are recognised by where names do not tell."""

    @staticmethod
    def from_bytes(name: str, data: bytes) -> Checkpoint:
        """A safetensors file that is not on a disk; messages call it `name`."""

    @staticmethod
    def from_arrays(
        name: str,
        tensors: list[tuple[str, str, list[int]]],
        arrays: list[NDArray[np.uint8] | Callable[[int, int], NDArray[np.uint8]]],
        stamp: int,
    ) -> Checkpoint:
        """Arrays in memory, as they are: name, stored type ("BF16") and shape of each, and its bytes, or a
        function `read(offset, count)` that gives some of them, called on any thread. `stamp` tells one content
        from another."""

    def describe(self) -> str:
        """JSON object:
        container: "safetensors" | "gguf"; big_endian: bool; warnings: [str];
        files: [{path, bytes, header_bytes}];
        tensors: [{name, shape, dtype, format, weights, stored_bytes, file (index),
                   parts: [{name, dtype, shape, bytes, offset}]}]
        A packed weight and its statistics are one tensor; `format` is null where none decodes it, and
        `dtype` is the element type that decoding gives back (the stored type for plain ones).
        """

    def metadata(self) -> str:
        """JSON object of metadata, that of all shards together. GGUF arrays of more than 64 items are shown as
        {"type", "count"}."""

    def metadata_value(self, key: str) -> Any:
        """One GGUF metadata value, decoded whole; KeyError when absent."""

    def metadata_fields(self) -> list[tuple[str, str, int | None]]:
        """Key, type ("u32", "str", "[f32]") and, for arrays, number of items; in file order."""

    def metadata_item(self, key: str) -> Any:
        """One value, whole: a number, bool or str, a numpy array, a list of str or of arrays; KeyError when absent."""

    def read(
        self,
        name: str,
        out: NDArray[np.uint8],
        dtype: str,
        threads: int | None,
        rows: tuple[int, int] | None = None,
    ) -> None:
        """Decodes one tensor, or its rows from the first of `rows` up to the second, into `out`, rounded once to
        `dtype`; a stored integer type is copied as it is."""

    def fill(
        self,
        jobs: str,
        out: list[NDArray[np.uint8]],
        threads: int | None,
        on_progress: Callable[[int, int, int, str], None] | None,
    ) -> list[list[int]]:
        """Many tensors into arrays, encoded on the way; every job is checked before anything is read.

        `jobs`: JSON list of {name, format: full format name | "copy",
        params?: {block_size?, double_quant?, dtype?, keep_nonfinite?},
        through?: "BF16" | "F16" | "F32" (weights are rounded to this type once before they are encoded),
        rows?, shape?, add? as in a plan's tensors,
        transpose?: bool (rows and columns of a matrix of plain numbers are exchanged)}.
        `out`: byte arrays, for each job in order one per component of the format's layout; for "copy" one per
        stored part, in the order of `parts` in describe().
        Gives, by job and component, the final length in bytes; components whose length is only known at the end
        come in at their most."""

    def verify(
        self, threads: int | None, on_progress: Callable[[int, int, int, str], None] | None
    ) -> list[tuple[str, int, str]]:
        """Reads all data: name, block and fault of the first block of each array whose scale is not finite."""

@final
class Plan:
    """A conversion, complete and checked before the first byte is written."""

    @staticmethod
    def build(request: str, checkpoints: list[Checkpoint]) -> Plan:
        """`request` is a JSON object:
        destination: path; kind: "folder" | "file" (a file destination has exactly one output and no files);
        outputs: [{
            container: "safetensors" | "gguf"; folder: "" or a subfolder; stem: "model";
            max_shard_bytes: int | null; max_dimensions?: int (gguf; 4);
            metadata: {str: str} (safetensors) | [[key, type, value]] (gguf; type "u32", "str", "[i32]", ...);
            metadata_from: index of a gguf checkpoint whose key-value pairs are carried over | null;
            tensors: [{checkpoint: int, name: str, as: str, format: full format name | "copy",
                       params: {block_size?, double_quant?}, why: str,
                       rows?: [{name, first?, count?, interleave?: {groups, parts}}], shape?, add?: float,
                       importance?: {checkpoint: int | null, sums?, counts?}}]
        }];
        files: [{path: relative path, text: str} | {path: relative path, copy: absolute path}];
        options: {threads: int | null, max_memory_bytes: int, slab_bytes: int | null, verify: bool,
                  keep_nonfinite: bool, sync: bool}
        """

    def describe(self) -> str:
        """JSON object: plan_id; threads; source_bytes; output_bytes (at most); memory_bytes; disk_free_bytes;
        files: [{path, bytes, tensors}];
        tensors: [{name, as, shape, from, to, why, source_bytes, output_bytes, file, copied: bool}]
        """

    def run(
        self,
        *,
        overwrite: bool,
        resume: bool,
        on_progress: Callable[[int, int, int, str], None] | None,
        keep: Callable[[Path], Sequence[str | os.PathLike[str]]] | None = None,
    ) -> str:
        """Carries the plan out. `on_progress(read_bytes, source_bytes, written_bytes, tensor)` is called about ten
        times a second from the calling thread; signals are seen as often.

        `keep(folder)` lists the files, links and empty folders of what is at the destination that are carried
        over, relative to it: it is called when everything is written and no other writer can come between, at
        last with the folder that has just been replaced. What it raises leaves the destination as it is.

        JSON report: seconds; read_bytes; written_bytes; resumed_bytes; files: [{path, bytes}];
        tensors: [{name, as, from, to, output_bytes, bits_per_weight,
                   error: null | {weights, signal, noise, cross, power, max_error, relative_rms, snr_db, cosine}}]
        """

@final
class Writer:
    """A GGUF file that is made from arrays; it takes its place when it is committed."""

    @staticmethod
    def create(
        path: str,
        tensors: list[tuple[str, str, list[int]]],
        metadata: str,
        carried: list[tuple[str, Checkpoint]],
        *,
        max_dimensions: int,
        overwrite: bool,
    ) -> Writer:
        """`tensors`: name, type, shape. `metadata`: JSON list of [key, type, value]; before them stand the pairs
        `carried` over from other files."""

    def put(
        self,
        index: int,
        data: NDArray[np.uint8],
        dtype: str | None,
        importance: NDArray[np.float32] | None,
        threads: int | None,
    ) -> None:
        """Writes tensor `index`: weights of type `dtype`, encoded if need be, or with None the stored bytes."""

    def commit(self) -> int:
        """Finishes the file; gives its length."""

    def discard(self) -> None:
        """Removes what was written; nothing after `commit`."""

def diff(
    a: Checkpoint,
    b: Checkpoint,
    pairs: list[tuple[str, str]],
    threads: int | None,
    on_progress: Callable[[int, int, int, str], None] | None,
) -> str:
    """JSON list in the order of `pairs`: {a, b, error: {...} as in a report}."""
