"""GGUF files and block types: read, decode, encode, write.

```python
import weightpack as wp

packed = wp.gguf.quantize(weights, "Q4_K")            # uint8, rows of whole blocks
again = wp.gguf.dequantize(packed, "Q4_K")            # float32

with wp.gguf.open("model.gguf") as file:
    print(file.architecture, file.metadata["general.name"])
    for name, tensor in file.tensors.items():
        print(name, tensor.shape, tensor.type)
    weight = file.read("blk.0.attn_q.weight", dtype="bfloat16")

wp.gguf.write("new.gguf", {"weight": weights}, {"general.architecture": "llama"}, types="Q8_0")
```

Arrays are numpy arrays (bfloat16 by way of `ml_dtypes`) or torch tensors on the CPU; results are of the
same kind. Shapes are in the order of numpy and torch, the row last; a file lists them the other way.
"""

from __future__ import annotations

from .blocks import TypeInfo, dequantize, quantize, types
from .reading import GGUFFile, GGUFMetadata, GGUFProblem, GGUFTensor, open
from .writing import Typed, write

__all__ = [
    "GGUFFile",
    "GGUFMetadata",
    "GGUFProblem",
    "GGUFTensor",
    "TypeInfo",
    "Typed",
    "dequantize",
    "open",
    "quantize",
    "types",
    "write",
]
