"""What each stored tensor becomes in the model, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..entry import Entry
from ..errors import CheckpointError
from .host import Host, Target
from .source import Weights


@dataclass
class Logical:
    """One logical tensor of a checkpoint.

    `parts` maps component to the engine's tensor and the number of the array in it; a tensor that is
    not packed, or that the engine decodes, has one engine tensor, `entry`, and no parts.
    """

    name: str
    entry: Entry | None = None
    parts: dict[str, tuple[Entry, int]] = field(default_factory=dict)

    @property
    def is_packed(self) -> bool:
        """Whether its components go to the quantizer as they are stored."""
        return bool(self.parts)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all components as they are stored."""
        if not self.parts:
            return 0 if self.entry is None else int(self.entry.nbytes)
        return sum(int(entry.parts[number].nbytes) for entry, number in self.parts.values())

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of the weights, where it is known before they are read."""
        return None if self.entry is None else self.entry.shape


@dataclass
class LoadingInfo:
    """What did not fit, by name in the model (`unexpected`: in the checkpoint).

    `mismatched` holds name, shape in the checkpoint and shape in the model. All of `missing` and
    `mismatched` were given first values; nothing is left without memory.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)


def group(weights: Weights, quantizer: Any) -> dict[str, Logical]:
    """The logical tensors of a checkpoint, in the order of its files.

    Where the quantizer's weights are packed already, the arrays that it takes for components of one
    weight are one. An array under the weight's own name is its main component then.
    """
    logical: dict[str, Logical] = {}
    if quantizer is None or not quantizer.pre_quantized:
        return {name: Logical(name, entry) for name, entry in weights.entries.items()}
    for name, entry in weights.entries.items():
        if (entry.format or "").startswith("gguf:") and not entry.is_plain:
            logical[name] = Logical(name, entry, {"": (entry, 0)})
            continue
        for number, part in enumerate(entry.parts):
            owner = quantizer.component_of(part.name)
            if owner is None:
                # A tensor that the engine knows as packed keeps its shape with its main component.
                found = logical.setdefault(part.name, Logical(part.name))
                found.entry = entry
                if found.parts or len(entry.parts) > 1:
                    found.parts[""] = (entry, number)
            else:
                parameter, component = owner
                found = logical.setdefault(parameter, Logical(parameter))
                if found.entry is not None and not found.parts and component != "":
                    found.parts[""] = (found.entry, 0)
                found.parts[component] = (entry, number)
    for tensor in logical.values():
        if tensor.is_packed and tensor.entry is not None and len(tensor.entry.parts) == 1:
            # The array's own shape is that of packed bytes.
            packed = (tensor.entry.format or "").startswith("gguf:")
            tensor.entry = tensor.entry if packed else None
    return logical


@dataclass
class Plan:
    """The targets to load, those of them that are packed, and what did not fit."""

    targets: list[Target]
    packed: set[str]
    info: LoadingInfo


def plan(
    host: Host,
    model: Any,
    logical: Mapping[str, Logical],
    state: Mapping[str, Any],
    shared: Mapping[str, Sequence[str]],
    *,
    ignore_mismatched_sizes: bool,
) -> Plan:
    """Which tensor goes where. `state` are the model's parameters and persistent buffers.

    Raises `CheckpointError` for two tensors that become one, and for shapes that differ unless
    `ignore_mismatched_sizes`.
    """
    keys = host.plan_keys(model, {name: tensor.shape or () for name, tensor in logical.items()})
    targets: dict[str, Target] = {}
    info = LoadingInfo()
    packed: set[str] = set()
    order = {name: number for number, name in enumerate(state)}
    first = {name: min((name, *others), key=order.__getitem__) for name, others in shared.items()}
    for target in keys.targets:
        if target.name not in state:
            info.unexpected += [name for name in target.sources if name not in keys.ignored]
            continue
        if target.name in first:
            # One tensor under several names goes to the first; where the file has several, so does the last.
            target = replace(target, name=first[target.name])
            targets.pop(target.name, None)
        if target.name in targets:
            raise CheckpointError(
                f'both "{targets[target.name].sources[0]}" and "{target.sources[0]}" are the weight "{target.name}"'
            )
        wanted = tuple(state[target.name].shape)
        tensor = logical[target.sources[0]]
        found = target.shape or (None if target.merge or target.rows else tensor.shape)
        if found is not None and found != wanted and not (tensor.is_packed and found == wanted[::-1]):
            info.mismatched.append((target.name, found, wanted))
            continue
        if tensor.is_packed:
            packed.add(target.name)
        elif target.merge is None and tensor.entry is not None:
            _check_kind(target.name, tensor.entry, state[target.name])
        targets[target.name] = target
    if info.mismatched and not ignore_mismatched_sizes:
        name, found, wanted = info.mismatched[0]
        more = f" (and {len(info.mismatched) - 1} more)" if len(info.mismatched) > 1 else ""
        raise CheckpointError(
            f'"{name}" has shape {list(found)} in the checkpoint, and {list(wanted)} in the model{more}',
            hint="ignore_mismatched_sizes=True gives such weights new values",
        )
    present = set(targets) | {other for name in targets for other in shared.get(name, ())}
    info.missing = [name for name in state if name not in present]
    return Plan(list(targets.values()), packed, info)


def _check_kind(name: str, entry: Entry, own: Any) -> None:
    """Whole numbers in the place of a weight are codes that lack what belongs to them."""
    if own.is_floating_point() and entry.format is None and entry.dtype.startswith(("I", "U", "BOOL")):
        raise CheckpointError(
            f'"{entry.name}" holds {entry.dtype}, and "{name}" of the model is a floating point weight',
            hint="a packed weight needs its statistics beside it, and a config.json that says how it is packed",
        )
