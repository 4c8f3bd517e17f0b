"""Every format as a source of every format that is written: the bytes are those of decoding the source and
encoding what comes out. Formats that are copied into themselves keep their bytes, and those whose codes and
scales are only put in another order (`tests/engine/test_expert_sources.py`) their numbers."""

from __future__ import annotations

import json
import os
import re
import struct
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import weightpack as wp
from weightpack import _rust
from weightpack.entry import FLOATS, Entry
from weightpack.errors import UnsupportedError
from weightpack.recipes import recipe_rows
from weightpack.targets import CASTS, format_table

from ..conftest import write_safetensors
from ..language.models import make_model
from .packed_sources import DECODED_ONLY

TABLE = {row.name: row for row in format_table()}
TARGETS = [row.name for row in TABLE.values() if row.encodes != "never"]
IN_GGUF = [name for name in TARGETS if TABLE[name].container in ("gguf", "any")]
IN_SAFETENSORS = [name for name in TARGETS if TABLE[name].container in ("safetensors", "any")]
REORDERED = {
    ("modelopt:mxfp4", "gguf:mxfp4"),
    ("compressed-tensors:mxfp4", "gguf:mxfp4"),
    ("compressed-tensors:mxfp4", "modelopt:mxfp4"),
    ("gguf:mxfp4", "modelopt:mxfp4"),
}
ROWS, COLUMNS = 32, 256
LAYER = "layers.{}.up_proj.weight"


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder in memory where there is one: a thousand small files are synced."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def weights() -> np.ndarray:
    """Of any size, a row of zeros and a weight that stands out among them."""
    values = np.random.default_rng(7).normal(0, 0.02, (ROWS, COLUMNS))
    values[3] = 0
    values[5, 9] = 1.5
    return values.astype(ml_dtypes.bfloat16)


def write_folder(folder: Path, tensors: dict[str, Any], section: Any = None, metadata: Any = None) -> Path:
    folder.mkdir()
    config = {"model_type": "x", **({} if section is None else {"quantization_config": section})}
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors, metadata)
    return folder


@cache
def source(place: Path, name: str, layers: int) -> Path:
    """A checkpoint of some layers, all the same, in one format."""
    path = place / f"{name.replace(':', '-')}-{layers}"
    if name in DECODED_ONLY:
        packed = DECODED_ONLY[name](7, ROWS, COLUMNS)
        if packed.blocks is not None:
            blocks = {LAYER.format(i): (packed.blocks, name.partition(":")[2].upper()) for i in range(layers)}
            wp.gguf.write(f"{path}.gguf", blocks, {"general.architecture": "x"})
            return Path(f"{path}.gguf")
        modules = [LAYER.format(i).removesuffix("weight") for i in range(layers)]
        tensors = {f"{module}{suffix}": array for module in modules for suffix, array in packed.arrays.items()}
        told = None
        if packed.metadata is not None:
            names = [f"{module}weight" for module in modules]
            told = {"tensor_names": json.dumps(names), **dict.fromkeys(names, json.dumps(packed.metadata))}
        return write_folder(path, tensors, packed.section, told)
    if name == "bf16":
        stored = ("BF16", [ROWS, COLUMNS], weights().tobytes())
        return write_folder(path, {LAYER.format(i): stored for i in range(layers)})
    if TABLE[name].container == "gguf":
        path = Path(f"{path}.gguf")
        convert(source(place, "bf16", layers), path, name)
    else:
        convert(source(place, "bf16", layers), path, name)
    return path


def convert(src: Path, dst: Path, to: str, **options: Any) -> None:
    if dst.suffix == ".gguf":
        options = {"arch": "none", "search": "weighted", "requantize": True, **options}
    wp.convert(src, dst, to, layers="names", verify=False, threads=1, **options)


def stored(path: Path) -> dict[str, bytes]:
    """The arrays of a checkpoint by name."""
    if path.suffix == ".gguf":
        with wp.gguf.open(path) as file:
            return {name: file.raw(name).tobytes() for name in file.tensors}
    data = (path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    return {name: data[8 + length :][slice(*row["data_offsets"])] for name, row in header.items()}


def encoded(name: str, decoded: np.ndarray, entry: Entry) -> dict[str, bytes]:
    """The arrays that `entry` has once it is packed as `name` from f32 weights."""
    params = json.dumps({"dtype": entry.dtype if entry.dtype in FLOATS else "BF16"})
    shape = list(decoded.shape)
    components = json.loads(_rust.layout(name, shape, params))
    out = [np.empty(component["bytes"], np.uint8) for component in components]
    importance = np.ones(COLUMNS, np.float32) if name.startswith("gguf:") else None
    data = decoded.reshape(-1).view(np.uint8)
    lengths = _rust.encode(name, shape, params, data, "F32", out, 1, importance)
    module, _, leaf = entry.name.rpartition(".")
    names = {"appended": f"{entry.name}.", "sibling": f"{module}.", "flattened": f"{module}._{leaf}_"}
    return {
        (names[component["naming"]] + component["suffix"]).removesuffix("."): array[:length].tobytes()
        for component, array, length in zip(components, out, lengths, strict=True)
    }


def cells(name: str, place: Path, result: Path, targets: dict[str, str]) -> None:
    """Compares a result, whose tensors have these formats, with the source made of format `name`."""
    origin = source(place, name, len(targets))
    kept, found, wrong = stored(origin), stored(result), []
    with wp.open_checkpoint(origin) as before, wp.open_checkpoint(result) as after:
        assert set(after) == set(targets)
        for tensor, target in targets.items():
            assert after[tensor].format == target
            wanted = encoded(target, before.read(tensor, dtype="float32"), before[tensor])
            if target == name:
                module = tensor.rpartition(".")[0]
                wanted = {array: data for array, data in kept.items() if array.startswith(f"{module}.")}
            if (name, target) in REORDERED:
                read = [checkpoint.read(tensor, dtype="float32") for checkpoint in (before, after)]
                np.testing.assert_array_equal(*read)
                wanted = {array: found[array] for array in wanted}
            if any(found.pop(array, None) != data for array, data in wanted.items()):
                wrong.append(target)
    assert not wrong
    assert not found


@pytest.mark.parametrize("name", TABLE)
def test_into_gguf(place: Path, name: str) -> None:
    targets = {LAYER.format(number): target for number, target in enumerate(IN_GGUF)}
    assign = [f"{re.escape(tensor)}={target}" for tensor, target in targets.items()]
    result = place / f"{name.replace(':', '-')}-becomes.gguf"
    convert(source(place, name, len(targets)), result, "q8_0", assign=assign)
    cells(name, place, result, targets)


@pytest.mark.parametrize("name", TABLE)
def test_into_safetensors(place: Path, name: str) -> None:
    for target in IN_SAFETENSORS:
        result = place / f"{name.replace(':', '-')}-becomes-{target.replace(':', '-')}"
        convert(source(place, name, 1), result, target)
        cells(name, place, result, {LAYER.format(0): target})


@pytest.mark.parametrize("name", TABLE)
def test_a_source_decodes_to_what_it_was_made_of(place: Path, name: str) -> None:
    """Whatever the arrays are recognised by, the weights are those that the arrays alone decode to."""
    tensor = LAYER.format(0)
    with wp.open_checkpoint(source(place, name, 1)) as checkpoint:
        assert checkpoint[tensor].format == name
        found = checkpoint.read(tensor, dtype="float32")
    if name in DECODED_ONLY:
        wanted = DECODED_ONLY[name](7, ROWS, COLUMNS).weights.astype(np.float32)
    elif name in CASTS:
        wanted = weights().astype({"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}[name])
    else:
        more = {"importance": np.ones(COLUMNS, np.float32)} if name.startswith("gguf:") else {}
        wanted = wp.dequantize(wp.quantize(weights(), name, **more), name, shape=(ROWS, COLUMNS))
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


def test_a_format_that_is_not_encoded_has_a_maker() -> None:
    assert set(DECODED_ONLY) == set(TABLE) - set(TARGETS)


@pytest.mark.parametrize("name", DECODED_ONLY)
def test_what_is_not_encoded_is_no_target(place: Path, name: str) -> None:
    result = place / f"refused{'.gguf' if TABLE[name].container == 'gguf' else ''}"
    with pytest.raises(UnsupportedError, match=f"^{name} is decoded by this version, and not written\n"):
        convert(source(place, "bf16", 1), result, name)


@pytest.mark.parametrize("name", [name for name in TARGETS if TABLE[name].encodes == "with importance"])
def test_what_needs_importance_is_refused_without(place: Path, name: str) -> None:
    with pytest.raises(UnsupportedError, match="importance vector only"):
        convert(source(place, "bf16", 1), place / "refused.gguf", name, search="ref")


def test_recipes_choose_the_same_types_for_packed_weights(place: Path) -> None:
    plain = make_model(place / "llama", "llama2")
    wp.convert(plain, place / "llama-fp8", "fp8:block", layers="names")
    for recipe in recipe_rows():
        plans = [
            wp.convert(folder, place / "no.gguf", recipe.name, search="weighted", dry_run=True)
            for folder in (plain, place / "llama-fp8")
        ]
        chosen = [{tensor.stored_as: tensor.format for tensor in plan.tensors} for plan in plans]
        assert chosen[0] == chosen[1], recipe.name
        assert {tensor.source_format for tensor in plans[1].tensors} == {"bf16", "fp8:block"}


def test_recipes_that_need_importance_say_so(place: Path) -> None:
    plain = make_model(place / "llama-plain", "llama2")
    messages = {}
    for recipe in recipe_rows():
        try:
            wp.convert(plain, place / "no.gguf", recipe.name, dry_run=True)
        except UnsupportedError as error:
            messages[recipe.name] = error.message
    assert set(messages) == {row.name for row in recipe_rows() if row.encodes == "with importance"}
    assert all("importance vector only" in message for message in messages.values())


def test_the_command_lists_what_is_tested_here(command_line: Any) -> None:
    listed = command_line.json("formats")
    assert (listed["sources"], listed["targets"]) == (list(TABLE), TARGETS)
    told = command_line("formats").stdout
    assert f"{len(TABLE)} that are read, each of which converts to each of the {len(TARGETS)} that are written" in told
