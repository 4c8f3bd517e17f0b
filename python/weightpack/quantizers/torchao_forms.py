"""torchao's configs as JSON, by short name and as objects, and what is known of each kind.

torchao describes how a weight is packed by an object (`Int8WeightOnlyConfig(...)`). Its form in a
`config.json` is `{"_type": class, "_version": number, "_data": {field: value}}`, nested where a field
is itself such an object, a dtype or a member of an enumeration. Forms are handled here without torchao;
only `build` and `form_of` import it.

A config may hold others, one per module or parameter (`FqnToConfig`): `assigned` says which of them a
weight gets.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from .._lazy import require
from ..errors import ConfigError

Form = dict[str, Any]

_PURPOSE = "pack weights for torchao"
_PER_MODULE = ("FqnToConfig", "ModuleFqnToConfig")
_DEFAULT = "_default"


def _dtype(name: str) -> Form:
    return {"_type": "torch.dtype", "_data": name}


def _mx(name: str) -> Form:
    data = {"activation_dtype": _dtype(name), "weight_dtype": _dtype(name)}
    return {"_type": "MXDynamicActivationMXWeightConfig", "_version": 1, "_data": data}


_TILES = {"group_size": 128, "int4_packing_format": {"_type": "Int4PackingFormat", "_data": "TILE_PACKED_TO_4D"}}

SHORT_NAMES: dict[str, Form] = {
    "int8": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}},
    "int8_dynamic": {"_type": "Int8DynamicActivationInt8WeightConfig", "_version": 2, "_data": {}},
    "float8": {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": {}},
    "float8_dynamic": {"_type": "Float8DynamicActivationFloat8WeightConfig", "_version": 2, "_data": {}},
    "int4": {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": _TILES},
    "nvfp4": {"_type": "NVFP4WeightOnlyConfig", "_version": 1, "_data": {}},
    "nvfp4_dynamic": {"_type": "NVFP4DynamicActivationNVFP4WeightConfig", "_version": 1, "_data": {}},
    "mxfp8": _mx("float8_e4m3fn"),
    "mxfp4": _mx("float4_e2m1fn_x2"),
}
"""Short names and the configs that they stand for; fields left out have torchao's own defaults."""

PASS_GRADIENTS = frozenset(
    {"Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig", "NVFP4WeightOnlyConfig"}
)
"""Kinds whose layers pass gradients on to their input, as adapters in earlier layers need. Those that
quantize activations as well cut them off without a word (torchao 0.18)."""

UNSAVED_PACKING = frozenset({"PRESHUFFLED", "SPARSE_1D_DATA_1D_METADATA", "SPARSE_2D_DATA_2D_METADATA"})
"""Packing formats whose tensors torchao does not write to safetensors."""


def form_of_name(name: str) -> Form:
    """The form that a short name stands for. Raises `ConfigError` that lists the names."""
    if name not in SHORT_NAMES:
        raise ConfigError(
            f"quant_type {name!r} is none of {', '.join(SHORT_NAMES)}",
            hint="or give a config object of torchao, such as torchao.quantization.Int8WeightOnlyConfig()",
        )
    return copy.deepcopy(SHORT_NAMES[name])


def form_of_section(section: Mapping[str, Any]) -> Form:
    """The form in `quant_type` of a `config.json`, with or without the `default` that hosts put round it."""
    if "_type" not in section:
        if set(section) != {"default"} or not isinstance(section["default"], Mapping):
            raise ConfigError(f"quant_type has the keys {sorted(map(str, section))}, expected default alone")
        section = section["default"]
    if not isinstance(section.get("_type"), str) or not isinstance(section.get("_data"), Mapping):
        raise ConfigError("quant_type holds no config of torchao: _type and _data are expected")
    return copy.deepcopy(dict(section))


def is_config(value: Any) -> bool:
    """Whether `value` is one of torchao's config objects. Imports nothing."""
    module = sys.modules.get("torchao.core.config")
    return module is not None and isinstance(value, module.AOBaseConfig)


def form_of(config: Any) -> Form:
    """The form of a config object. Raises `ConfigError` for one that JSON cannot hold."""
    try:
        form: Form = require("torchao.core.config", _PURPOSE).config_to_dict(config)
    except (TypeError, NotImplementedError) as error:
        raise ConfigError(f"{type(config).__name__} cannot be written to a config.json: {error}") from error
    return form


def build(form: Form) -> Any:
    """The config object of a form. Raises `ConfigError` for what the installed torchao does not know."""
    try:
        return require("torchao.core.config", _PURPOSE).config_from_dict(copy.deepcopy(form))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"torchao does not make a {form.get('_type')} of quant_type: {error}") from error


def forms_in(form: Form) -> Iterator[Form]:
    """The forms that weights may get: `form` itself, or those that it holds per module."""
    if form["_type"] not in _PER_MODULE:
        yield form
        return
    for held in _held(form["_data"]).values():
        if held is not None:
            yield from forms_in(held)


def configs_in(config: Any) -> Iterator[Any]:
    """The same for config objects."""
    if not is_per_module(config):
        yield config
        return
    for held in config.fqn_to_config.values():
        if held is not None:
            yield from configs_in(held)


def is_per_module(config: Any) -> bool:
    """Whether a config object holds others, by the names of modules."""
    return type(config).__name__ in _PER_MODULE


def named_exactly(form: Form) -> list[str]:
    """The modules and parameters that a form names in full, with a config of their own."""
    if form["_type"] not in _PER_MODULE:
        return []
    held = _held(form["_data"])
    return [name for name, one in held.items() if one is not None and name != _DEFAULT and not name.startswith("re:")]


def assigned(config: Any, name: str) -> Any:
    """The config object for parameter `name`, or `None` where it stays as it is.

    Of a config per module the first of these counts: the parameter's name, the module's, a pattern
    (`re:`) that fits the whole of the parameter's name, one that fits the module's, `_default`.
    """
    if not is_per_module(config):
        return config
    held = config.fqn_to_config
    names = (name, name.rpartition(".")[0])
    for one in names:
        if one in held:
            return held[one]
    for one in names:
        for pattern, found in held.items():
            if pattern.startswith("re:") and re.fullmatch(pattern[3:], one):
                return found
    return held.get(_DEFAULT)


def names_parameter(config: Any, name: str) -> bool:
    """Whether a config per module packs parameter `name` by its own name, in full or by a pattern."""
    if not is_per_module(config):
        return False
    held = config.fqn_to_config
    if name in held:
        return held[name] is not None
    patterns = (
        found for pattern, found in held.items() if pattern.startswith("re:") and re.fullmatch(pattern[3:], name)
    )
    return next(patterns, None) is not None


def passes_gradients(form: Form) -> bool:
    """Whether layers packed so pass gradients on to their input."""
    return all(one["_type"] in PASS_GRADIENTS for one in forms_in(form))


def is_saved(form: Form) -> bool:
    """Whether torchao writes weights packed so to safetensors."""
    return not any(_packing_formats(one) & UNSAVED_PACKING for one in forms_in(form))


def _packing_formats(form: Form) -> set[str]:
    """The packing formats that a form names, as members of their enumeration."""
    data = form["_data"]
    if form["_type"] == "Float8DynamicActivationInt4WeightConfig":
        data = {"int4_packing_format": "preshuffled", **data}
    values = [value["_data"] if isinstance(value, Mapping) else value for value in data.values()]
    return {value.upper() for value in values if isinstance(value, str)}


def _held(data: Mapping[str, Any]) -> Mapping[str, Any]:
    held: Mapping[str, Any] = data.get("fqn_to_config") or data.get("module_fqn_to_config") or {}
    return held
