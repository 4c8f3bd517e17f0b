"""What of a diffusers model is stored, and its config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...stored import Stored


def stored_tensors(quantizer: Any, state: Mapping[str, Any]) -> list[Stored]:
    """`state` under every name: diffusers ties nothing when it loads.

    The parts of a bitsandbytes weight of 4 bits stay in one file, where diffusers looks for them.
    """
    together = quantizer is not None and quantizer.name == "bitsandbytes_4bit"
    return [Stored(name, tensor, together and _is_statistic(quantizer, name)) for name, tensor in state.items()]


def _is_statistic(quantizer: Any, name: str) -> bool:
    """Whether this is a component that follows its weight."""
    found = quantizer.component_of(name)
    return found is not None and found[1] != ""


def files(model: Any, quantizer: Any) -> dict[str, str]:
    """`config.json`."""
    try:
        fields = json.loads(model.to_json_string())
    except TypeError as error:
        raise ConfigError(f"the config of {type(model).__name__} is no JSON: {error}") from error
    fields.pop("_name_or_path", None)
    return {"config.json": json.dumps(fields, indent=2, sort_keys=True) + "\n"}
