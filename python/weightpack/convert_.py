"""A checkpoint in, a packed checkpoint out, in one pass and bounded memory.

This module reads headers, asks `rules` what becomes of each tensor, and hands the native engine one
complete plan: every output tensor, every file beside the weights, checked before anything is
written. The engine does the rest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import gguf_rules, gguf_target, host_target, model_config, overrides, recipes, rules
from .assembly import source_row
from .checkpoint import Checkpoint, native_checkpoint
from .decision import OPTIONS, Decisions, Target
from .entry import Entry
from .errors import CheckpointError, ConfigError, FormatError, UnsupportedError
from .folder import STEMS, Model, carried_files, find_models, is_pipeline
from .gguf_target import GgufModel, GgufOptions
from .host_target import HostModel
from .importance import open_importance
from .layers import Layers, find_layers, host_of
from .packings.table import TABLE, TARGETS, HostConfig, backend_of, holds, is_described, shared_scales, unrecognised
from .report import ConvertReport, finished_report, planned_report
from .sizes import parse_size
from .targets import CASTS, FormatInfo, find_format

if TYPE_CHECKING:
    from . import _rust

__all__ = ["ConvertReport", "convert"]

Progress = Callable[[int, int, int, str], None]
"""Called about ten times a second: bytes read, bytes to read, bytes written, tensor in work."""

_CONVERTED_COMPONENTS = ("transformer", "unet", "prior", "text_encoder", "controlnet")


@dataclass(frozen=True)
class _Options:
    to: FormatInfo
    overrides: overrides.Overrides
    params: Mapping[str, Any]
    compute_dtype: str | None
    max_shard_bytes: int
    native: Mapping[str, Any]
    gguf: GgufOptions


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str = "nf4",
    *,
    double_quant: bool = False,
    block_size: int | None = None,
    group_size: int | None = None,
    compute_dtype: str | None = None,
    keep: Iterable[str] = (),
    only: Iterable[str] = (),
    assign: Iterable[str] = (),
    recipe: str | os.PathLike[str] | None = None,
    components: str | Iterable[str] | None = None,
    max_shard_size: str | int = "5GB",
    max_memory: str | int = "256MB",
    threads: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = True,
    on_nonfinite: Literal["refuse", "keep"] = "refuse",
    layers: Literal["auto", "host", "names"] = "auto",
    arch: str | None = None,
    fallback: gguf_rules.Fallback = "auto",
    importance: str | os.PathLike[str] | None = None,
    search: Literal["ref", "weighted"] = "ref",
    requantize: bool = False,
    names: Literal["source", "host"] = "source",
    on_progress: Progress | None = None,
) -> ConvertReport:
    """Converts the checkpoint `src` into `dst`, packed as `to`.

    `src` is a model folder, a diffusers pipeline folder, a `.safetensors`, an `*.index.json` or a
    `.gguf`. `dst` is a folder, or a file ending in `.safetensors` or `.gguf`; its name decides the
    container, except for the components of a pipeline, which follow the format. What is written is
    a model: config, index, tokenizer and every other file of a source folder come along.

    `to` is a format by full or short name ("nf4", "gguf:q8_0", "bf16"), or a recipe ("q4_k_m").
    `double_quant`, `block_size`: as bitsandbytes' `bnb_4bit_use_double_quant` and `blocksize`.
    `group_size`: weights of a row that share a scale, for torchao's formats that have groups; the whole row
    by default.
    `compute_dtype`: the type that 4-bit layers compute in ("bfloat16"); by default the source's.
    `keep`, `only`, `assign`, `recipe`: see `weightpack.overrides`.
    `components`: those of a pipeline to convert, by default transformers, unets, priors,
    controlnets and text encoders; all others (a VAE) are carried over as they are.
    `max_shard_size`: largest file of a sharded result; ignored where `dst` is a file.
    `max_memory`: bound on anonymous memory. `threads`: by default one per usable core.
    `dry_run`: only plan. `overwrite`: replace `dst`, once the new files are complete. `resume`: go
    on with what an interrupted run left. `verify`: measure each tensor's error on the way.
    `on_nonfinite`: whether weights that are not finite are refused, or kept where a format can.
    `layers`: ask the host library which tensors belong to linear layers ("host"), go by names
    ("names"), or ask where it is installed ("auto").

    For GGUF: `arch` names the architecture whose tensor names the result has ("flux"); by default
    it is told by the config and the names, and "none" keeps the names of the source. `fallback`:
    what becomes of rows that a block does not divide (see `weightpack.gguf_rules`). `importance`:
    an imatrix file of llama.cpp; `search`: "weighted" searches scales as if all columns counted the
    same where there is no vector, "ref" without weights, as llama.cpp does. `requantize`: pack
    tensors of a GGUF source anew although they are packed.

    For safetensors from GGUF: `names` "host" gives the tensors the names and the order of rows that
    transformers (language models) or diffusers (diffusion transformers) has for them.

    Gives a `ConvertReport`. Raises `ConfigError` for options that make no sense, `CheckpointError`,
    `FormatError` or `UnsupportedError` for input that is refused, all before anything is written;
    `OSError` when a file cannot be read or written.
    """
    src, dst = Path(src), Path(dst)
    options = _options(
        to,
        double_quant=double_quant,
        block_size=block_size,
        group_size=group_size,
        compute_dtype=compute_dtype,
        patterns={"keep": keep, "only": only, "assign": assign},
        recipe=recipe,
        max_shard_size=max_shard_size,
        max_memory=max_memory,
        threads=threads,
        verify=verify,
        on_nonfinite=on_nonfinite,
        gguf=_gguf_options(arch, fallback, importance, search, requantize),
    )
    _check_place(src, dst)
    found = find_models(src)
    chosen = _components(found, src, options.to, components)
    container, kind = _container(dst, options.to, is_pipeline(src))

    opened = [Checkpoint(model.weights, [replace(model, component="")]) for model in chosen]
    for model, checkpoint in zip(chosen, opened, strict=True):
        _check_source(model, checkpoint)
    hosts = _hosts(opened, container, names)
    tables = [host.entries for host in hosts]
    known = _layers(chosen, tables, options, container, layers)
    targets = _targets(chosen, opened, tables, options, container)
    decided = [
        _decide(model, entries, options, container, kind, one, target)
        for model, entries, one, target in zip(chosen, tables, known, targets, strict=True)
    ]
    _check_packed(options.to, decided)

    sources = [native_checkpoint(checkpoint) for checkpoint in opened]
    told = [_told(model, one, options) for model, one in zip(chosen, decided, strict=True)]
    outputs = [
        _output(number, model, opened[number], decided[number], options, container, kind, target, host, sources)
        for number, (model, target, host) in enumerate(zip(chosen, targets, hosts, strict=True))
    ]
    for output, host_config in zip(outputs, told, strict=True):
        if host_config is not None and container == "safetensors":
            output["metadata"].update(host_config.metadata)
    files, left_out = _files(src, chosen, opened, told, options, kind)
    request = {
        "destination": str(dst),
        "kind": kind,
        "outputs": outputs,
        "files": files,
        "options": dict(options.native),
    }
    from . import _rust

    plan = _rust.Plan.build(json.dumps(request), sources)
    report = planned_report(json.loads(plan.describe()), str(src), str(dst), options.to.name, dry_run)
    warnings = [
        f"{model.component}: {warning}" if model.component else warning
        for model, checkpoint, one, target, host in zip(chosen, opened, decided, targets, hosts, strict=True)
        for warning in (*checkpoint.warnings, *host.warnings, *one.warnings, *_gguf_warnings(one, target))
    ]
    has_packed = any(decision.is_packed for one in decided for decision in one.tensors)
    if has_packed and kind == "folder" and container == "safetensors" and any(m.config is None for m in chosen):
        warnings.append("there is no config.json to say how the weights are packed: hosts will not load the result")
    named = {model.component: one.source for model, one in zip(chosen, known, strict=True) if one is not None}
    report = replace(report, layers=named, left_out=tuple(left_out), warnings=tuple(dict.fromkeys(warnings)))
    if dry_run:
        return report
    return finished_report(report, json.loads(plan.run(overwrite=overwrite, resume=resume, on_progress=on_progress)))


def _options(
    to: str,
    *,
    double_quant: bool,
    block_size: int | None,
    group_size: int | None,
    compute_dtype: str | None,
    patterns: Mapping[str, Iterable[str]],
    recipe: str | os.PathLike[str] | None,
    max_shard_size: str | int,
    max_memory: str | int,
    threads: int | None,
    verify: bool,
    on_nonfinite: str,
    gguf: GgufOptions,
) -> _Options:
    def full_name(name: str) -> str:
        return find_format(name).name

    def target_name(name: str) -> str:
        return recipes.find_target(name).name

    read = None if recipe is None else overrides.read_recipe(Path(recipe), full_name, target_name)
    target = recipes.find_target(to)
    if read is not None and read.default is not None:
        if to not in ("nf4", read.default) and target.name != read.default:
            raise ConfigError(f'the recipe\'s default is {read.default}, and --to says "{to}"', hint="leave one out")
        target = recipes.find_target(read.default)
    if target.encodes == "never":
        raise UnsupportedError(
            f"{target.name} is decoded by this version, and not written", hint="`weightpack formats` lists what is"
        )
    rule_set = overrides.build(full_name, recipe=read, **patterns)
    formats = {target.name, *(rule.format for rule in rule_set.rules)}
    params: dict[str, Any] = {"double_quant": double_quant or None, "block_size": block_size, "group_size": group_size}
    params = {option: value for option, value in params.items() if value is not None}
    for option in params:
        if not formats & set(OPTIONS[option]):
            raise ConfigError(f"{option} is an option of {', '.join(OPTIONS[option])}, and none is asked for")
    if group_size is not None and group_size < 1:
        raise ConfigError(f"group_size is not positive: {group_size}")
    if on_nonfinite not in ("refuse", "keep"):
        raise ConfigError(f'on_nonfinite "{on_nonfinite}" is none of refuse, keep')
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is not positive: {threads}")
    if compute_dtype is not None:
        compute_dtype = model_config.compute_dtype(compute_dtype, ())
    return _Options(
        target,
        rule_set,
        params,
        compute_dtype,
        parse_size(max_shard_size, "max_shard_size"),
        {
            "threads": threads if threads is not None else usable_cores(),
            "max_memory_bytes": parse_size(max_memory, "max_memory"),
            "slab_bytes": None,
            "verify": verify,
            "keep_nonfinite": on_nonfinite == "keep",
            "sync": True,
        },
        gguf,
    )


def _gguf_options(
    arch: str | None, fallback: str, importance: str | os.PathLike[str] | None, search: str, requantize: bool
) -> GgufOptions:
    if fallback not in gguf_rules.FALLBACKS:
        raise ConfigError(f'fallback "{fallback}" is none of {", ".join(gguf_rules.FALLBACKS)}')
    if search not in ("ref", "weighted"):
        raise ConfigError(f'search "{search}" is none of ref, weighted')
    vectors = None if importance is None else open_importance(importance)
    return GgufOptions(arch, fallback, vectors, search == "weighted", requantize)


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_place(src: Path, dst: Path) -> None:
    source, destination = src.resolve(), dst.resolve()
    if source == destination:
        raise ConfigError(f'source and destination are the same: "{src}"')
    if source.is_dir() and source in destination.parents:
        raise ConfigError(f'destination "{dst}" lies inside the source', hint="choose a folder beside it")
    if destination in source.parents:
        raise ConfigError(f'source "{src}" lies inside the destination', hint="choose a folder beside it")


def _check_source(model: Model, checkpoint: Checkpoint) -> None:
    """Raises `UnsupportedError` for a source whose config or metadata says that it is packed in a way that is
    not understood: its arrays mean nothing by themselves."""
    method = model_config.source_method(model.config)
    left = unrecognised(checkpoint)
    for backend in left if method is None else left.keys() & {method}:
        if method == backend or is_described(backend, checkpoint.metadata):
            raise UnsupportedError(
                f'the source is packed by "{backend}" in a format that is not decoded by this version '
                f'(tensor "{left[backend][0]}", file "{checkpoint[left[backend][0]].file}")',
                hint="convert the model it was made from",
            )
    if (
        method is not None
        and method not in TARGETS
        and not any(holds(method, entry.format) for entry in checkpoint.values())
    ):
        raise UnsupportedError(
            f'the source says that it is packed by {method}, and no such weight is found (file "{model.weights}")',
            hint="its layout may be another one: convert the model it was made from",
        )


def _container(dst: Path, to: FormatInfo, of_pipeline: bool) -> tuple[str, str]:
    """The container to write, and whether the destination is a "file" or a "folder"."""
    wanted = to.container
    suffix = dst.suffix.lower()
    if suffix in (".safetensors", ".gguf"):
        container = suffix.removeprefix(".")
        if wanted not in ("any", container):
            raise ConfigError(
                f"{to.name} is stored in {wanted}, and the destination is a {suffix} file",
                hint=f"end the destination in .{wanted}" if wanted == "gguf" else "name a folder",
            )
        if of_pipeline:
            raise ConfigError("a pipeline has several models, and the destination is one file", hint="name a folder")
        return container, "file"
    if wanted == "gguf" and not of_pipeline:
        raise ConfigError(f"{to.name} is written to one file", hint=f"end the destination in .gguf: {dst}.gguf")
    return ("gguf" if wanted == "gguf" else "safetensors"), "folder"


def _components(found: list[Model], src: Path, to: FormatInfo, components: str | Iterable[str] | None) -> list[Model]:
    if not is_pipeline(src):
        if components is not None:
            raise ConfigError(f'"{src}" is not a pipeline, and has no components')
        return found
    names = [model.component for model in found]
    if components is None:
        if to.name in CASTS:
            return found
        chosen = [model for model in found if model.component.startswith(_CONVERTED_COMPONENTS)]
        if not chosen:
            raise ConfigError(
                "the pipeline has no component that is converted by default",
                hint=f"name some with --components: {', '.join(names)}",
            )
        return chosen
    split = components.split(",") if isinstance(components, str) else list(components)
    wanted = [name.strip() for name in split if name.strip()]
    for name in wanted:
        if name not in names:
            raise ConfigError(f'the pipeline has no component "{name}" with weights', hint=f"it has {', '.join(names)}")
    if not wanted:
        raise ConfigError("no component is named")
    return [model for model in found if model.component in wanted]


def _layers(
    models: Sequence[Model], tables: Sequence[Sequence[Entry]], options: _Options, container: str, mode: str
) -> list[Layers | None]:
    """The layers of each model, where the rules need to know them."""
    if container != "safetensors":
        if mode not in ("auto", "host", "names"):
            raise ConfigError(f'layers "{mode}" is none of auto, host, names')
        return [None] * len(models)
    formats = {options.to.name, *(rule.format for rule in options.overrides.rules)}
    packs = any(backend_of(name) is not None for name in formats)
    keeps = bool(options.overrides.rules or options.overrides.only)
    needed = [
        number
        for number, entries in enumerate(tables)
        if packs or (keeps and any(backend_of(entry.format or "") is not None for entry in entries))
    ]
    found = find_layers([(models[number].config, tables[number]) for number in needed], mode)
    known: list[Layers | None] = [None] * len(models)
    for number, one in zip(needed, found, strict=True):
        known[number] = one
    return known


def _hosts(opened: Sequence[Checkpoint], container: str, names: str) -> list[HostModel]:
    """The tensors of each model, under the names asked for."""
    if names not in host_target.NAMES:
        raise ConfigError(f'names "{names}" is none of {", ".join(host_target.NAMES)}')
    if names == "host" and container == "gguf":
        raise ConfigError("names of a host are given to tensors of a safetensors file, and the result is none")
    if container == "gguf":
        return [HostModel(list(checkpoint.values())) for checkpoint in opened]
    return [host_target.prepare(checkpoint, list(checkpoint.values()), names) for checkpoint in opened]


def _targets(
    models: Sequence[Model],
    opened: Sequence[Checkpoint],
    tables: Sequence[Sequence[Entry]],
    options: _Options,
    container: str,
) -> list[GgufModel | None]:
    """What only concerns GGUF, for each model."""
    if container != "gguf":
        asked = {"arch": options.gguf.arch, "importance": options.gguf.importance}
        for option, value in asked.items():
            if value is not None:
                raise ConfigError(f"{option} is an option of GGUF files, and the result is none")
        return [None] * len(models)
    return [
        gguf_target.prepare(model, checkpoint, entries, options.to, options.gguf)
        for model, checkpoint, entries in zip(models, opened, tables, strict=True)
    ]


def _gguf_warnings(decided: Decisions, target: GgufModel | None) -> Sequence[str]:
    return () if target is None else target.warnings_of(decided.tensors)


def _decide(
    model: Model,
    entries: Sequence[Entry],
    options: _Options,
    container: str,
    kind: str,
    layers: Layers | None,
    gguf: GgufModel | None,
) -> Decisions:
    more = {} if gguf is None else {"gguf": gguf.choices}
    target = Target(
        options.to,
        container,
        fits,
        options.params,
        plain=_short(options.compute_dtype) or model_config.main_dtype(entries) or "bf16",
        for_host=kind == "folder" and container == "safetensors" and model.config is not None,
        **more,
    )
    return rules.decide(entries if gguf is None else gguf.entries, target, options.overrides, layers)


def fits(name: str, shape: tuple[int, ...], params: Mapping[str, Any]) -> str | None:
    """Why format `name` cannot take a tensor of `shape`; `None` if it can."""
    return _fits(name, shape, json.dumps(dict(params)))


@lru_cache(maxsize=4096)
def _fits(name: str, shape: tuple[int, ...], params: str) -> str | None:
    from . import _rust

    try:
        _rust.layout(name, list(shape), params)
    except FormatError as error:
        return error.message
    return None


def _short(compute_dtype: str | None) -> str | None:
    return next((short for short, name in model_config.COMPUTE_DTYPES.items() if name == compute_dtype), None)


def _check_packed(to: FormatInfo, decided: Sequence[Decisions]) -> None:
    tensors = [decision for one in decided for decision in one.tensors]
    if not tensors:
        raise CheckpointError("the source holds no tensors")
    if to.name in CASTS or any(decision.is_packed for decision in tensors):
        return
    reasons: dict[str, int] = {}
    for decision in tensors:
        reasons[decision.why] = reasons.get(decision.why, 0) + 1
    most = sorted(reasons.items(), key=lambda item: -item[1])[:3]
    listed = ", ".join(f"{count} x {why}" for why, count in most)
    raise UnsupportedError(
        f"{to.name} would pack none of {len(tensors)} tensors: {listed}",
        hint="choose others with --assign REGEX=FORMAT",
    )


def _output(
    number: int,
    model: Model,
    checkpoint: Checkpoint,
    decided: Decisions,
    options: _Options,
    container: str,
    kind: str,
    target: GgufModel | None,
    host: HostModel,
    sources: list[_rust.Checkpoint],
) -> dict[str, Any]:
    """One model in the request. `sources` are all checkpoints it names; those that only GGUF needs
    are added there."""
    output: dict[str, Any] = {
        "container": container,
        "folder": model.component,
        "stem": _stem(model),
        "max_shard_bytes": options.max_shard_bytes if kind == "folder" and container == "safetensors" else None,
    }
    if target is not None:
        others = _other_sources(target, options, sources)
        return {**output, **target.output(decided.tensors, model, _name(model), number, others)}
    output["metadata"] = {**_text_metadata(checkpoint), "format": "pt"}
    output["tensors"] = rows = [
        source_row(decision, host.mapped.get(decision.entry.name), number) for decision in decided.tensors
    ]
    shared = shared_scales(decided.tensors, host_of(model.config))
    for row in rows:
        if row["as"] in shared:
            row["shared_scale"] = shared[row["as"]]
    return output


def _other_sources(target: GgufModel, options: _Options, sources: list[_rust.Checkpoint]) -> dict[str, int]:
    from . import _rust

    others = {}
    if options.gguf.importance is not None:
        others["importance"] = len(sources)
        sources.append(native_checkpoint(options.gguf.importance.checkpoint))
    generated = target.generated()
    if generated is not None:
        others["generated"] = len(sources)
        sources.append(_rust.Checkpoint.from_bytes("computed", generated))
    return others


def _text_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What a single safetensors file says about itself, apart from what only holds for its bytes."""
    if checkpoint.container != "safetensors" or len(checkpoint.files) != 1:
        return {}
    return {
        key: value
        for key, value in checkpoint.metadata.items()
        if isinstance(value, str)
        and not key.startswith("weightpack.")
        and not any(is_described(row.name, {key: value}) for row in TABLE)
    }


def _name(model: Model) -> str:
    """The name of a model, for people."""
    if model.component:
        return model.component
    return model.folder.resolve().name if model.folder is not None else model.weights.name.partition(".")[0]


def _stem(model: Model) -> str:
    if model.stem in STEMS:
        return model.stem
    is_diffusers = model.config is not None and "_class_name" in model.config
    return "diffusion_pytorch_model" if is_diffusers else "model"


def _told(model: Model, decided: Decisions, options: _Options) -> HostConfig | None:
    """What hosts are told of the packed weights of one model."""
    compute = model_config.compute_dtype(options.compute_dtype, (d.entry for d in decided.tensors))
    return model_config.host_config(decided.tensors, decided.skip_list, compute, host_of(model.config))


def _files(
    src: Path,
    chosen: Sequence[Model],
    opened: Sequence[Checkpoint],
    told: Sequence[HostConfig | None],
    options: _Options,
    kind: str,
) -> tuple[list[dict[str, str]], list[str]]:
    """What is written beside the weights, and what of the source is no part of the result."""
    if kind == "file":
        return [], []
    files: list[dict[str, str]] = []
    left_out: list[str] = []
    for model, checkpoint, host_config in zip(chosen, opened, told, strict=True):
        prefix = f"{model.component}/" if model.component else ""
        shards = [Path(file["path"]).name for file in checkpoint.files]
        if model.config is not None:
            cast = options.to.name if options.to.name in CASTS else None
            section = None if host_config is None else host_config.section
            text = model_config.config_text(model.config, section, cast, model.weights.parent)
            files.append({"path": f"{prefix}config.json", "text": text})
        if host_config is not None:
            files += [{"path": prefix + name, "text": one} for name, one in host_config.texts.items()]
        if model.folder is not None:
            carried, others = carried_files(model.folder, prefix)
            files += [{"path": item.path, "copy": str(item.source.absolute())} for item in carried]
            converted = {prefix + name for name in (model.weights.name, *shards)}
            left_out += [name for name in others if name not in converted]
    if is_pipeline(src):
        converted = {model.component for model in chosen}
        for entry in sorted(os.scandir(src), key=lambda entry: entry.name):
            if not entry.is_dir(follow_symlinks=False) or entry.name in converted:
                continue
            if entry.name.startswith(".") or entry.name == "__pycache__":
                left_out.append(f"{entry.name}/")
                continue
            carried, others = carried_files(src / entry.name, f"{entry.name}/", whole=True)
            files += [{"path": item.path, "copy": str(item.source.absolute())} for item in carried]
            left_out += others
        carried, others = carried_files(src, only_files=True)
        files += [{"path": item.path, "copy": str(item.source.absolute())} for item in carried]
        left_out += others
    return files, left_out
