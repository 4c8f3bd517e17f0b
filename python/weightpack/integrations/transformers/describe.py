"""What transformers makes of a checkpoint, told by its own classes without loading a weight.

`python -m weightpack.integrations.transformers` answers with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..._lazy import require
from ..module_kinds import kind_of

_PURPOSE = "ask the model class for its linear layers"


def describe_layers(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Builds the class of `config` on the meta device and looks up each tensor of a checkpoint.

    Gives a JSON-able object:
    `version`, `class`; `prefix`: name of the bare model inside the class; `linears`: paths of every
    layer that bitsandbytes would replace; `skipped`: those that transformers leaves alone by
    default, each with the reason; `keep_in_fp32`: entries it adds to any skip list by itself;
    `tensors`: for each tensor its kind and the path of its layer; `refusal`: a sentence, where no
    packed file of this class can be loaded.

    Only classes inside transformers are built: a config that points to code of its own is refused.
    """
    torch = require("torch", _PURPOSE)
    transformers = require("transformers", _PURPOSE)
    model = _build(torch, transformers, dict(config))
    described: dict[str, Any] = {
        "version": transformers.__version__,
        "class": type(model).__name__,
        "prefix": _prefix(model),
        "linears": [],
        "skipped": {},
        "keep_in_fp32": sorted(model._keep_in_fp32_modules or ()),
        "tensors": {},
        "refusal": None,
    }
    rebuilt = require("transformers.quantizers.base", _PURPOSE).MODULES_TO_PATCH_FOR_QUANTIZATION
    kinds = {}
    for path, module in model.named_modules():
        kinds[path] = _kind(torch, transformers, module)
        if type(module).__name__ in rebuilt:
            described["refusal"] = f"{type(module).__name__} is rebuilt for bitsandbytes while loading"
    described["linears"] = sorted(path for path, kind in kinds.items() if kind in ("linear", "conv1d"))
    described["skipped"] = _skipped(model, described["linears"], described["keep_in_fp32"])
    described["tensors"] = _look_up(model, tensors, kinds)
    return described


def _build(torch: Any, transformers: Any, config: dict[str, Any]) -> Any:
    config.pop("quantization_config", None)
    names = config.get("architectures") or []
    name = names[0] if names else None
    model_type = config.get("model_type")
    configs = require("transformers.models.auto.configuration_auto", _PURPOSE).CONFIG_MAPPING
    if name is not None and hasattr(transformers, name):
        cls = getattr(transformers, name)
        made = configs.get(model_type, cls.config_class).from_dict(config)
        with torch.device("meta"):
            model = cls._from_config(made) if hasattr(cls, "_from_config") else cls(made)
    elif model_type in configs and "auto_map" not in config:
        made = configs[model_type].from_dict(config)
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(made)
    else:
        raise LookupError(f"transformers has no class {name or model_type}")
    return model


def _prefix(model: Any) -> str:
    prefix = model.base_model_prefix
    return prefix if prefix and prefix in dict(model.named_children()) else ""


def _kind(torch: Any, transformers: Any, module: Any) -> str:
    if type(module) is torch.nn.Linear:
        return "linear"
    if isinstance(module, transformers.pytorch_utils.Conv1D):
        return "conv1d"
    return kind_of(torch, module)


def _skipped(model: Any, linears: list[str], keep_in_fp32: list[str]) -> dict[str, str]:
    """Linear layers that `from_pretrained(..., BitsAndBytesConfig)` does not replace, and why."""
    should_convert_module = require("transformers.quantizers.quantizers_utils", _PURPOSE).should_convert_module
    default = require("transformers.quantizers.base", _PURPOSE).get_keys_to_not_convert(model)
    output = model.get_output_embeddings()
    tied = model.all_tied_weights_keys
    tied = {name.removesuffix(".weight") for pair in tied.items() for name in pair}
    skipped = {}
    for path in linears:
        if not should_convert_module(path, keep_in_fp32):
            skipped[path] = "layer that transformers keeps in float32"
        elif not should_convert_module(path, default):
            if path in tied:
                skipped[path] = "tied to the embedding"
            elif output is not None and model.get_submodule(path) is output:
                skipped[path] = "output layer"
            else:
                skipped[path] = "last layer, which transformers does not pack"
    return skipped


def _look_up(model: Any, tensors: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """For each tensor of the checkpoint, what it becomes in the model."""
    loading = require("transformers.core_model_loading", _PURPOSE)
    mapping = require("transformers.conversion_mapping", _PURPOSE).get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
    state = model.state_dict()
    prefix = model.base_model_prefix

    found = {}
    # The order of transformers' own loader: some renamings only start once a guard was seen.
    for name in sorted(tensors, key=loading.dot_natural_key):
        target, converter = loading.rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, converter = loading.rename_source_key(name, [], [], prefix, state)
        module, _, leaf = target.rpartition(".")
        if converter is not None:
            found[name] = ("merged", module)
        elif target not in state:
            found[name] = ("unknown", module)
        elif leaf != "weight":
            found[name] = ("vector" if state[target].ndim <= 1 else "parameter", module)
        else:
            kind = kinds.get(module, "other")
            if kind == "linear" and not _statistics_follow(name, renamings, loading.apply_renamings):
                kind = "renamed"
            found[name] = (kind, module)
    return found


def _statistics_follow(name: str, renamings: Any, apply_renamings: Any) -> bool:
    """Whether the statistics of a packed weight are renamed along with it."""
    target = apply_renamings(name, renamings)
    base, dot, _ = name.rpartition(".")
    target_base = target.rpartition(".")[0]
    absmax: str = apply_renamings(f"{name}.absmax", renamings)
    scale: str = apply_renamings(f"{base}{dot}SCB", renamings)
    return absmax == f"{target}.absmax" and scale == (f"{target_base}.SCB" if target_base else "SCB")
