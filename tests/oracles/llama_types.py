"""The types that llama.cpp's own `llama_model_quantize` gives the tensors of a made-up model."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import weightpack

from ..recipe_models import Model, entry
from .ggml import IDS, Ggml, InitParams


def quiet() -> Any:
    """llama-cpp-python, without the messages of the library."""
    import llama_cpp

    llama_cpp.llama_log_set(_silence(llama_cpp), None)
    return llama_cpp


@cache
def _silence(llama: Any) -> Any:
    # Kept alive for as long as the library may call it.
    return llama.llama_log_callback(lambda level, text, data: None)


def write_model(path: Path, model: Model) -> None:
    """Writes the model as GGUF, with as many keys as llama.cpp needs to quantize it."""
    import gguf

    writer = gguf.GGUFWriter(str(path), model.architecture)
    writer.add_context_length(32)
    writer.add_embedding_length(model.columns)
    writer.add_block_count(model.layers)
    writer.add_feed_forward_length(model.columns)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.heads_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(2)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(2)
    random = np.random.default_rng(1)
    for name, shape in model.shapes():
        kind = np.float32 if entry(name, shape).dtype == "F32" else np.float16
        writer.add_tensor(name, (random.standard_normal(shape) * 0.02).astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _importance(llama: Any, model: Model) -> Iterator[Any]:
    for name, shape in model.shapes():
        if len(shape) > 1:
            count = shape[-1] * (shape[0] if len(shape) == 3 else 1)
            data = (ctypes.c_float * count)(*[1.0] * count)
            yield llama.llama_model_imatrix_data(name.encode(), data, count)
    yield llama.llama_model_imatrix_data(None, None, 0)


def types(
    llama: Any, ggml: Ggml, folder: Path, model: Model, file_type: int, *, importance: bool
) -> dict[str, str] | None:
    """The type of every tensor in the file that llama.cpp makes, or `None` where it refuses."""
    source, target = folder / "model.gguf", folder / "out.gguf"
    if not source.exists():
        write_model(source, model)
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = file_type, 1
    if importance:
        rows = list(_importance(llama, model))
        parameters.imatrix = (llama.llama_model_imatrix_data * len(rows))(*rows)
    if llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)) != 0:
        return None
    with weightpack.open_checkpoint(target) as result:
        assert result.metadata["general.file_type"] == file_type
        assert result.metadata["general.quantization_version"] == 2
    return _stored_types(ggml.library, target)


def _stored_types(library: Any, path: Path) -> dict[str, str]:
    # Not with the gguf package, which does not know every type.
    names = {number: name.lower() for name, number in IDS.items()}
    context = library.gguf_init_from_file(str(path).encode(), InitParams(True, None))
    assert context
    try:
        return {
            library.gguf_get_tensor_name(context, index).decode(): names[library.gguf_get_tensor_type(context, index)]
            for index in range(library.gguf_get_n_tensors(context))
        }
    finally:
        library.gguf_free(context)
