"""What kind of layer each tensor belongs to: by asking the host library, or by the tensor's name.

Where transformers or diffusers is installed, the real class is built from `config.json` without
weights and asked which parameters belong to `nn.Linear`. That happens in a process of its own, so
that the conversion itself never loads torch. Elsewhere these rules read names, and keep what is
doubtful: a layer left unpacked is listed in the config and loads, a tensor packed by mistake does
not.

A tensor is taken for the weight of a linear layer if it is two-dimensional, holds floating point
numbers, its name ends in `.weight`, and the layer's own name (the last segment that is not a
number) is none of these:

| taken for | own name |
|---|---|
| embedding | contains `embed`, `position` or `relative_attention_bias`; ends in `token` or `tokens` |
| | `emb`, `wte`, `wpe`, `shared`, `codebook` |
| norm | contains `norm`, or starts with `ln_` |
| convolution | contains `conv` |
| output layer | `lm_head`, `embed_out`, `score`, `classifier`, `qa_outputs` |
| | `output` at the top level; `decoder` of a `predictions` head |
| router | `gate`, `router`, `shared_expert_gate` |
| one of many experts | below a segment `experts` (transformers 5 merges them when loading) |
| transposed layer | `c_attn`, `c_proj`, `c_fc`, `q_attn`, in the GPT-2 family or where the family is unknown |
| float32 layer | `wo` in the T5 family; below `qformer` in the BLIP-2 family |
| layer of another class | any in the Falcon family; `out_proj` beside an `in_proj_weight` (`nn.MultiheadAttention`) |
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ._lazy import is_installed, missing
from .entry import Entry
from .errors import BackendError, ConfigError

LINEAR = "linear"
TIMEOUT_SECONDS = 300

_REASONS = {
    LINEAR: "linear layer",
    "integer": "not floating point",
    "vector": "norm, bias or other vector",
    "parameter": "not the weight of a layer",
    "many dimensions": "not two-dimensional",
    "embedding": "embedding",
    "norm": "norm",
    "convolution": "convolution",
    "output": "output layer",
    "router": "router of experts",
    "expert": "one of many experts, which transformers 5 merges when loading",
    "conv1d": "Conv1D, which transformers packs transposed",
    "float32": "layer that its host keeps in float32",
    "class": "linear layer of a class of its own, which transformers does not pack",
    "merged": "transformers builds the parameter from several tensors when loading",
    "renamed": "transformers renames it when loading, and not its statistics",
    "unknown": "not a parameter of the model class",
    "other": "not a linear layer",
}

_CONV1D_FAMILY = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "gpt_sw3", "dialogpt"}
_T5_FAMILY = {"t5", "mt5", "umt5", "longt5", "udop", "pop2piano", "switch_transformers", "t5gemma"}
_BLIP_FAMILY = {"blip-2", "instructblip", "instructblipvideo"}
_OWN_CLASS_FAMILY = {"falcon"}
_HEADS = {"lm_head", "embed_out", "score", "classifier", "qa_outputs"}
_EMBEDDINGS = {"emb", "wte", "wpe", "shared", "codebook"}
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_CONV1D_NAMES = {"c_attn", "c_proj", "c_fc", "q_attn"}


@dataclass(frozen=True, slots=True)
class Layer:
    """What one tensor is part of: `kind` is "linear" for what can be packed, `module` the path of
    its layer in the model, `why` a few words for the plan."""

    kind: str
    module: str
    why: str


@dataclass(frozen=True)
class Layers:
    """The layers of one model.

    `source` says how they are known. `host` is the library that will load the result, or `None`.
    `exact` is true where the host was asked. `linears` are the paths of all linear layers of the
    model, also of those without a tensor of their own (tied ones). `fixed` are the skip-list
    entries that the host adds by itself, `prefix` the name of the bare model inside the class.
    """

    source: str
    host: str | None
    exact: bool
    tensors: Mapping[str, Layer]
    linears: frozenset[str]
    fixed: tuple[str, ...] = ()
    prefix: str = ""
    warnings: tuple[str, ...] = field(default=())


def host_of(config: Mapping[str, Any] | None) -> str | None:
    """The library whose classes a `config.json` describes."""
    if config is None:
        return None
    if "_class_name" in config:
        return "diffusers"
    if "architectures" in config or "model_type" in config:
        return "transformers"
    return None


Model = tuple[Mapping[str, Any] | None, Sequence[Entry]]
"""The config of one model, if it has one, and its tensors."""


def find_layers(models: Sequence[Model], mode: str = "auto") -> list[Layers]:
    """The layers of each of `models`, in the same order.

    `mode` is "auto" (ask the host if it is installed, else read names), "host" (ask, or raise
    `BackendError`) or "names" (never ask). Each host is asked once about all its models.
    """
    if mode not in ("auto", "host", "names"):
        raise ConfigError(f'layers "{mode}" is none of auto, host, names')
    known: dict[int, Layers] = {}
    doubts: dict[int, str] = {}
    for host in ("transformers", "diffusers") if mode != "names" else ():
        numbers = [number for number, (config, _) in enumerate(models) if host_of(config) == host]
        absent = next((package for package in (host, "torch") if not is_installed(package)), None)
        if numbers and absent is None:
            for number, found in zip(numbers, by_host(host, [models[number] for number in numbers]), strict=True):
                if isinstance(found, Layers):
                    known[number] = found
                else:
                    doubts[number] = found
        elif numbers and absent is not None and mode == "host":
            raise missing(absent, "ask the model class for its linear layers")
    if mode == "host" and len(known) < len(models):
        number = next(number for number in range(len(models)) if number not in known)
        raise BackendError(doubts.get(number, "no host can be asked: there is no config.json that names a model class"))
    return [
        known.get(number) or by_name(entries, config, doubts.get(number))
        for number, (config, entries) in enumerate(models)
    ]


def by_name(entries: Iterable[Entry], config: Mapping[str, Any] | None, doubt: str | None = None) -> Layers:
    """The layers as their names suggest; see the table at the head of this module.

    `doubt` says why the host has no answer, where it was asked.
    """
    warnings = () if doubt is None else (f"{doubt}; layers are told by name",)
    family = None if config is None else str(config.get("model_type", ""))
    tensors = {}
    linears = set()
    entries = list(entries)
    attentions = {e.name.removesuffix("in_proj_weight") for e in entries if e.name.endswith("in_proj_weight")}
    for entry in entries:
        layer = classify(entry, family)
        if layer.kind == LINEAR and layer.module.removesuffix("out_proj") in attentions:
            layer = _layer("class", layer.module)
        tensors[entry.name] = layer
        # Every matrix that might be a linear layer is listed as kept: that is always safe.
        if len(entry.shape) == 2 and entry.is_float and entry.name.endswith(".weight"):
            linears.add(layer.module)
    fixed: tuple[str, ...] = ()
    if family in _T5_FAMILY:
        fixed = ("wo",)
    elif family in _BLIP_FAMILY:
        fixed = ("query_tokens", "qformer")
    return Layers("names", host_of(config), False, tensors, frozenset(linears), fixed, warnings=warnings)


def classify(entry: Entry, family: str | None = None) -> Layer:
    """The kind of layer that a tensor's name and shape suggest.

    `family` is the `model_type` of its config; "" for a config without one, `None` for no config.
    """
    module, _, leaf = entry.name.rpartition(".")
    return _layer(_kind(entry, module, leaf, family), module)


def own_name(module: str) -> str:
    """The last segment of a module path that is not a number, in lower case."""
    return next((segment for segment in reversed(module.lower().split(".")) if not segment.isdigit()), "")


def _kind(entry: Entry, module: str, leaf: str, family: str | None) -> str:
    if not entry.is_float:
        return "integer"
    if len(entry.shape) <= 1:
        return "vector"
    segments = module.lower().split(".")
    name = own_name(module)
    if is_embedding(name):
        return "embedding"
    if len(entry.shape) > 2:
        return "convolution" if "conv" in name else "many dimensions"
    if leaf != "weight":
        return "parameter"
    if "norm" in name or name.startswith("ln_"):
        return "norm"
    if "conv" in name:
        return "convolution"
    if name in _HEADS or module == "output" or (name == "decoder" and "predictions" in segments):
        return "output"
    if name in _ROUTERS:
        return "router"
    if "experts" in segments:
        return "expert"
    if name in _CONV1D_NAMES and (family is None or family in _CONV1D_FAMILY):
        return "conv1d"
    if name == "wo" and (family in _T5_FAMILY or "densereludense" in segments):
        return "float32"
    if family in _BLIP_FAMILY and "qformer" in segments:
        return "float32"
    if family in _OWN_CLASS_FAMILY:
        return "class"
    return LINEAR


def is_embedding(name: str) -> bool:
    """Whether a layer's own name says that it is an embedding."""
    if name in _EMBEDDINGS or "embed" in name or name.endswith(("token", "tokens")):
        return True
    return "position" in name or "relative_attention_bias" in name


def by_host(host: str, models: Sequence[Model]) -> list[Layers | str]:
    """Asks the host's own classes, in a process of its own. Where it has no answer, says why."""
    requests = [
        {"config": dict(config or {}), "tensors": {entry.name: list(entry.shape) for entry in entries}}
        for config, entries in models
    ]
    try:
        answers = _run(host, requests)
    except BackendError as error:
        return [error.message] * len(models)
    return [_understand(host, answer, entries) for answer, (_, entries) in zip(answers, models, strict=True)]


def _understand(host: str, answer: Mapping[str, Any], entries: Sequence[Entry]) -> Layers | str:
    if answer.get("refusal"):
        return f"{host} does not describe the model: {answer['refusal']}"
    skipped: dict[str, str] = answer["skipped"]
    tensors = {}
    for entry in entries:
        kind, module = answer["tensors"].get(entry.name, ("unknown", ""))
        layer = _layer(kind, module)
        if kind == LINEAR and module in skipped:
            layer = Layer("skipped", module, skipped[module])
        elif not entry.is_float:
            layer = _layer("integer", module)
        tensors[entry.name] = layer
    return Layers(
        f"{host} {answer['version']}, {answer['class']}",
        host,
        True,
        tensors,
        frozenset(answer["linears"]),
        tuple(answer["keep_in_fp32"]),
        answer["prefix"],
    )


def _layer(kind: str, module: str) -> Layer:
    return Layer(kind, module, _REASONS.get(kind, kind))


def _run(host: str, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs `python -m weightpack.integrations.<host>`: JSON in, JSON out, no network."""
    package = str(Path(__file__).resolve().parent.parent)
    here = os.getcwd()
    # The child starts in an empty folder, so that no module of the current one is imported by chance.
    paths = [package, *(os.path.join(here, path) for path in sys.path if path)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "DIFFUSERS_VERBOSITY": "error",
        "USE_TF": "0",
        "USE_FLAX": "0",
    }
    with tempfile.TemporaryDirectory(prefix="weightpack-") as empty:
        try:
            done = subprocess.run(
                [sys.executable, "-m", f"weightpack.integrations.{host}"],
                input=json.dumps(requests),
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                cwd=empty,
                env=environment,
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise BackendError(f"{host} did not describe the model within {TIMEOUT_SECONDS} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = re.sub(r"\s+", " ", lines[-1])[:300] if lines else f"exit code {done.returncode}"
        raise BackendError(f"{host} cannot describe the model: {reason}")
    try:
        # Libraries may print on the way; the answer is the last line.
        answers = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise BackendError(f"{host} gave no readable description of the model") from error
    if not isinstance(answers, list) or len(answers) != len(requests):
        raise BackendError(f"{host} gave no readable description of the model")
    return answers
