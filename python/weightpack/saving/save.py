"""`weightpack.save_pretrained`: a model, packed or not, as a folder that its host loads.

| step | what happens |
|---|---|
| 1 gate | whether the quantizer can save; the size of shards; what is in the way |
| 2 tensors | the quantizer's `stored_state`: packed weights and their statistics, under names of the checkpoint |
| 3 names | the host's `stored_tensors`: its own renamings, each tied weight once |
| 4 files | the host's `files`: `config.json` with the complete `quantization_config`, and what else belongs to it |
| 5 writing | the engine streams the tensors into weights files beside the destination |
| 6 commit | the folder takes the destination's place in one step |
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..sizes import parse_size
from .gguf_file import is_gguf, save_gguf
from .parts import part_of, write


def save_pretrained(
    model: Any,
    path: str | os.PathLike[str],
    *,
    max_shard_size: str | int = "5GB",
    safe_serialization: bool = True,
    variant: str | None = None,
    form: str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    on_progress: Callable[[int, int, int, str], None] | None = None,
) -> None:
    """Writes a model folder: weights in one safetensors file or in shards with an index, `config.json`, and
    what else the host's own loader reads.

    `model` is one that weightpack loaded, of any host and any backend that can be saved
    (`quantizer_of(model).is_serializable`), or a plain `torch.nn.Module`, diffusers or transformers model.
    Packed weights are written as they are in memory, on any device; nothing is decoded or gathered.

    `max_shard_size` is the most data bytes of one file ("5GB", "500MB", a number), `variant` the infix
    of file names (`fp16`). A folder that is there keeps its other files; files of a model in it are
    replaced only if `overwrite`, and are whole until then. `on_progress(read, total, written, tensor)`,
    in bytes, is called about ten times a second. `threads` is the number of threads that write, by
    default one per processor.

    With `safe_serialization=False` weights go to torch's own files (`pytorch_model.bin`), which load with
    `torch.load(weights_only=True)`; those of torchao once it has been imported.

    A `path` that ends in `.gguf` gets one GGUF file, of a model that is packed in GGUF blocks or not packed.
    One that came from a GGUF file becomes that file again, with packed tensors, names, order and pairs as
    they were, and what has changed since in the type that it has now. Others get the names, pairs and
    tokenizer that `convert` would give them. A folder of GGUF blocks is loaded by weightpack alone.

    `form="unified"` writes a model that was packed for ModelOpt as ModelOpt exports it for vLLM, TensorRT-LLM
    and SGLang, with `hf_quant_config.json` (see `quantizers.modelopt_unified`). A model that was loaded from
    such an export is saved so by default. `form="modelopt"` adds the `modelopt_state.pth` by which ModelOpt
    restores a packed model itself.

    Raises `ConfigError` for a model whose backend cannot save it, for a size that is none and for a
    destination that is in the way, `OSError` where the place cannot be written or has no room: each
    before any file is touched.
    """
    if is_gguf(path):
        if variant is not None or form is not None or not safe_serialization:
            raise ConfigError("a GGUF file has no variant and no other form, and there is none of torch's own")
        save_gguf(model, path, overwrite=overwrite, threads=threads, on_progress=on_progress)
        return
    part = part_of(model, variant=variant, safe_serialization=safe_serialization, form=form)
    write(
        type(model).__name__,
        Path(path),
        [part],
        max_shard_bytes=parse_size(max_shard_size, "max_shard_size"),
        overwrite=overwrite,
        threads=threads,
        on_progress=on_progress,
    )
