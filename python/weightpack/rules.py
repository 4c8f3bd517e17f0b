"""Which tensor gets which format, and why. Pure: nothing is read or written here.

Patterns and recipes come first (see `weightpack.overrides`); where they are silent, the target
decides:

- **bitsandbytes** formats pack the weights of linear layers (see `weightpack.layers`); everything
  else is copied as it is stored.
- **GGUF** formats pack every matrix that multiplies (two-dimensional weights, embeddings and output
  layer included, and stacks of experts). Vectors and norms become f32. Convolutions, position
  embeddings, routers, and rows that a block does not divide stay in source precision.
- **Casts** (`bf16`, `f16`, `f32`) apply to every floating point tensor; packed ones are decoded,
  integers copied.

Nothing is ever left out of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .entry import FLOATS, Entry
from .errors import ConfigError, UnsupportedError
from .layers import LINEAR, Layers, classify, own_name
from .overrides import Overrides, Rule
from .skip_list import is_skipped, settle
from .targets import CASTS, COPY, FormatInfo

GGUF_INTEGERS = {"I8", "I16", "I32", "I64"}
GGUF_MOST_DIMENSIONS = 4
GGUF_LONGEST_NAME = 63

_FOUR_BIT = ("bitsandbytes:nf4", "bitsandbytes:fp4")
_NO_LAYER = Layers("names", None, False, {}, frozenset())


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one tensor: a full format name or "copy", its parameters, and the reason."""

    entry: Entry
    format: str
    why: str
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def result(self) -> str:
        """The format of the tensor in the output: for a copy, the format it has."""
        if self.format != COPY:
            return self.format
        return self.entry.format or FLOATS.get(self.entry.dtype, self.entry.dtype.lower())

    @property
    def is_packed(self) -> bool:
        """Whether the tensor is packed in the output."""
        return ":" in self.result


@dataclass(frozen=True)
class Decisions:
    """One decision per tensor, in the order of the checkpoint.

    `skip_list` are the module paths that a host must leave unpacked, `warnings` sentences for the
    person.
    """

    tensors: tuple[Decision, ...]
    skip_list: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """What is asked for.

    `format` is the row for `--to`, `container` "safetensors" or "gguf". `params` are the options of
    the format (`block_size`, `double_quant`). `plain` is the cast used where a packed tensor must
    be stored as plain numbers. `for_host` says that the result is a model folder which a host will
    load; `fits` gives the reason why a format cannot take a shape, or `None`.
    """

    format: FormatInfo
    container: str
    fits: Callable[[str, tuple[int, ...], Mapping[str, Any]], str | None]
    params: Mapping[str, Any] = field(default_factory=dict)
    plain: str = "bf16"
    for_host: bool = True


def decide(
    entries: Sequence[Entry],
    target: Target,
    overrides: Overrides | None = None,
    layers: Layers | None = None,
) -> Decisions:
    """One decision for each of `entries`.

    `layers` is needed by bitsandbytes formats only. Raises `UnsupportedError` for a tensor that the
    container cannot hold, `ConfigError` for an assignment that cannot be carried out.
    """
    overrides = overrides or Overrides()
    layers = layers or _NO_LAYER
    built_in = _built_in(target)
    decisions = []
    for entry in entries:
        rule = overrides.choose(entry.name)
        if rule is None:
            chosen = built_in(entry, target, layers)
        elif rule.format == COPY:
            chosen = _keep(entry, target, rule.why)
        else:
            chosen = _assigned(entry, target, rule, layers)
        if target.container == "gguf":
            _check_gguf(chosen)
        decisions.append(chosen)

    warnings = list(layers.warnings) if layers is not _NO_LAYER else []
    skip_list: list[str] = []
    if any(decision.result.startswith("bitsandbytes:") for decision in decisions):
        decisions = _one_kind(decisions, target)
        decisions, skip_list, more = _agree_with_host(decisions, target, layers)
        warnings += more
    warnings += overrides.unused()
    warnings += _doubts(decisions, target)
    return Decisions(tuple(decisions), tuple(skip_list), tuple(warnings))


def _built_in(target: Target) -> Callable[[Entry, Target, Layers], Decision]:
    if target.format.backend == "bitsandbytes":
        return _bitsandbytes
    if target.format.backend == "gguf":
        return _gguf
    if target.format.name in CASTS:
        return _cast
    raise UnsupportedError(f"there are no rules for format {target.format.name}")


def _bitsandbytes(entry: Entry, target: Target, layers: Layers) -> Decision:
    layer = layers.tensors.get(entry.name)
    if layer is None:
        layer = classify(entry, "")
    if layer.kind != LINEAR or len(entry.shape) != 2:
        return _keep(entry, target, layer.why if layer.kind != LINEAR else "not two-dimensional")
    return _pack(entry, target, target.format.name, layer.why)


def _gguf(entry: Entry, target: Target, layers: Layers) -> Decision:
    if not entry.is_float:
        return _keep(entry, target, "not floating point")
    module, _, leaf = entry.name.rpartition(".")
    name = own_name(module)
    if len(entry.shape) <= 1:
        return _as_float(entry, "f32", "norm, bias or other vector")
    if "norm" in name and name != "linear" and len(entry.shape) == 2 and leaf == "weight":
        return _as_float(entry, "f32", "norm")
    if leaf == "bias":
        return _as_float(entry, "f32", "bias")
    if len(entry.shape) > 3 or (len(entry.shape) == 3 and "expert" not in entry.name):
        return _keep(entry, target, "convolution" if len(entry.shape) > 3 or "conv" in name else "not a matrix")
    if leaf != "weight" and "expert" not in entry.name:
        return _keep(entry, target, "not the weight of a layer")
    if "conv" in name:
        return _keep(entry, target, "convolution")
    if "position" in name or name == "wpe" or "relative_attention_bias" in name or "token_type" in name:
        return _keep(entry, target, "position or type embedding, which is looked up and never multiplied")
    if name in ("gate", "router", "shared_expert_gate"):
        return _keep(entry, target, "router of experts")
    return _pack(entry, target, target.format.name, "embedding" if "emb" in name else "matrix")


def _cast(entry: Entry, target: Target, layers: Layers) -> Decision:
    if not entry.is_float:
        if entry.format is None and not entry.is_plain:
            raise _no_decoder(entry)
        if entry.dtype.startswith(("F8", "F6", "F4", "type")) or entry.dtype in ("C64",):
            raise _no_decoder(entry)
        return _keep(entry, target, "not floating point")
    return _as_float(entry, target.format.name, "cast" if entry.is_plain else "decoded")


def _assigned(entry: Entry, target: Target, rule: Rule, layers: Layers) -> Decision:
    name = rule.format
    if not entry.is_float:
        raise ConfigError(
            f'{rule.origin}: tensor "{entry.name}" holds {entry.dtype}, which {name} does not encode',
            hint="write a pattern that leaves it out",
        )
    if name in CASTS:
        return _as_float(entry, name, rule.why)
    backend = name.partition(":")[0]
    if (backend == "gguf") != (target.container == "gguf"):
        raise ConfigError(f"{rule.origin}: a {target.container} file cannot hold {name}")
    if backend == "bitsandbytes" and target.for_host and layers.exact:
        why = _refused_by_host(entry, layers)
        if why is not None:
            raise ConfigError(
                f'{rule.origin}: {layers.host} cannot load tensor "{entry.name}" packed: {why}',
                hint="write a pattern that leaves it out",
            )
    reason = target.fits(name, entry.shape, _params_for(name, target))
    if reason is not None:
        raise ConfigError(f'{rule.origin}: tensor "{entry.name}": {reason}')
    return _pack(entry, target, name, rule.why)


def _refused_by_host(entry: Entry, layers: Layers) -> str | None:
    layer = layers.tensors.get(entry.name)
    if layer is None:
        return "it is not a parameter of the model class"
    if layer.kind == LINEAR:
        return None
    if layer.kind == "skipped":
        # A list that leaves the layer out lifts the host's default, but not what is fixed in the class.
        fixed = is_skipped(layers.host, layers.fixed, layer.module)
        return layer.why if fixed or layer.why.startswith("tied") else None
    return layer.why


def _pack(entry: Entry, target: Target, name: str, why: str) -> Decision:
    if not entry.is_float:
        return _keep(entry, target, f"stored as {entry.dtype}, which is not decoded")
    if entry.weights == 0:
        return _keep(entry, target, "empty")
    params = _params_for(name, target)
    if entry.format == name and not any(params.values()):
        return Decision(entry, COPY, f"{why}, packed already")
    reason = target.fits(name, entry.shape, params)
    if reason is not None:
        return _keep(entry, target, reason)
    return Decision(entry, name, why if entry.is_plain else f"{why}, decoded from {entry.format}", params)


def _params_for(name: str, target: Target) -> Mapping[str, Any]:
    return target.params if name in _FOUR_BIT else {}


def _as_float(entry: Entry, name: str, why: str) -> Decision:
    if entry.is_plain and FLOATS[entry.dtype] == name:
        return Decision(entry, COPY, why if why != "cast" else f"{name} already")
    return Decision(entry, name, why)


def _keep(entry: Entry, target: Target, why: str) -> Decision:
    """The tensor in source precision: its bytes, unless the container cannot hold them."""
    if entry.is_plain:
        return Decision(entry, COPY, why)
    if entry.format is None:
        raise _no_decoder(entry)
    backend = entry.format.partition(":")[0]
    if backend == "gguf" and target.container == "gguf":
        return Decision(entry, COPY, why)
    if backend == "bitsandbytes" and target.container == "safetensors":
        return Decision(entry, COPY, why)
    plain = target.plain if backend == "gguf" else FLOATS.get(entry.dtype, target.plain)
    return Decision(entry, plain, f"{why}; decoded from {entry.format}")


def _no_decoder(entry: Entry) -> UnsupportedError:
    return UnsupportedError(f'{entry.dtype} is not decoded by this version (tensor "{entry.name}")')


def _check_gguf(decision: Decision) -> None:
    entry = decision.entry
    if len(entry.shape) > GGUF_MOST_DIMENSIONS:
        raise UnsupportedError(
            f"GGUF holds tensors of at most {GGUF_MOST_DIMENSIONS} dimensions, got {len(entry.shape)} "
            f'(tensor "{entry.name}", shape {list(entry.shape)})',
            hint="convert to a safetensors format",
        )
    plain = decision.format == COPY and entry.is_plain
    if plain and not entry.is_float and entry.dtype not in GGUF_INTEGERS:
        raise UnsupportedError(
            f'GGUF has no type for {entry.dtype} (tensor "{entry.name}")', hint="convert to a safetensors format"
        )


def _one_kind(decisions: list[Decision], target: Target) -> list[Decision]:
    """One config describes 4-bit or 8-bit weights. What was packed before and is of the other kind
    is decoded; two kinds that were asked for are refused."""
    asked = {d.result == "bitsandbytes:int8" for d in decisions if d.format.startswith("bitsandbytes:")}
    if len(asked) == 2:
        raise ConfigError("a bitsandbytes checkpoint holds either 4-bit or int8 weights, and both are assigned")
    if not asked:
        asked = {d.result == "bitsandbytes:int8" for d in decisions if d.result.startswith("bitsandbytes:")}
        if len(asked) == 2:
            raise UnsupportedError("the checkpoint holds 4-bit and int8 weights at once, which no host loads")
    (is_int8,) = asked
    settled = []
    for decision in decisions:
        if decision.result.startswith("bitsandbytes:") and (decision.result == "bitsandbytes:int8") != is_int8:
            plain = FLOATS.get(decision.entry.dtype, target.plain)
            decision = replace(decision, format=plain, params={}, why=f"{decision.why}; decoded")
        settled.append(decision)
    return settled


def _agree_with_host(
    decisions: list[Decision], target: Target, layers: Layers
) -> tuple[list[Decision], list[str], list[str]]:
    """Leaves unpacked what the host's reading of the skip list also hits."""
    if not target.for_host:
        return decisions, [], []
    modules = {d.entry.name: _module(d.entry, layers) for d in decisions}
    packed = {modules[d.entry.name] for d in decisions if d.result.startswith("bitsandbytes:")}
    kept = set(layers.linears) - packed
    skip_list, caught = settle(layers.host, packed, kept, fixed=layers.fixed, prefix=layers.prefix)
    if not caught:
        return decisions, skip_list, []
    host = layers.host or "a host"
    settled = []
    for decision in decisions:
        entry = caught.get(modules[decision.entry.name])
        if entry is not None and decision.result.startswith("bitsandbytes:"):
            why = f'{host} reads "{entry}" in the skip list as this layer too'
            plain = COPY if decision.entry.is_plain else FLOATS.get(decision.entry.dtype, target.plain)
            decision = replace(decision, format=plain, params={}, why=why)
        settled.append(decision)
    word = "layer is" if len(caught) == 1 else "layers are"
    return settled, skip_list, [f"{len(caught)} more {word} left unpacked, because of how {host} reads skip lists"]


def _module(entry: Entry, layers: Layers) -> str:
    layer = layers.tensors.get(entry.name)
    return layer.module if layer is not None else entry.name.rpartition(".")[0]


def _doubts(decisions: Iterable[Decision], target: Target) -> list[str]:
    decisions = list(decisions)
    doubts = []
    twice = sum(1 for d in decisions if ":" in d.format and not d.entry.is_plain)
    if twice:
        doubts.append(f"{twice} tensors are packed already, and lose precision a second time")
    if target.container == "gguf":
        long = [d for d in decisions if len(d.entry.name.encode()) > GGUF_LONGEST_NAME]
        if long:
            doubts.append(
                f"{len(long)} tensor names are longer than {GGUF_LONGEST_NAME} bytes, which llama.cpp does not read "
                f'(first "{long[0].entry.name}")'
            )
    return doubts
