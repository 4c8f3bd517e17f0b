"""What the keys of a checkpoint become in a model of transformers: by its own renamings, and by its own
conversions, which merge and split tensors."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..._lazy import require
from ...errors import UnsupportedError
from ...loading.host import KeyPlan, Target
from .floats import float32_names

_PURPOSE = "name the tensors of its models"


def plan_keys(model: Any, entries: Mapping[str, tuple[int, ...]]) -> KeyPlan:
    """The targets in `model`, whose parameters are on the meta device, for tensors of these shapes.

    A key that has no place in the model is a target of its own name, unless the class says that it may be
    passed over. Leaves on the model what transformers' own loader leaves, so that its `save_pretrained`
    writes the names of the checkpoint. Raises `UnsupportedError` for a conversion that fails.
    """
    names = _Names(model, model.state_dict())
    wide = set(float32_names(model, model.config.dtype))

    targets: dict[str, Target] = {}
    merges: dict[str, _Merge] = {}
    unknown = []
    ignored = []
    for key, name, pattern in names.of(entries):
        if name not in names.state:
            unknown.append((key, name))
        elif pattern is not None:
            if name not in merges:
                merges[name] = _Merge(model, name, names.converter(pattern), _type_of(names, name, wide))
            merges[name].add(key, pattern)
        elif name in targets:
            # Two keys for one parameter: the first one is taken, there as here.
            ignored.append(key)
        else:
            targets[name] = Target(name, (key,))
    for merge in merges.values():
        for target in merge.targets(entries):
            targets.setdefault(target.name, target)

    passed_over = _passed_over(model)
    for key, name in unknown:
        if passed_over(name):
            ignored.append(key)
        else:
            targets.setdefault(key, Target(key, (key,)))
    model._weight_conversions = names.used()
    return KeyPlan(list(targets.values()), frozenset(ignored))


def names_in_model(model: Any, keys: Iterable[str]) -> list[tuple[str, str]]:
    """Each of `keys` and the parameter or buffer that it is, or is made into; keys without a place are left out."""
    names = _Names(model, model.state_dict())
    return [(key, name) for key, name, _ in names.of(keys) if name in names.state]


def leads_to(
    model: Any, state: Mapping[str, Any], entries: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """What each of the tensors of these shapes is made into, or is, alone or with others: shapes by name in the
    model; nothing for a key without a place. `state` are the parameters and buffers of the model by name.

    A conversion that fails gives nothing either.
    """
    names = _Names(model, state)
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    merges: dict[str, _Merge] = {}
    for key, name, pattern in names.of(entries):
        if pattern is None:
            found[key] = {name: tuple(entries[key])} if name in state else {}
            continue
        if name not in merges:
            merges[name] = _Merge(model, name, names.converter(pattern), require("torch", _PURPOSE).float32)
        merges[name].add(key, pattern)
    for merge in merges.values():
        try:
            made = {name: tuple(one.shape) for name, one in merge.made(entries).items()}
        except UnsupportedError:
            made = {}
        found.update({key: made for key, _ in merge.sources})
    return found


def renamings_of(model: Any) -> Callable[[str], str]:
    """transformers' renamings of single keys, whatever they name."""
    loading = require("transformers.core_model_loading", _PURPOSE)
    mapping = require("transformers.conversion_mapping", _PURPOSE).get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, loading.WeightRenaming)]

    def renamed(key: str) -> str:
        new: str = loading.apply_renamings(key, renamings)
        return new

    return renamed


def _type_of(names: _Names, name: str, wide: set[str]) -> Any:
    return require("torch", _PURPOSE).float32 if name in wide else names.state[name].dtype


class _Names:
    """transformers' renamings for one model."""

    def __init__(self, model: Any, state: Mapping[str, Any]) -> None:
        self._loading = require("transformers.core_model_loading", _PURPOSE)
        self._mapping = require("transformers.conversion_mapping", _PURPOSE).get_model_conversion_mapping(model)
        self._renamings = [one for one in self._mapping if isinstance(one, self._loading.WeightRenaming)]
        self._converters = [one for one in self._mapping if isinstance(one, self._loading.WeightConverter)]
        self._prefix = model.base_model_prefix
        self.state = state

    def of(self, keys: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
        """Each key, its name in the model, and the pattern of the conversion that takes it, if one does."""
        rename = self._loading.rename_source_key
        # In the order of transformers' own loader: some renamings only start once a guard was seen.
        for key in sorted(keys, key=self._loading.dot_natural_key):
            name, pattern = rename(key, self._renamings, self._converters, self._prefix, self.state)
            if name not in self.state and key in self.state:
                name, pattern = rename(key, [], [], self._prefix, self.state)
            yield key, name, pattern

    def converter(self, pattern: str) -> Any:
        """The conversion that a pattern belongs to; of several the last one, as in transformers."""
        return [one for one in self._converters if pattern in one.source_patterns][-1]

    def used(self) -> list[Any]:
        """The renamings and conversions that applied to some key."""
        return [one for one in self._mapping if one.was_used()]


class _Merge:
    """One conversion of some tensors of a checkpoint into one or more of the model."""

    def __init__(self, model: Any, name: str, converter: Any, dtype: Any) -> None:
        self.model = model
        self.name = name
        self.converter = converter
        self.dtype = dtype
        self.sources: list[tuple[str, str]] = []

    def add(self, key: str, pattern: str) -> None:
        """One more source."""
        self.sources.append((key, pattern))

    def targets(self, entries: Mapping[str, tuple[int, ...]]) -> list[Target]:
        """What comes out."""
        keys = tuple(key for key, _ in self.sources)
        return [Target(name, keys, merge=self._pick(name)) for name in self.made(entries)]

    def made(self, entries: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Tensors without values, by name: the conversion is carried out on such."""
        torch = require("torch", _PURPOSE)
        return self.run([torch.empty(entries[key], dtype=self.dtype, device="meta") for key, _ in self.sources])

    def _pick(self, name: str) -> Callable[[list[Any]], Any]:
        def merge(tensors: list[Any]) -> Any:
            return self.run(tensors)[name]

        return merge

    def run(self, tensors: list[Any]) -> dict[str, Any]:
        """The parameters made of the sources' tensors, which are cast to the model's type first."""
        # A conversion keeps what it collects: each run has one of its own.
        converter = copy.deepcopy(self.converter)
        for (key, pattern), tensor in zip(self.sources, tensors, strict=True):
            converter.add_tensor(self.name, key, pattern, self._cast(tensor))
        try:
            made = converter.convert(self.name, model=self.model, config=self.model.config)
        except (ValueError, RuntimeError, KeyError, IndexError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UnsupportedError(
                f'transformers cannot put "{self.name}" together: {reason} ({len(tensors)} tensors, '
                f'the first "{self.sources[0][0]}")'
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _cast(self, tensor: Any) -> Any:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def _passed_over(model: Any) -> Callable[[str], bool]:
    """Whether a key that the model lacks may be passed over in silence."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    # Buffers that were stored once, in places where they are no more.
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda name: any(pattern.search(name) for pattern in compiled)
