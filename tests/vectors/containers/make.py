"""Golden files of the containers, written by the peer libraries: safetensors 0.8.0 (with torch 2.13.0) and gguf 0.19.0.

`python tests/vectors/containers/make.py` writes them beside this file. The Rust tests check that reading one and
writing it again gives the same bytes; the Python tests check that the installed peers still write these bytes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

SAFETENSORS_VERSION = "0.8.0"
GGUF_VERSION = "0.19.0"


def safetensors_file() -> bytes:
    """Every type that torch and safetensors share, a scalar, an empty tensor, names that need escapes."""
    import torch
    from safetensors.torch import save_file

    counted = torch.arange(24, dtype=torch.int64)
    tensors = {
        'b/é "\\\n\x01\x7f\u2028\U0001f600': counted[:6].reshape(2, 3).to(torch.bfloat16),
        "a.weight": counted[:6].reshape(3, 2).to(torch.float32),
        "scalar": torch.tensor(0.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3, dtype=torch.uint8),
        "": counted[:1].to(torch.uint8),
        "bool": counted[:3].bool(),
        "c64": counted[:2].to(torch.complex64),
        "f16": counted[:3].to(torch.float16),
        "f8_e4m3": counted[:5].to(torch.float8_e4m3fn),
        "f8_e4m3fnuz": counted[:5].to(torch.float8_e4m3fnuz),
        "f8_e5m2": counted[:5].to(torch.float8_e5m2),
        "f8_e5m2fnuz": counted[:5].to(torch.float8_e5m2fnuz),
        "f8_e8m0": counted[:5].to(torch.uint8).view(torch.float8_e8m0fnu),
        "i8": counted[:3].to(torch.int8),
        "i16": counted[:3].to(torch.int16),
        "i32": counted[:3].to(torch.int32),
        "i64": counted[:3].clone(),
        "u16": counted[:3].to(torch.uint16),
        "u32": counted[:3].to(torch.uint32),
        "u64": counted[:3].to(torch.uint64),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        # One key: the peer writes several in a random order.
        save_file(tensors, path, metadata={"format": "pt"})
        return path.read_bytes()


def gguf_files() -> dict[str, bytes]:
    """Every value type, tensors of plain and block types; little-endian, big-endian, and split in two."""
    import gguf
    import numpy as np

    def written(endian: gguf.GGUFEndian, alignment: int | None, **split: Any) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            writer = gguf.GGUFWriter(Path(folder) / "m.gguf", "llama", endianess=endian, **split)
            if alignment is not None:
                writer.add_custom_alignment(alignment)
            writer.add_uint8("t.u8", 255)
            writer.add_int8("t.i8", -128)
            writer.add_uint16("t.u16", 65535)
            writer.add_int16("t.i16", -32768)
            writer.add_uint32("t.u32", 2**32 - 1)
            writer.add_int32("t.i32", -(2**31))
            writer.add_float32("t.f32", 0.1)
            writer.add_uint64("t.u64", 2**64 - 1)
            writer.add_int64("t.i64", -(2**63))
            writer.add_float64("t.f64", 0.1)
            writer.add_bool("t.bool", True)
            writer.add_string("t.text", "é\n")
            writer.add_array("t.texts", ["a", "é", ""])
            writer.add_array("t.numbers", [1, -2, 3])
            writer.add_array("t.floats", [0.5, -0.25])
            writer.add_array("t.truths", [True, False])
            counted = np.arange(-48, 48, dtype=np.float32)
            writer.add_tensor("f32", counted[:6].reshape(1, 2, 3))
            writer.add_tensor("f16", counted[:5].astype(np.float16))
            writer.add_tensor("i8", counted[:7].astype(np.int8))
            if endian == gguf.GGUFEndian.LITTLE:
                packed = gguf.quants.quantize(counted.reshape(3, 32), gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor("q8_0", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}

    little, big = gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG
    return {
        "little.gguf": written(little, None)["m.gguf"],
        "aligned.gguf": written(little, 128)["m.gguf"],
        "big.gguf": written(big, None)["m.gguf"],
        **written(little, None, split_max_tensors=3),
    }


def build() -> dict[str, bytes]:
    """File name to content."""
    return {"types.safetensors": safetensors_file(), **gguf_files()}


if __name__ == "__main__":
    for name, content in build().items():
        (Path(__file__).parent / name).write_bytes(content)
