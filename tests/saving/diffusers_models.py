"""What the tests of saved diffusers models share: the backends, tiny models, and what stands in a folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import weightpack as wp
from tests.conftest import find_peer
from tests.integrations import tiny_diffusers as tiny
from tests.quantizers.test_contract import BACKENDS as CONTRACT

BACKENDS: dict[str, tuple[str | None, Any]] = {
    "plain": (None, lambda: None),
    **{name: found for name, found in CONTRACT.items() if not name.startswith("gguf")},
    "fp4": ("bitsandbytes", lambda: wp.BitsAndBytesConfig(load_in_4bit=True)),
    "quanto int2": ("optimum.quanto", lambda: wp.QuantoConfig("int2")),
    "torchao int8 dynamic": ("torchao", lambda: wp.TorchAoConfig("int8_dynamic")),
    "torchao mxfp8": ("torchao", lambda: wp.TorchAoConfig("mxfp8")),
    "torchao mxfp4": ("torchao", lambda: wp.TorchAoConfig("mxfp4")),
    "modelopt INT4": ("modelopt", lambda: wp.NVIDIAModelOptConfig("INT4")),
    "modelopt NF4": ("modelopt", lambda: wp.NVIDIAModelOptConfig("NF4")),
}
"""Backends that can be saved: the package, and a config. The forms of torchao that are not among them are
packed on a GPU only."""

RUNS_ON_A_GPU = ("torchao mxfp8", "torchao mxfp4")
"""Backends whose layers do not run on a CPU."""


def dtype_of(backend: str) -> Any:
    """The type of what is not packed. quanto's int8 in diffusers' hands is tried in float32: in bfloat16 torch's
    own product ends the process for fewer than 16 columns."""
    import torch

    return torch.float32 if backend.startswith("quanto") else torch.bfloat16


def sources(tmp_path_factory: Any) -> Any:
    """A function that gives the class and folder of a tiny model, which is made once."""
    diffusers = find_peer("diffusers")
    done: dict[str, tuple[Any, Path]] = {}

    def source(name: str) -> tuple[Any, Path]:
        if name not in done:
            import torch

            folder = tmp_path_factory.mktemp("source") / name
            done[name] = tiny.save(name, diffusers, folder, dtype=torch.bfloat16), folder
        return done[name]

    return source


def load(source: Any, backend: str, name: str) -> Any:
    """The tiny model `name`, packed by `backend`."""
    needs, make = BACKENDS[backend]
    if needs is not None:
        find_peer(needs)
    cls, folder = source(name)
    return wp.from_pretrained(cls, folder, quantization_config=make(), torch_dtype=dtype_of(backend))


def files_of(folder: Path) -> dict[str, Any]:
    """All files of a folder: of weights header, metadata but for the stamp of the plan, and digest of the data; of
    JSON the content, without that stamp."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            end = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:end])
            found[path.name] = unstamped(header.pop("__metadata__")), header, hashlib.sha256(data[end:]).hexdigest()
        elif path.name.endswith(".json") and ".index." in path.name:
            index = json.loads(data)
            found[path.name] = {**index, "metadata": unstamped(index["metadata"])}
        else:
            found[path.name] = data
    return found


def unstamped(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata without what the engine tells of the plan that wrote it."""
    return {key: value for key, value in metadata.items() if not key.startswith("weightpack")}
