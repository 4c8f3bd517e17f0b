"""The corpus of broken files through Python, and the verdicts of the peers beside ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ..conftest import CommandLine
from ..corpus.make import build, committed
from .conftest import CORPUS

ROWS: dict[str, dict[str, Any]] = json.loads((CORPUS / "cases.json").read_text("utf-8"))

OPEN_ALL = """
import json, resource, sys
from weightpack import _rust, open_checkpoint
from weightpack.errors import WeightpackError
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
for path in json.load(sys.stdin):
    try:
        native = _rust.Checkpoint.open(path)
        json.loads(native.metadata())
        found = {"tensors": sum(len(t["parts"]) for t in json.loads(native.describe())["tensors"])}
    except WeightpackError as error:
        found = {"error": str(error)}
    if "error" in found:
        try:
            open_checkpoint(path)
            found = {"error": "open_checkpoint accepts what the native module refuses"}
        except WeightpackError:
            pass
    print(json.dumps([path, found]), flush=True)
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the corpus with the sparse files at their full length."""
    folder = tmp_path_factory.mktemp("corpus")
    for kind in ("safetensors", "gguf", "split", "index"):
        shutil.copytree(CORPUS / kind, folder / kind)
    for name, row in ROWS.items():
        if length := row.get("length"):
            with (folder / name).open("r+b") as file:
                file.truncate(length)
    return folder


def test_the_corpus_is_what_its_recipe_builds() -> None:
    built = build()
    assert sorted(built) == list(committed(CORPUS))
    for name, content in built.items():
        assert (CORPUS / name).read_bytes() == content, name


def test_each_file_leads_to_what_its_row_says(unpacked: Path) -> None:
    paths = [str(unpacked / name) for name in ROWS]
    done = subprocess.run(
        [sys.executable, "-c", OPEN_ALL], input=json.dumps(paths), capture_output=True, text=True, timeout=120
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"stopped after {lines[-1:]}: {done.stderr}"
    assert len(lines) == len(ROWS)
    for path, found in lines:
        name = str(Path(path).relative_to(unpacked))
        row = ROWS[name]
        if "error" in found:
            found["error"] = found["error"].replace(f"{unpacked}/", "")
        assert found == {key: row[key] for key in ("error", "tensors") if key in row}, name


@pytest.mark.parametrize(
    "name",
    [
        "safetensors/tensor_twice_escaped.safetensors",
        "gguf/offset_wraps_into_header.gguf",
        "gguf/array_u8_10_to_8.gguf",
        "split/part_missing/m-00001-of-00002.gguf",
        "index/name_parent/model.safetensors.index.json",
    ],
)
def test_the_command_line_refuses_with_its_own_code(
    unpacked: Path, command_line: CommandLine, name: str, tmp_path: Path
) -> None:
    for words in (["inspect", unpacked / name], ["convert", unpacked / name, tmp_path / "out", "--to", "bf16"]):
        done = command_line(*words)
        assert done.returncode == 3, done.stderr
        assert ROWS[name]["error"].partition(" (")[0] in done.stderr.replace(f"{unpacked}/", "")
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


STRICTER_THAN_SAFETENSORS = {
    "leading_space": "the format's text says that a header begins with {",
    "tensor_is_a_list": "the format's text says that a tensor is an object",
    "tensor_twice": "the format's text forbids names that appear twice",
    "tensor_twice_escaped": "the same, written in two ways",
    "tensor_twice_empty": "the same",
    "metadata_key_twice": "the same, of metadata",
    "metadata_key_twice_escaped": "the same, of metadata",
    "unknown_field_twice": "a field that appears twice has no meaning",
    "shape_65_dimensions": "dimensions are bounded",
    "shape_million_dimensions": "dimensions are bounded",
}


@pytest.mark.parametrize("name", [name for name in ROWS if name.startswith("safetensors/")])
def test_safetensors_comes_to_the_same_verdict(peer: Callable[[str], ModuleType], unpacked: Path, name: str) -> None:
    safetensors = peer("safetensors")
    row = ROWS[name]
    if "error" in row and Path(name).stem not in STRICTER_THAN_SAFETENSORS:
        with pytest.raises((safetensors.SafetensorError, OSError)):
            safetensors.safe_open(unpacked / name, "np")
    else:
        with safetensors.safe_open(unpacked / name, "np") as opened:
            assert ("error" in row) or len(opened.keys()) == row["tensors"]


NOT_READ_BY_GGUF_PY = {
    "good_64_gib_sparse": "a numpy view of 64 GiB is more than some machines map",
    "good_empty_tensor_of_huge_rows": "numpy has no such shape",
    "good_nothing": "a file without tensors or pairs",
    "good_removed_type_last": "an unknown type is an error there",
    "good_unknown_type": "an unknown type is an error there",
    "good_text_not_utf8": "decoded only when asked for",
}


GOOD_GGUF = [name for name in ROWS if name.startswith("gguf/good") and Path(name).stem not in NOT_READ_BY_GGUF_PY]


@pytest.mark.parametrize("name", GOOD_GGUF)
def test_gguf_py_reads_what_is_accepted(peer: Callable[[str], ModuleType], unpacked: Path, name: str) -> None:
    from weightpack import _rust

    reader = peer("gguf").GGUFReader(unpacked / name)
    described = json.loads(_rust.Checkpoint.open(str(unpacked / name)).describe())
    ours = {t["name"]: (t["shape"], t["stored_bytes"]) for t in described["tensors"]}
    theirs = {t.name: ([int(dim) for dim in reversed(t.shape)], int(t.n_bytes)) for t in reader.tensors}
    assert ours == theirs
