"""What of a transformers model is stored, and under which names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...stored import Stored, place_of
from .original_names import under_original_names

_UNREAD = {
    "quanto": "gives new first values to layers whose weights quanto packed",
    "modelopt": "takes the codes of modelopt for weights, or refuses their shapes",
}
"""What transformers makes of files that it has no quantizer for, by method."""


def stored_tensors(model: Any, quantizer: Any, state: Mapping[str, Any]) -> list[Stored]:
    """`state` without what the class does not save, of tied parameters one, under the names of its checkpoints.

    Raises `ConfigError` for a model with adapters.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(
            f"{type(model).__name__} has adapters on it, which are not saved here",
            hint="save_pretrained of the model itself saves the adapters alone; delete_adapter() removes them",
        )
    ignored = set(model._keys_to_ignore_on_save or ())
    kept = {name: tensor for name, tensor in state.items() if name not in ignored and hasattr(tensor, "dtype")}
    packed = _packed(model, quantizer)
    for name in _repeated(model, kept, packed):
        del kept[name]
    return [Stored(name, tensor) for name, tensor in under_original_names(model, kept, packed).items()]


def unread(quantizer: Any) -> str | None:
    """What becomes of a model in transformers' own hands, where that is not what was saved."""
    method = "" if quantizer is None else str(quantizer.config.quant_method)
    if method not in _UNREAD:
        return None
    return (
        f"transformers by itself {_UNREAD[method]}: what is saved loads with weightpack.from_pretrained, or "
        "after weightpack.integrations.transformers.register()"
    )


def _packed(model: Any, quantizer: Any) -> set[str]:
    """The modules whose weights are packed."""
    if quantizer is None:
        return set()
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = {name.rpartition(".")[0] for name in names if quantizer.check_if_quantized_param(model, name)}
    return found | set(quantizer.quantized)


def _repeated(model: Any, state: Mapping[str, Any], packed: set[str]) -> list[str]:
    """Tied parameters whose other name is there as well and still is the same, with what belongs to them.

    What shares memory without being declared tied is stored under each of its names: nothing would bring
    the others back.
    """
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    own = dict(model.named_parameters(remove_duplicate=False))
    found = []
    for name, source in tied.items():
        if own.get(name) is None or own.get(source) is None:
            continue
        if name in state and source in state:
            if own[name] is own[source] or _same_memory(state[name], state[source]):
                found.append(name)
            continue
        module, other = name.rpartition(".")[0], source.rpartition(".")[0]
        if own[name] is own[source] and module in packed and other in packed:
            parts = [key for key in state if key.startswith(f"{module}.") and key not in own]
            if all(other + key[len(module) :] in state for key in parts):
                found += parts
    return found


def _same_memory(one: Any, other: Any) -> bool:
    return "meta" not in (one.device.type, other.device.type) and place_of(one) == place_of(other)
