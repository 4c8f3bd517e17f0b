"""`weightpack.from_pretrained`: a model, packed while it is read.

| step | what happens |
|---|---|
| 1 config | `config.json` is read; its `quantization_config`, if any, decides whether the weights are packed |
| 2 quantizer | from the merged config, by the registry |
| 3 environment | packages, versions and devices are checked |
| 4 dtype, devices | the type of what is not packed; the device map in its normal form |
| 5 skeleton | the model class with its parameters on the meta device, buffers real |
| 6 layers | the walker puts the backend's layers in place; `device_map="auto"` is worked out |
| 7 weights | streamed from the files by the engine, packed on the way, set one batch after the other |
| 8 end | tied weights are tied, missing ones get first values, the quantizer finishes |
| 9 registration | `hf_quantizer`, `_pre_quantization_dtype`, hooks of accelerate where there are several devices |
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..folder import PIPELINE
from ..quantizers.auto import AutoQuantizer, embedded_config
from .host import host_of
from .hub import download, is_name
from .source import Location, StateDict, config_of, locate, open_weights
from .steps import Loading


def from_pretrained(
    model_class: Any,
    path: str | os.PathLike[str],
    *,
    quantization_config: Any = None,
    torch_dtype: Any = None,
    device_map: Any = None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    low_cpu_mem_usage: bool = True,
    config: Any = None,
    state_dict: Mapping[str, Any] | None = None,
    keep_in_fp32_modules: tuple[str, ...] | list[str] = (),
    ignore_mismatched_sizes: bool = False,
    output_loading_info: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    mmap: bool = False,
    threads: int | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Any:
    """Loads a model, its weights packed while they are read where a quantization config says so.

    `model_class` is a model class of diffusers or transformers (an Auto class too), or any class derived
    from `torch.nn.Module`. `path` is a model folder (single file, shards with an index) or one weights
    file: `.safetensors`, `*.index.json`, `.gguf`; or `owner/model`, which is downloaded into the hub's
    cache (`revision`, `token`, `cache_dir`, `local_files_only` as there). `subfolder` is inside it,
    `variant` the infix of file names (`fp16`). `use_safetensors=False` reads torch's own `.bin` files,
    tensors only; `True` refuses them; by default they are the last choice. `config` (a dictionary, file
    or folder) is used in place of the `config.json` beside the weights, `state_dict` in place of files.

    `quantization_config` is one of weightpack's configs, one of a host's, or a dictionary. A model whose
    `config.json` says that it is packed needs none, and its own wins over one that is given.

    `torch_dtype` is the type of all floating weights that are not packed: a `torch.dtype`, its name, or
    "auto" for the stored one; by default what the host does. `keep_in_fp32_modules` stay in float32.

    `device_map` is a device, a dictionary from module path to device (`"cpu"`, `"disk"` and numbers of
    accelerators among them), or "auto", "balanced", "balanced_low_0", "sequential" within `max_memory`
    (device to bytes). Modules on disk are not packed; `offload_folder` holds what has to be rewritten.

    Missing weights get first values and a warning, as do weights of another shape if
    `ignore_mismatched_sizes`. With `output_loading_info` gives the model and a `LoadingInfo`.
    With `mmap`, weights that are loaded as they are stored stay in the mapped files, safetensors or GGUF,
    and are read when they are first used: nothing may cut the files short meanwhile.
    `threads` is the number of threads that pack, one per processor by default.
    `on_progress(done_bytes, total_bytes, name)` is called for each weight.

    Raises `ConfigError` for options that contradict each other or the model, `BackendError` for a
    missing library, `CheckpointError` for files that do not fit, `OSError` for files that are not there.
    Nothing is half-loaded: either the whole model comes back or an error.
    """
    if getattr(model_class, "config_name", None) == PIPELINE:
        raise ConfigError(f"{model_class.__name__} is a pipeline of models", hint="weightpack.load_pipeline loads it")
    host = host_of(model_class)
    place: Any = path
    if state_dict is None and is_name(path):
        place = download(
            str(path),
            stem=host.stem,
            subfolder=subfolder,
            variant=variant,
            use_safetensors=use_safetensors,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    if state_dict is not None:
        location = Location(Path(place) if Path(place).is_dir() else None, Path(place))
    else:
        location = locate(
            place,
            stem=host.stem,
            subfolder=subfolder,
            variant=variant,
            use_safetensors=use_safetensors,
            single_first=host.name != "diffusers",
        )
    raw = config_of(location, config)
    quantizer = _quantizer(raw, location.folder, quantization_config)
    if quantizer is not None and not low_cpu_mem_usage:
        raise ConfigError("low_cpu_mem_usage=False has no meaning for a model that is packed while it is loaded")
    weights = StateDict(state_dict) if state_dict is not None else open_weights(location, mmap=mmap)
    loading = Loading(host, quantizer, weights, location)
    try:
        loading.read_config(model_class, _without_quantization(raw))
        loading.settle_environment(torch_dtype, device_map)
        loading.build_skeleton(on_meta=low_cpu_mem_usage)
        loading.plan_keys(keep_in_fp32_modules, ignore_mismatched_sizes=ignore_mismatched_sizes)
        loading.place_layers(max_memory, offload_folder)
        loading.fill(threads, on_progress)
    finally:
        weights.close()
    model = loading.finish()
    return (model, loading.info) if output_loading_info else model


def _quantizer(raw: Mapping[str, Any], folder: Path | None, given: Any) -> Any:
    """The quantizer of the config inside the model or beside it, else of the one given; `None` for a plain model."""
    own: Any = embedded_config(raw) or AutoQuantizer.from_file_beside(folder)
    if own is not None:
        merged = AutoQuantizer.merge_quantization_configs(own, given)
        return AutoQuantizer.from_config(merged, pre_quantized=True)
    if given is None:
        return None
    return AutoQuantizer.from_config(AutoQuantizer.as_config(given), pre_quantized=False)


def _without_quantization(raw: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in raw.items() if key != "quantization_config"}
    text = plain.get("text_config")
    if isinstance(text, Mapping) and "quantization_config" in text:
        plain["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return plain
