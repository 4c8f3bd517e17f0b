"""torchao's own packing of 4-bit weights, on the CPU.

torchao takes the functions that choose scales and pack codes from MSLK, of which no package index has a build for
CPUs. They are plain torch, and stand in one file, which can be read by itself:

- `mslk/quantize/shuffle.py` of meta-pytorch/MSLK, also where MSLK is installed;
- `fbgemm_gpu/experimental/gen_ai/quantize.py` of fbgemm-gpu-genai 1.9.0
  (`pip download --no-deps fbgemm-gpu-genai==1.9.0`, and unpack that file).

`WEIGHTPACK_INT4_PEER` is the path of one of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = "WEIGHTPACK_INT4_PEER"
KERNELS = ("mslk.quantize.triton.fp8_quantize", "fbgemm_gpu.experimental.gemm.triton_gemm.fp8_gemm")
"""What the files import and these functions have no use for: kernels for GPUs."""


def functions() -> ModuleType:
    """The module with the functions; skips the test where there is none."""
    path = os.environ.get(FILE)
    if path is None:
        if importlib.util.find_spec("mslk") is None:
            pytest.skip(f"no MSLK for CPUs; {FILE} may name the file with its functions")
        return importlib.import_module("mslk.quantize.shuffle")
    # Before there is a module by a name that torchao looks for.
    importlib.import_module("torchao.prototype.safetensors.safetensors_support")
    made = []
    for kernels in KERNELS:
        for name in (kernels[:end] for end, letter in enumerate(f"{kernels}.") if letter == "."):
            if name not in sys.modules:
                sys.modules[name] = ModuleType(name)
                made.append(name)
        sys.modules[kernels].quantize_fp8_row = None  # type: ignore[attr-defined]
    try:
        spec = importlib.util.spec_from_file_location("int4_functions", Path(path))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name in made:
            del sys.modules[name]
    return module


@contextmanager
def given() -> Iterator[ModuleType]:
    """torchao's module of such weights, with the functions."""
    module = importlib.import_module("torchao.quantization.quantize_.workflows.int4.int4_tensor")
    found = functions()
    before = {name: getattr(module, name) for name in ("int4_row_quantize_zp", "pack_int4")}
    try:
        for name in before:
            setattr(module, name, getattr(found, name))
        yield module
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def packed(weight: Any, group: int) -> Any:
    """The `Int4Tensor` that torchao makes of a weight [N, K]."""
    with given() as module:
        return module.Int4Tensor.from_hp(weight, [1, group])
