"""What is written beside the weights for hosts: `config.json`.

What its section `quantization_config` holds is told by `weightpack.packings`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .decision import Decision
from .entry import FLOATS, Entry
from .errors import ConfigError, UnsupportedError
from .packings.table import HostConfig, backend_of, backend_of_method, packed_of, packing

COMPUTE_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
_TORCH_NAMES = {**COMPUTE_DTYPES, "f64": "float64"}


def source_method(config: Mapping[str, Any] | None) -> str | None:
    """Which backend of the table of packings a source says it is packed by, or `None` for a plain model.

    Raises `UnsupportedError` for a method whose tensors are not understood.
    """
    found = quantization_section(config)
    if found is None:
        return None
    method = found.get("quant_method")
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = "bitsandbytes"
    backend = backend_of_method(str(method))
    if backend is None:
        raise UnsupportedError(
            f'the source is packed by "{method}", which is not decoded by this version',
            hint="convert the model it was made from",
        )
    return backend


def main_dtype(entries: Iterable[Entry]) -> str | None:
    """The floating point type that most weights of matrices are stored in or were packed from, in
    the short form ("bf16"); `None` where there are none or they come from GGUF blocks."""
    counts: Counter[str] = Counter()
    for entry in entries:
        if entry.is_float and len(entry.shape) > 1 and not (entry.format or "").startswith("gguf:"):
            counts[FLOATS[entry.dtype]] += entry.weights
    return counts.most_common(1)[0][0] if counts else None


def compute_dtype(choice: str | None, entries: Iterable[Entry]) -> str:
    """The type that layers compute in, as configs spell it: the choice, or that of the source.

    Sources without a type of their own (GGUF blocks) compute in bfloat16, and so do those in
    float64.
    """
    if choice is not None:
        name = choice.lower().removeprefix("torch.")
        name = COMPUTE_DTYPES.get(name, name)
        if name not in COMPUTE_DTYPES.values():
            raise ConfigError(f'compute_dtype "{choice}" is none of {", ".join(COMPUTE_DTYPES.values())}')
        return name
    return COMPUTE_DTYPES.get(main_dtype(entries) or "bf16", "bfloat16")


def host_config(
    decisions: Sequence[Decision], skip_list: Sequence[str], compute: str, host: str | None = None
) -> HostConfig | None:
    """What tells a host how the weights are packed, or `None` where none is. `host` is "transformers" or
    "diffusers", `None` where either may read the model."""
    packed = packed_of(decisions)
    if not packed:
        return None
    return packing(str(backend_of(packed[0].result))).host_config(decisions, skip_list, compute, host)


def quantization_section(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The section of a model's config that says how its weights are packed; `None` for a plain model."""
    if config is None:
        return None
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    for holder in [config, *nested]:
        found = holder.get("quantization_config") or holder.get("compression_config")
        if isinstance(found, Mapping):
            return found
    return None


def config_text(
    source: Mapping[str, Any], quantization: Mapping[str, Any] | None, cast: str | None, folder: Path
) -> str:
    """The text of the result's `config.json`.

    `cast` is the short name of the type that all weights were cast to, if they were. A local path
    that the source records about itself is dropped.
    """
    config = {key: _without_quantization(value) for key, value in source.items() if key != "quantization_config"}
    name = config.get("_name_or_path")
    if isinstance(name, str) and _is_local(name, folder):
        del config["_name_or_path"]
    if cast is not None:
        for holder in [config, *(value for value in config.values() if isinstance(value, dict))]:
            for key in ("dtype", "torch_dtype"):
                if isinstance(holder.get(key), str):
                    holder[key] = _TORCH_NAMES[cast]
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    is_sorted = "_class_name" in config or list(source) == sorted(source)
    return json.dumps(config, indent=2, sort_keys=is_sorted, ensure_ascii=False) + "\n"


def _without_quantization(value: Any) -> Any:
    if isinstance(value, Mapping) and "quantization_config" in value:
        return {key: inner for key, inner in value.items() if key != "quantization_config"}
    return dict(value) if isinstance(value, Mapping) else value


def _is_local(name: str, folder: Path) -> bool:
    if not name or name.startswith(("/", "~", ".", "\\")) or re.match(r"^[A-Za-z]:[\\/]", name):
        return True
    # "owner/model" is a name on the hub; anything longer, or with a backslash, is a path.
    return "\\" in name or name.count("/") > 1 or name == str(folder)
