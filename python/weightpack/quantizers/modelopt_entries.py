"""ModelOpt's `quant_cfg`: which quantizer of which layer gets which attributes.

Since ModelOpt 0.44 it is a list of entries `{"quantizer_name": glob, "cfg": {...}, "enable": bool,
"parent_class": "nn.Linear"}`; later entries win, `cfg` replaces all attributes, `enable` alone switches.
Before, it was a mapping from glob to attributes; both are read here, and lists come out. The names are
those of layers with `.weight_quantizer`, `.input_quantizer` or `.output_quantizer` behind.

JSON knows neither tuples nor numbers as keys: `num_bits: [4, 3]` and `block_sizes: {"-1": 16}` become
what ModelOpt expects.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .._lazy import require
from ..errors import CheckpointError, ConfigError

NUM_BITS: dict[str, Any] = {"FP8": (4, 3), "INT8": 8, "INT4": 4, "NF4": 4, "NVFP4": (2, 1)}
"""ModelOpt's name of each type: bits, or exponent and mantissa bits."""
BLOCKS = {"INT4": 128, "NF4": 64, "NVFP4": 16}
"""Weights that share a scale, where the caller does not say: those of ModelOpt's own configs."""
SCALE_BLOCK = 256
"""Scales of NF4 that share one of their own."""
_EVERYTHING = ("*", "*weight_quantizer", "*input_quantizer", "*output_quantizer")


def own_entries(
    weights: str,
    activations: str | None,
    *,
    axis: int | None = None,
    block: int | None = None,
    scale_axis: int | None = None,
    scale_block: int | None = None,
) -> list[dict[str, Any]]:
    """The entries for a type of weights and one of activations (`None`: as they are).

    `axis` and `block` are `channel_quantize` and `block_quantize`. Activations share one scale, NVFP4
    ones have one for 16 besides.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    entries.append({"quantizer_name": "*weight_quantizer", "cfg": _weights(weights, axis, block)})
    if weights == "NF4":
        scale_sizes = {-1 if scale_axis is None else scale_axis: scale_block or SCALE_BLOCK}
        entries[-1]["cfg"]["block_sizes"] |= {"scale_bits": 8, "scale_block_sizes": scale_sizes}
    if activations is not None:
        chosen = _weights("NVFP4", None, None) if activations == "NVFP4" else {"num_bits": NUM_BITS[activations]}
        entries.append({"quantizer_name": "*input_quantizer", "cfg": chosen})
    return entries


def _weights(kind: str, axis: int | None, block: int | None) -> dict[str, Any]:
    block = block or BLOCKS.get(kind)
    if block is None:
        return {"num_bits": NUM_BITS[kind], "axis": axis}
    sizes: dict[Any, Any] = {-1 if axis is None else axis: block}
    if kind == "NVFP4":
        sizes |= {"type": "dynamic", "scale_bits": (4, 3)}
    return {"num_bits": NUM_BITS[kind], "block_sizes": sizes}


def default_entries() -> list[dict[str, Any]]:
    """ModelOpt's own entries for layers that should stay as they are: output layers, routers and so on."""
    presets = require("modelopt.torch.quantization", "pack weights for ModelOpt")
    entries = [dict(entry) for entry in presets.INT8_WEIGHT_ONLY_CFG["quant_cfg"]]
    return [
        entry
        for entry in entries
        if entry.get("enable") is False and (entry.get("parent_class") or entry["quantizer_name"] not in _EVERYTHING)
    ]


def attributes(
    entries: Sequence[Mapping[str, Any]], path: str, quantizer: str, classes: Sequence[str], *, forced: bool = False
) -> dict[str, Any] | None:
    """The attributes of a layer's quantizer (`weight_quantizer`), `None` where it is switched off.

    `classes` are the names of the layer's class and its bases, as in `nn.Linear`. With `forced` it counts
    as switched on. Raises `ConfigError` for several quantizers in a row, which no packed weight has.
    """
    enabled = quantizer != "output_quantizer"
    found: dict[str, Any] = {}
    for entry in entries:
        if not fnmatch.fnmatchcase(f"{path}.{quantizer}", entry["quantizer_name"]):
            continue
        if entry.get("parent_class") and entry["parent_class"] not in classes:
            continue
        chosen = entry.get("cfg")
        if isinstance(chosen, Sequence):
            raise ConfigError(f"modelopt_config: {entry['quantizer_name']} has {len(chosen)} quantizers in a row")
        if chosen is not None:
            found = {key: value for key, value in chosen.items() if key not in ("enable", "fake_quant")}
        enabled = bool(entry.get("enable", (chosen or {}).get("enable", True)))
    return found if enabled or forced else None


def normalised(config: Any) -> dict[str, Any]:
    """A ModelOpt config of the caller's or from JSON, with `quant_cfg` as a list.

    Raises `ConfigError` for what is no such config.
    """
    if not isinstance(config, Mapping) or "quant_cfg" not in config:
        raise ConfigError('modelopt_config is not a mapping with "quant_cfg", as ModelOpt takes it')
    given = config["quant_cfg"]
    if isinstance(given, Mapping):
        # What was "default" went before everything else.
        entries = _of_mapping({"default": given["default"]}) if "default" in given else []
        entries += _of_mapping({key: value for key, value in given.items() if key != "default"})
    elif isinstance(given, Sequence) and not isinstance(given, str):
        entries = [entry for item in given for entry in _of_item(item)]
    else:
        raise ConfigError(f"modelopt_config: quant_cfg is {type(given).__name__}, expected a list or a mapping")
    rest = {key: _restored(value) for key, value in config.items() if key != "quant_cfg"}
    return {"quant_cfg": [_restored(entry) for entry in entries], **rest}


def _of_item(item: Any) -> list[dict[str, Any]]:
    if callable(getattr(item, "model_dump", None)):
        item = item.model_dump(exclude_unset=True)
    if not isinstance(item, Mapping):
        raise ConfigError(f"modelopt_config: entry {item!r} of quant_cfg is not a mapping")
    if "quantizer_name" not in item:
        return _of_mapping(item)
    if item.get("cfg") is None and "enable" not in item:
        raise ConfigError(f'modelopt_config: entry {item["quantizer_name"]} has neither "cfg" nor "enable"')
    return [dict(item)]


def _of_mapping(given: Mapping[str, Any], parent: str | None = None) -> list[dict[str, Any]]:
    """Entries of the form before ModelOpt 0.44."""
    entries: list[dict[str, Any]] = []
    for name, chosen in given.items():
        if name.startswith("nn.") and parent is None:
            entries += _of_mapping(chosen, parent=name)
            continue
        entry: dict[str, Any] = {"quantizer_name": "*" if name == "default" else name}
        if parent is not None:
            entry["parent_class"] = parent
        if isinstance(chosen, Mapping):
            rest = {key: value for key, value in chosen.items() if key != "enable"}
            if rest or "enable" not in chosen:
                entry["cfg"] = rest
            if "enable" in chosen:
                entry["enable"] = chosen["enable"]
        else:
            entry["cfg"] = chosen
        entries.append(entry)
    return entries


def _restored(value: Any, key: str = "") -> Any:
    if callable(getattr(value, "model_dump", None)):
        value = value.model_dump(exclude_unset=True)
    if isinstance(value, Mapping):
        sized = key.endswith("block_sizes")
        return {_axis(inner) if sized else str(inner): _restored(item, str(inner)) for inner, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_restored(item, key) for item in value]
        return tuple(items) if key in ("num_bits", "scale_bits", "axis") else items
    return value


def _axis(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.lstrip("-").isdigit() else key


def refuse_bare_codes(entries: Mapping[str, Any], packed: Collection[str]) -> None:
    """Raises `CheckpointError` for a weight that is stored as codes, and is not among the `packed` ones."""
    for name, entry in entries.items():
        if name.endswith("weight") and name not in packed and getattr(entry, "dtype", None) in ("F8_E4M3", "I8", "U8"):
            raise CheckpointError(f'"{name}" is stored as {entry.dtype}, and has no scale')
