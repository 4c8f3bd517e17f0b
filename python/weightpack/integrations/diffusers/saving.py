"""What of a diffusers model is stored, and its config."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...stored import Stored
from .configs import misread_warning, saved_config
from .host import is_local_path


def stored_tensors(quantizer: Any, state: Mapping[str, Any]) -> list[Stored]:
    """`state` under every name: diffusers ties nothing when it loads.

    What diffusers takes from the file of another tensor alone follows that one; see `_leader`. All
    other parts of packed weights it finds in whichever shards they are.
    """
    followers: dict[str, list[str]] = {}
    for name in state:
        leader = _leader(quantizer, name)
        if leader in state:
            followers.setdefault(str(leader), []).append(name)
    led = {name for names in followers.values() for name in names}
    stored = []
    for name, tensor in state.items():
        if name not in led:
            stored.append(Stored(name, tensor))
            stored += [Stored(one, state[one], with_previous=True) for one in followers.get(name, ())]
    return stored


def _leader(quantizer: Any, name: str) -> str | None:
    """The tensor in whose file diffusers looks for `name`, `None` where any file will do.

    All statistics of a bitsandbytes weight of 4 bits have to be beside it. One of 8 bits waits for its
    scales, but then takes the mark of its layout from their file.
    """
    if quantizer is None or not quantizer.name.startswith("bitsandbytes"):
        return None
    weight, component = quantizer.component_of(name) or (name, "")
    if quantizer.name == "bitsandbytes_4bit":
        return str(weight) if component else None
    return f"{name.removesuffix(component)}SCB" if component == "weight_format" else None


def files(model: Any, quantizer: Any) -> dict[str, str]:
    """`config.json`, by diffusers' own writer; the model and its config are not touched.

    Its skip list is one that diffusers reads as weightpack has. Warns where there is none.
    """
    fields = {key: value for key, value in model.config.items() if key != "quantization_config"}
    if is_local_path(fields.get("_name_or_path")):
        del fields["_name_or_path"]
    if "auto_map" in fields:
        # The writer adds to it.
        fields["auto_map"] = dict(fields["auto_map"])
    if quantizer is not None:
        config, misread = saved_config(quantizer.config, model, quantizer)
        fields["quantization_config"] = config.to_dict()
        if misread is not None:
            warnings.warn(misread_warning(misread), stacklevel=4)
    # The writer changes the config that it writes, and asks the object for nothing else.
    blank = object.__new__(type(model))
    blank.__dict__["_internal_dict"] = type(model.config)(fields)
    try:
        return {str(model.config_name): blank.to_json_string()}
    except TypeError as error:
        raise ConfigError(f"the config of {type(model).__name__} is no JSON: {error}") from error
