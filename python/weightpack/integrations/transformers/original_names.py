"""Tensors of a model under the names and in the shapes of its checkpoints.

transformers renames, merges and splits tensors when it loads. Its own renamings and conversions, turned
round, give what any program reads that knows the checkpoints of the model. Nothing is copied for that:
pieces of a merged tensor are views of it, and what has to be computed is computed while it is written.

Packed weights cannot be merged or split. They are renamed at most, with everything that belongs to them,
and stay under the names of the model where a conversion would be due: these load too. So does everything
else whose way back would not lead here again.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..._lazy import require
from ...stored import Computation, Computed
from .keys import leads_to, renamings_of

_PURPOSE = "save its models"


def under_original_names(model: Any, state: Mapping[str, Any], packed: Collection[str]) -> dict[str, Any]:
    """`state`, tensors by their names in the model, by their names in a checkpoint.

    `packed` are the modules whose weights are. Tensors keep their order; what comes out of a conversion
    stands where the first tensor stood that goes into it.
    """
    way = _WayBack(model)
    if not way:
        return dict(state)
    moves: list[_Move] = []
    layers: dict[str, _Layer] = {}
    groups: dict[str, _Group] = {}
    for name in sorted(state, key=way.order):
        module = _module_of(name, packed)
        if module is not None:
            if module not in layers:
                layers[module] = _Layer(module, way)
                moves.append(layers[module])
            layers[module].members[name] = state[name]
            continue
        first, converter, pattern = way.conversion(name)
        if converter is None:
            moves.append(_Whole(name, state[name], way))
            continue
        if first not in groups:
            groups[first] = _Group(model, first, converter, way)
            moves.append(groups[first])
        groups[first].add(name, str(pattern), state[name])

    made: dict[str, dict[str, Any]] = {}
    for move in _that_lead_back(model, moves):
        made.update(move.places())
    return {new: tensor for name in state for new, tensor in made.get(name, {name: state[name]}).items()}


class _WayBack:
    """transformers' renamings and conversions of one model, turned round. False where there are none."""

    def __init__(self, model: Any) -> None:
        self._loading = require("transformers.core_model_loading", _PURPOSE)
        self.order: Callable[[str], Any] = self._loading.dot_natural_key
        applied = getattr(model, "_weight_conversions", None)
        if applied is None:
            # Never loaded: as the checkpoints of its class are, with no prefix that only some of them have.
            mapping = require("transformers.conversion_mapping", _PURPOSE).get_model_conversion_mapping
            applied = [
                one for one in mapping(model, add_legacy=False) if not isinstance(one, self._loading.PrefixChange)
            ]
        turned = []
        for one in reversed(applied):
            # Some have no way back.
            with contextlib.suppress(NotImplementedError):
                turned.append(one.reverse_transform())
        self._renamings = [one for one in turned if isinstance(one, self._loading.WeightRenaming)]
        self._converters = [one for one in turned if isinstance(one, self._loading.WeightConverter)]

    def __bool__(self) -> bool:
        return bool(self._renamings or self._converters)

    def renamed(self, name: str) -> str:
        """The name in the checkpoint of what is stored whole."""
        new: str = self._loading.apply_renamings(name, self._renamings)
        return new

    def conversion(self, name: str) -> tuple[str, Any, str | None]:
        """The first name that the conversion of a tensor gives, that conversion and its pattern; `None` for a
        tensor that none takes."""
        for converter in self._converters:
            first, pattern = converter.rename_source_key(name)
            if pattern is not None:
                return first, converter, pattern
        return name, None, None


class _Move:
    """Tensors of the model on their way to a checkpoint."""

    def entries(self) -> dict[str, tuple[int, ...]]:
        """What a loader finds: shapes by name. Of a packed weight the weight alone, by its name."""
        raise NotImplementedError

    def leads_back(self, found: Mapping[str, Mapping[str, tuple[int, ...]]], renamings: Any) -> bool:
        """Whether it is what a loader makes of the entries: `found` for each of them, `renamings` for any name."""
        raise NotImplementedError

    def places(self) -> dict[str, dict[str, Any]]:
        """For each name in the model, what stands in its place, by name in the checkpoint."""
        raise NotImplementedError


class _Whole(_Move):
    """One tensor that keeps its shape."""

    def __init__(self, name: str, tensor: Any, way: _WayBack) -> None:
        self._name = name
        self._tensor = tensor
        self._new = way.renamed(name)

    def entries(self) -> dict[str, tuple[int, ...]]:
        return {self._new: tuple(self._tensor.shape)}

    def leads_back(self, found: Mapping[str, Mapping[str, tuple[int, ...]]], renamings: Any) -> bool:
        return list(found[self._new]) == [self._name]

    def places(self) -> dict[str, dict[str, Any]]:
        return {self._name: {self._new: self._tensor}}


class _Layer(_Move):
    """A packed layer with all that belongs to it, which goes by the name of its weight."""

    def __init__(self, module: str, way: _WayBack) -> None:
        self._module = module
        self._weight = way.renamed(f"{module}.weight")
        self.members: dict[str, Any] = {}

    def entries(self) -> dict[str, tuple[int, ...]]:
        return {self._weight: ()}

    def leads_back(self, found: Mapping[str, Mapping[str, tuple[int, ...]]], renamings: Any) -> bool:
        if list(found[self._weight]) != [f"{self._module}.weight"] or not self._weight.endswith(".weight"):
            return False
        return all(renamings(new) == renamings(name) for name, new in self._names().items())

    def places(self) -> dict[str, dict[str, Any]]:
        return {name: {new: self.members[name]} for name, new in self._names().items()}

    def _names(self) -> dict[str, str]:
        path = self._weight.removesuffix(".weight")
        return {name: path + name[len(self._module) :] for name in self.members}


class _Group(_Move):
    """Tensors that one conversion turns into tensors of the checkpoint."""

    def __init__(self, model: Any, first: str, converter: Any, way: _WayBack) -> None:
        self._model = model
        self._first = first
        self._converter = converter
        self._way = way
        self._members: dict[str, tuple[str, Any]] = {}
        self._likes: dict[str, Any] = {}
        self._is_view = False

    def add(self, name: str, pattern: str, tensor: Any) -> None:
        """One more tensor of the model."""
        self._members[name] = (pattern, tensor.detach())

    def entries(self) -> dict[str, tuple[int, ...]]:
        twins = {name: tensor.to("meta") for name, (_, tensor) in self._members.items()}
        try:
            self._likes = self._run(twins, _in_place())
        except (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError):
            # Some of what it takes is packed or is not there.
            self._likes = {}
        memory = {_memory(twin) for twin in twins.values()}
        self._is_view = all(_memory(like) in memory for like in self._likes.values())
        return {name: tuple(like.shape) for name, like in self._likes.items()}

    def leads_back(self, found: Mapping[str, Mapping[str, tuple[int, ...]]], renamings: Any) -> bool:
        expected = {name: tuple(tensor.shape) for name, (_, tensor) in self._members.items()}
        back: dict[str, tuple[int, ...]] = {}
        for name in self._likes:
            back.update(found[name])
        return back == expected

    def places(self) -> dict[str, dict[str, Any]]:
        tensors = {name: tensor for name, (_, tensor) in self._members.items()}
        if self._is_view:
            made = self._run(tensors, _in_place())
        elif any(tensor.is_meta for tensor in tensors.values()):
            made = self._likes
        else:
            computation = Computation(lambda: self._run(tensors, contextlib.nullcontext()))
            device = next(iter(tensors.values())).device
            made = {name: Computed(computation, name, like, device) for name, like in self._likes.items()}
        first, *others = self._members
        return {first: made, **{name: {} for name in others}}

    def _run(self, tensors: Mapping[str, Any], mode: Any) -> dict[str, Any]:
        # A conversion keeps what it collects: each run has one of its own.
        converter = copy.deepcopy(self._converter)
        for name, (pattern, _) in self._members.items():
            converter.add_tensor(self._first, name, pattern, tensors[name])
        with mode:
            made = converter.convert(self._first, model=self._model, config=self._model.config)
        return {self._way.renamed(name): one[0] if isinstance(one, list) else one for name, one in made.items()}


def _that_lead_back(model: Any, moves: list[_Move]) -> list[_Move]:
    """Those that a loader would undo."""
    entries: dict[str, tuple[int, ...]] = {}
    for move in moves:
        entries.update(move.entries())
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    found = leads_to(model, own, entries)
    renamings = renamings_of(model)
    return [move for move in moves if move.leads_back(found, renamings)]


def _module_of(name: str, packed: Collection[str]) -> str | None:
    """The packed module that a tensor belongs to."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path in packed:
            return path
    return None


def _memory(tensor: Any) -> int:
    """What tells memory from other memory, also where it holds nothing."""
    return int(tensor.untyped_storage()._cdata)


def _in_place() -> Any:
    """A context in which pieces of a tensor stay views of it: conversions bring each into one piece, and what
    reads them here takes them as they lie."""
    torch = require("torch", _PURPOSE)
    base: Any = require("torch.overrides", _PURPOSE).TorchFunctionMode

    class Views(base):  # type: ignore[misc]
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.Tensor.contiguous:
                return args[0]
            return function(*args, **(kwargs or {}))

    return Views()
