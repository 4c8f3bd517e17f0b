"""`weightpack.load_pipeline`: a pipeline, its models packed while they are read, one after the other.

| step | what happens |
|---|---|
| 1 index | `model_index.json` names the pipeline's class and those of its parts |
| 2 choice | which parts are loaded, which are given, which models are packed; names are checked |
| 3 parts | each model by `weightpack.from_pretrained`, everything else by its own `from_pretrained` |
| 4 pipeline | its class is called with the parts and options |
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._lazy import require
from ..errors import CheckpointError, ConfigError, WeightpackError
from ..folder import CONFIG, PIPELINE, read_json
from ..loading.devices import AUTOMATIC
from ..loading.host import HOSTS, host_of
from ..loading.hub import download, fetch_files, is_name
from ..loading.load import from_pretrained
from ..loading.source import weight_names
from ..quantizers.auto import AutoQuantizer, embedded_config
from .config import PipelineQuantizationConfig, check_component
from .host import PipelineHost, pipeline_host
from .index import Index, read_index

_WEIGHTS = ["*.safetensors", "*.bin", "*.msgpack", "*.onnx", "*.onnx_data", "*.ckpt", "*.h5", "*.pt"]
_COMMIT = re.compile(r"[0-9a-f]{40}")


def load_pipeline(
    path: str | os.PathLike[str],
    *,
    quantization_config: Any = None,
    torch_dtype: Any = None,
    device_map: Any = None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    pipeline_class: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    mmap: bool = False,
    threads: int | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
    **components: Any,
) -> Any:
    """Loads a pipeline of diffusers: models packed as `quantization_config` says, or packed already.

    `path` is a folder with a `model_index.json`, or `owner/model` on the hub, of which only the files
    that are needed are downloaded. `quantization_config` is a `PipelineQuantizationConfig`, weightpack's
    or diffusers'. The result is an ordinary pipeline of the class in the index, or of `pipeline_class`.
    Neither packing nor running asks for a GPU.

    `torch_dtype` is the type of what is not packed, as in `from_pretrained`; a dictionary gives one for
    each component, with "default" for the others (float32 without it). `device_map` is one device for
    all models, or a dictionary from component to what `from_pretrained` takes; `max_memory` and
    `offload_folder` are for each of these. `variant` is taken where a component has it. `mmap` and
    `threads` are as in `from_pretrained`; `on_progress(done_bytes, total_bytes, name)` counts within one
    component, whose name stands before that of the weight ("transformer/proj.weight").

    Everything else by keyword is a component that is there already (`transformer=model`; `None` leaves
    it out), which is not loaded then, or an option of the pipeline.

    Raises `ConfigError` for names that the pipeline does not have and for options that do not fit,
    `CheckpointError` for files that do not, `BackendError` for a missing library.
    """
    host = pipeline_host()
    config = None if quantization_config is None else PipelineQuantizationConfig.from_host(quantization_config)
    _check_device_map(device_map)
    hub: dict[str, Any] = {
        "revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only,
    }  # fmt: skip
    name = str(path) if is_name(path) else None
    folder = Path(path)
    if name is not None:
        folder = fetch_files(name, [PIPELINE], **hub)
        if _COMMIT.fullmatch(folder.name):
            hub["revision"] = folder.name
    index = read_index(folder)
    pipeline_class = pipeline_class or host.pipeline_class(index.class_name)
    arguments, wanted = _choice(host, pipeline_class, index, components)
    classes: dict[str, Any] = {}
    for component in wanted:
        with about(component):
            classes[component] = host.component_class(*index.components[component])
    models = [component for component, one in classes.items() if _is_model(one)]
    dtypes = _dtypes(torch_dtype, models)
    maps = _device_maps(device_map, models)
    if config is not None:
        # Wrong names are told before anything is downloaded.
        config.configs(models)
    if name is not None:
        for component in wanted:
            _fetch(name, component, classes[component] if component in models else None, variant, use_safetensors, hub)
    variants = {component: _variant_of(folder, component, classes[component], variant) for component in models}
    if variant is not None and models and not any(variants.values()):
        raise CheckpointError(f'no component in "{folder}" has weights of variant "{variant}"')
    packed = _packed(config, host, folder, {component: classes[component] for component in models})
    for component, one in classes.items():
        if not (folder / component).is_dir():
            raise CheckpointError(f'"{folder}" has no folder "{component}", which its {PIPELINE} names')
        if component not in models:
            arguments[component] = _load_other(one, folder / component)
            continue
        with about(component):
            arguments[component] = from_pretrained(
                one,
                folder / component,
                quantization_config=packed.get(component),
                torch_dtype=dtypes[component],
                device_map=maps[component],
                max_memory=max_memory,
                offload_folder=None if offload_folder is None else Path(offload_folder) / component,
                variant=variants[component],
                use_safetensors=use_safetensors,
                mmap=mmap,
                threads=threads,
                on_progress=_told_of(component, on_progress),
            )
    pipeline = pipeline_class(**arguments)
    if config is not None:
        pipeline.quantization_config = config
    return pipeline


def _choice(
    host: PipelineHost, pipeline_class: Any, index: Index, given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Arguments of the pipeline that need no loading, and the components that are loaded."""
    needed, optional, options = host.expected(pipeline_class)
    parts = [*needed, *optional]
    for name in given:
        if name not in parts and name not in options:
            raise ConfigError(
                f"{pipeline_class.__name__} has no component or option {name}",
                hint=f"its components are {', '.join(parts)}; its options {', '.join(options) or 'none'}",
            )
    arguments = {name: value for name, value in index.options.items() if name in options}
    arguments.update(given)
    wanted = [name for name in index.components if (name in parts or name in options) and name not in given]
    for name in parts:
        if name in arguments or name in wanted:
            continue
        if name in needed and name not in index.absent:
            raise ConfigError(
                f"{pipeline_class.__name__} needs {name}, which the model index does not have",
                hint=f"load it and give it by keyword: {name}=...",
            )
        arguments[name] = None
    return arguments, wanted


def _is_model(component_class: Any) -> bool:
    """Whether weightpack loads it."""
    torch = require("torch", "load models")
    return issubclass(component_class, torch.nn.Module) and host_of(component_class).name in HOSTS


def _dtypes(torch_dtype: Any, models: list[str]) -> dict[str, Any]:
    """The type that is asked for, for each model."""
    if not isinstance(torch_dtype, Mapping):
        return dict.fromkeys(models, torch_dtype)
    for name in torch_dtype:
        if name != "default":
            check_component(name, models, "torch_dtype")
    return {name: torch_dtype.get(name, torch_dtype.get("default", "float32")) for name in models}


def _check_device_map(device_map: Any) -> None:
    if isinstance(device_map, str) and device_map in AUTOMATIC:
        raise ConfigError(
            f'device_map "{device_map}" spreads one model over devices, and a pipeline has several',
            hint=f'give one device for all ("cuda"), or a dictionary: {{"transformer": "{device_map}"}}',
        )


def _device_maps(device_map: Any, models: list[str]) -> dict[str, Any]:
    """The device map of each model."""
    if not isinstance(device_map, Mapping):
        return dict.fromkeys(models, device_map)
    for name in device_map:
        check_component(str(name), models, "device_map")
    return {name: device_map.get(name) for name in models}


def _packed(
    config: PipelineQuantizationConfig | None, host: PipelineHost, folder: Path, classes: Mapping[str, Any]
) -> dict[str, Any]:
    """The quantization config of each model that gets one."""
    if config is None:
        return {}
    plain = {name for name, one in classes.items() if host.is_left_plain(name, one)}
    chosen = config.configs(list(classes), spared=plain)
    if config.named is None:
        # One that is packed for another backend stays as it is, where nobody has named it.
        for name in list(chosen):
            own = _own_method(folder / name)
            if own not in (None, chosen[name].quantizer_name):
                del chosen[name]
    return dict(chosen)


def _own_method(folder: Path) -> str | None:
    """The quantizer of a model whose weights are packed already."""
    section = embedded_config(read_json(folder / CONFIG)) if (folder / CONFIG).is_file() else None
    own: Any = section or AutoQuantizer.from_file_beside(folder)
    return None if own is None else str(AutoQuantizer.as_config(own).quantizer_name)


def _variant_of(folder: Path, component: str, model_class: Any, variant: str | None) -> str | None:
    """`variant` where the component has weights of it."""
    if variant is None:
        return None
    names = weight_names(host_of(model_class).stem, variant, None)
    return variant if any((folder / component / name).is_file() for name in names) else None


def _fetch(
    name: str, component: str, model_class: Any, variant: str | None, use_safetensors: bool | None, hub: dict[str, Any]
) -> None:
    """Downloads a component: of a model its configs and one set of weights, of others all but weights."""
    if model_class is None:
        fetch_files(name, [f"{component}/*"], left_out=_WEIGHTS, **hub)
        return
    stem = host_of(model_class).stem
    for one in dict.fromkeys([variant, None]):
        folder = download(name, stem=stem, subfolder=component, variant=one, use_safetensors=use_safetensors, **hub)
        if any((folder / component / found).is_file() for found in weight_names(stem, one, use_safetensors)):
            return


def _load_other(component_class: Any, folder: Path) -> Any:
    """A scheduler, a tokenizer, a processor: by its own library."""
    load = getattr(component_class, "from_pretrained", None)
    if load is None:
        raise ConfigError(
            f"{folder.name}: {component_class.__name__} has no from_pretrained",
            hint=f"make one and give it by keyword: {folder.name}=...",
        )
    return load(os.fspath(folder))


def _told_of(
    component: str, on_progress: Callable[[int, int, str], None] | None
) -> Callable[[int, int, str], None] | None:
    if on_progress is None:
        return None
    tell = on_progress
    return lambda done, total, name: tell(done, total, f"{component}/{name}")


@contextmanager
def about(component: str) -> Iterator[None]:
    """Puts the name of the component before the sentence of an error."""
    try:
        yield
    except WeightpackError as error:
        raise type(error)(f"{component}: {error.message}", hint=error.hint) from error
