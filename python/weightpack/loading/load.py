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

from .._lazy import require
from ..errors import ConfigError
from ..model_config import main_dtype
from ..placement import DISK, Placement
from ..quantizers.auto import AutoQuantizer, embedded_config
from ..quantizers.dtypes import torch_dtype as as_torch_dtype
from ..quantizers.modules import find_tensor, set_parameter
from . import devices, keys, missing
from .host import Host, host_of
from .hub import download, is_name
from .offload import Disk, dispatch
from .skeleton import build, shared_names, state_of
from .source import Location, StateDict, Weights, config_of, locate, open_weights
from .weights import Loader

_PURPOSE = "load models"


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
    threads: int | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Any:
    """Loads a model, its weights packed while they are read where a quantization config says so.

    `model_class` is a model class of diffusers or transformers (an Auto class too), or any class derived
    from `torch.nn.Module`. `path` is a model folder (single file, shards with an index) or one weights
    file: `.safetensors`, `*.index.json`, `.gguf`; or `owner/model`, which is downloaded into the hub's
    cache (`revision`, `token`, `cache_dir`, `local_files_only` as there). `subfolder` is inside it,
    `variant` the infix of file names (`fp16`). `use_safetensors=False` reads torch's own `.bin` files, tensors only; `True` refuses
    them; by default they are the last choice. `config` (a dictionary, file or folder) is used in place
    of the `config.json` beside the weights, `state_dict` in place of the files.

    `quantization_config` is one of weightpack's configs, one of a host's, or a dictionary. A model whose
    `config.json` says that it is packed needs none, and its own wins over one that is given.

    `torch_dtype` is the type of all floating weights that are not packed: a `torch.dtype`, its name, or
    "auto" for the stored one; by default what the host does. `keep_in_fp32_modules` stay in float32.

    `device_map` is a device, a dictionary from module path to device (`"cpu"`, `"disk"` and numbers of
    accelerators among them), or "auto", "balanced", "balanced_low_0", "sequential" within `max_memory`
    (device to bytes). Modules on disk are not packed; `offload_folder` holds what has to be rewritten.

    Missing weights get first values and a warning, as do weights of another shape if
    `ignore_mismatched_sizes`. With `output_loading_info` gives the model and a `LoadingInfo`.
    `threads` is the number of threads that pack, one per processor by default.
    `on_progress(done_bytes, total_bytes, name)` is called for each weight.

    Raises `ConfigError` for options that contradict each other or the model, `BackendError` for a
    missing library, `CheckpointError` for files that do not fit, `OSError` for files that are not there.
    Nothing is half-loaded: either the whole model comes back or an error.
    """
    torch = require("torch", _PURPOSE)
    host = host_of(model_class)
    if state_dict is not None:
        location = Location(Path(path) if Path(path).is_dir() else None, Path(path))
    else:
        if is_name(path):
            path = download(
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
        location = locate(
            path,
            stem=host.stem,
            subfolder=subfolder,
            variant=variant,
            use_safetensors=use_safetensors,
            single_first=host.name != "diffusers",
        )
    raw = config_of(location, config)
    quantizer = _quantizer(raw, quantization_config)
    if quantizer is not None and not low_cpu_mem_usage:
        raise ConfigError("low_cpu_mem_usage=False has no meaning for a model that is packed while it is loaded")
    weights = StateDict(state_dict) if state_dict is not None else open_weights(location)
    try:
        plain = _without_quantization(raw)
        from_gguf = getattr(host, "config_from_gguf", None)
        if not plain and from_gguf is not None and location.weights.suffix == ".gguf":
            plain = from_gguf(weights) or {}
        model_class, built_from = host.load_config(model_class, plain, location.folder)

        device_map = devices.normalise(device_map)
        dtype = _dtype(torch_dtype, host, built_from, weights, quantizer)
        if quantizer is not None:
            quantizer.validate_environment(torch_dtype=dtype, device_map=device_map)
            dtype = quantizer.update_torch_dtype(dtype)
            device_map = devices.normalise(quantizer.update_device_map(device_map))
            quantizer.torch_dtype = dtype

        def make() -> Any:
            return host.build(model_class, built_from, dtype)

        model = build(make) if low_cpu_mem_usage else make().eval()
        state = state_of(model)
        shared = shared_names(state)
        if quantizer is not None:
            quantizer.file_metadata = weights.metadata
        logical = keys.group(weights, quantizer)
        plan = keys.plan(host, model, logical, state, shared, ignore_mismatched_sizes=ignore_mismatched_sizes)

        in_fp32 = [*host.keep_in_fp32(model, dtype), *keep_in_fp32_modules]
        own_dtypes = {name: tensor.dtype for name, tensor in state.items() if tensor.is_floating_point()}
        if quantizer is not None:
            quantizer.entries = {t.name: logical[t.sources[0]].entry for t in plan.targets}

        def prepare(skeleton: Any, places: Any) -> Any:
            if quantizer is not None:
                quantizer.device_map = places
                quantizer.preprocess_model(
                    skeleton,
                    skip=[*host.protected(skeleton), *_tied_layers(skeleton, shared)],
                    keep_in_fp32=in_fp32,
                    packed=plan.packed if quantizer.pre_quantized else None,
                )
            return skeleton

        model = prepare(model, device_map)
        dtype_of = _dtypes(host, state, own_dtypes, dtype, in_fp32)
        if isinstance(device_map, str):
            device_map = _placed(model, device_map, max_memory, host, quantizer, dtype_of)
            if quantizer is not None:
                quantizer.validate_environment(torch_dtype=dtype, device_map=device_map)
                quantizer.device_map = device_map
                if any(quantizer.is_offloaded(path) for path in quantizer.quantized):
                    # These layers turn out to be where they cannot be packed.
                    model = prepare(build(make), device_map)
        placement = Placement(device_map)
        disk = Disk(offload_folder) if placement.has_disk else None

        def set_tensor(name: str, tensor: Any, device: str) -> None:
            _set(torch, model, state, name, tensor, device, disk)

        loader = Loader(
            model,
            weights,
            logical,
            quantizer,
            placement,
            dtype_of=dtype_of,
            torch_dtype=dtype,
            set_tensor=set_tensor,
            threads=threads,
            on_progress=on_progress,
        )
        loader.load(plan.targets)
        _share(model, plan, shared, quantizer)
        host.tie(model)
        missing.fill(
            host,
            model,
            plan.info,
            state,
            quantizer,
            placement,
            dtype_of=dtype_of,
            torch_dtype=dtype,
            set_tensor=set_tensor,
        )
    finally:
        weights.close()
    missing.refuse_meta(model, placement)
    if quantizer is not None:
        quantizer.postprocess_model(model)
    model.eval()
    _register(host, model, built_from, quantizer, location, dtype)
    missing.tell(plan.info, model)
    if device_map is not None:
        dispatch(model, device_map, disk)
    return (model, plan.info) if output_loading_info else model


def _quantizer(raw: Mapping[str, Any], given: Any) -> Any:
    own = embedded_config(raw)
    if own is not None:
        merged = AutoQuantizer.merge_quantization_configs(own, given)
        return AutoQuantizer.from_config(merged, pre_quantized=True)
    if given is None:
        return None
    chosen = AutoQuantizer.as_config(given)
    return AutoQuantizer.from_config(chosen, pre_quantized=False)


def _without_quantization(raw: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in raw.items() if key != "quantization_config"}
    text = plain.get("text_config")
    if isinstance(text, Mapping) and "quantization_config" in text:
        plain["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return plain


def _dtype(torch_dtype: Any, host: Host, config: Any, weights: Weights, quantizer: Any) -> Any:
    name = main_dtype(weights.entries.values())
    stored = as_torch_dtype(name) if name is not None else None
    if torch_dtype is None:
        return host.default_dtype(config, stored, quantizer is not None)
    if isinstance(torch_dtype, str) and torch_dtype == "auto":
        return stored
    dtype = as_torch_dtype(torch_dtype, "torch_dtype")
    if not dtype.is_floating_point:
        raise ConfigError(f"torch_dtype {torch_dtype!r} is not a floating point type")
    return dtype


def _dtypes(
    host: Host, state: Mapping[str, Any], own: Mapping[str, Any], dtype: Any, in_fp32: list[str]
) -> Callable[[str], Any]:
    """The type of each floating tensor that is not packed; `None` for the stored one."""
    from ..matcher import Matcher

    torch = require("torch", _PURPOSE)
    matcher = Matcher(in_fp32)
    choose = getattr(host, "dtype_of", None)

    def dtype_of(name: str) -> Any:
        if in_fp32 and matcher.matches(name):
            return torch.float32
        if choose is not None and name in own:
            return choose(name, own[name], dtype)
        return dtype

    return dtype_of


def _tied_layers(model: Any, shared: Mapping[str, list[str]]) -> list[str]:
    """Paths of layers whose weight another module uses too: packing it would cut the tie."""
    found = []
    for name, others in shared.items():
        path = name.rpartition(".")[0]
        own = model.get_submodule(path)
        if any(model.get_submodule(other.rpartition(".")[0]) is not own for other in others):
            found.append(path)
    return [path for path in found if path]


def _placed(
    model: Any,
    device_map: str,
    max_memory: Mapping[Any, Any] | None,
    host: Host,
    quantizer: Any,
    dtype_of: Callable[[str], Any],
) -> dict[str, Any]:
    def nbytes(name: str, tensor: Any) -> int:
        packed = quantizer.packed_bytes(model, name) if quantizer is not None else None
        if packed is not None:
            return int(packed)
        dtype = dtype_of(name) if tensor.is_floating_point() else None
        return int(tensor.numel() * (dtype.itemsize if dtype is not None else tensor.element_size()))

    def adjust(budget: dict[Any, Any]) -> dict[Any, Any]:
        return quantizer.adjust_max_memory(budget) if quantizer is not None else budget

    return devices.infer(model, device_map, max_memory, no_split=host.no_split(model), nbytes=nbytes, adjust=adjust)


def _set(torch: Any, model: Any, state: Mapping[str, Any], name: str, tensor: Any, device: str, disk: Any) -> None:
    old = state[name]
    if device == DISK:
        disk.add(name, tensor)
        # What stays in the model tells accelerate in which type to bring the tensor back.
        device = "meta"
    tensor = tensor.to(device)
    if isinstance(old, torch.nn.Parameter):
        may_learn = old.requires_grad and tensor.is_floating_point()
        tensor = torch.nn.Parameter(tensor, requires_grad=may_learn)
    set_parameter(model, name, tensor)


def _share(model: Any, plan: keys.Plan, shared: Mapping[str, list[str]], quantizer: Any) -> None:
    """Gives a tensor of several names to all of them."""
    for target in plan.targets:
        for other in shared.get(target.name, ()):
            value = find_tensor(model, target.name)
            if value is not None and find_tensor(model, other) is not value:
                set_parameter(model, other, value)


def _register(host: Host, model: Any, config: Any, quantizer: Any, location: Location, dtype: Any) -> None:
    if quantizer is not None:
        model.hf_quantizer = quantizer
        model.is_quantized = True
        model.quantization_method = quantizer.config.quant_method
    host.finish(model, config, quantizer, location.folder, dtype)
