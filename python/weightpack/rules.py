"""Which tensor gets which format, and why. Pure: nothing is read or written here.

Patterns and recipes come first (see `weightpack.overrides`); where they are silent, the target
decides:

- Formats of **bitsandbytes**, **torchao** and **quanto** (`weightpack.packings`) pack the weights of linear layers (see
  `weightpack.layers`); everything else is copied as it is stored.
- **GGUF** types and recipes pack every matrix that multiplies (two-dimensional weights, embeddings
  and output layer included, and stacks of experts); see `weightpack.gguf_rules`.
- **Casts** (`bf16`, `f16`, `f32`) apply to every floating point tensor; packed ones are decoded,
  integers copied. In a GGUF file of an architecture, what its readers only take as f32 is f32.

Nothing is ever left out of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from . import gguf_rules
from .decision import Decision, Decisions, Target, as_float, keep, no_decoder, pack, params_for
from .entry import FLOATS, Entry
from .errors import ConfigError, UnsupportedError
from .layers import LINEAR, Layers, classify
from .overrides import Overrides, Rule
from .packings.table import backend_of, engine_packing, packing
from .skip_list import is_skipped
from .targets import CASTS, COPY

GGUF_INTEGERS = {"I8", "I16", "I32", "I64"}
GGUF_LONGEST_NAME = 63

_NO_LAYER = Layers("names", None, False, {}, frozenset())


def decide(
    entries: Sequence[Entry],
    target: Target,
    overrides: Overrides | None = None,
    layers: Layers | None = None,
) -> Decisions:
    """One decision for each of `entries`.

    `layers` is needed by formats that pack linear layers only. Raises `UnsupportedError` for a tensor that the
    container cannot hold, `ConfigError` for an assignment that cannot be carried out.
    """
    overrides = overrides or Overrides()
    layers = layers or _NO_LAYER
    built_in = _built_in(entries, target, layers)
    decisions = []
    for entry in entries:
        rule = overrides.choose(entry.name, _sources(entry, target))
        if rule is None:
            chosen = built_in(entry)
        elif rule.format == COPY:
            chosen = keep(entry, target, rule.why)
        else:
            chosen = _assigned(entry, target, rule, layers)
        if target.container == "gguf":
            _check_gguf(chosen, target.gguf.most_dimensions)
        decisions.append(chosen)

    warnings = list(layers.warnings) if layers is not _NO_LAYER else []
    skip_list: list[str] = []
    backends = sorted({backend for d in decisions if (backend := backend_of(d.result)) is not None})
    if len(backends) > 1:
        raise ConfigError(f"one checkpoint is packed for one backend, and these are {' and '.join(backends)}")
    if backends:
        decisions = packing(backends[0]).one_kind(decisions, target)
        decisions, skip_list, more = _agree_with_host(decisions, target, layers, backends[0])
        warnings += more
    warnings += overrides.unused()
    warnings += _doubts(decisions, target)
    return Decisions(tuple(decisions), tuple(skip_list), tuple(warnings))


def _sources(entry: Entry, target: Target) -> list[str]:
    """The names that a tensor of an architecture has in the source."""
    mapped = target.gguf.mapped.get(entry.name)
    return [] if mapped is None else [rows.name for rows in mapped.sources]


def _built_in(entries: Sequence[Entry], target: Target, layers: Layers) -> Callable[[Entry], Decision]:
    if backend_of(target.format.name) is not None:
        return lambda entry: _linear(entry, target, layers)
    if target.format.backend == "gguf":
        return gguf_rules.built_in(entries, target)
    if target.format.name in CASTS:
        return lambda entry: _cast(entry, target)
    raise UnsupportedError(f"there are no rules for format {target.format.name}")


def _refuse_codes(entry: Entry) -> None:
    """Packed weights whose packing is not known look like integers, and mean nothing as such."""
    if entry.is_plain and entry.dtype in ("U8", "I8") and entry.name.rpartition(".")[2] == "weight":
        raise no_decoder(entry)


def _linear(entry: Entry, target: Target, layers: Layers) -> Decision:
    _refuse_codes(entry)
    layer = layers.tensors.get(entry.name)
    if layer is None:
        layer = classify(entry, "")
    if layer.kind != LINEAR or len(entry.shape) != 2:
        return keep(entry, target, layer.why if layer.kind != LINEAR else "not two-dimensional")
    how = engine_packing(target.format.backend)
    if how is not None and any(how.leaves(path) for path in (layer.module, entry.name.rpartition(".")[0])):
        return keep(entry, target, f"{target.format.backend} leaves such layers as they are")
    return pack(entry, target, target.format.name, layer.why)


def _cast(entry: Entry, target: Target) -> Decision:
    _refuse_codes(entry)
    if not entry.is_float:
        if entry.format is None and not entry.is_plain:
            raise no_decoder(entry)
        if entry.dtype.startswith(("F8", "F6", "F4", "type")) or entry.dtype in ("C64",):
            raise no_decoder(entry)
        return keep(entry, target, "not floating point")
    mapped = target.gguf.mapped.get(entry.name)
    if mapped is not None and mapped.plain:
        # Readers of an architecture take these in one type only.
        return as_float(entry, mapped.plain, mapped.keep)
    return as_float(entry, target.format.name, "cast" if entry.is_plain else "decoded")


def _assigned(entry: Entry, target: Target, rule: Rule, layers: Layers) -> Decision:
    name = rule.format
    if not entry.is_float:
        raise ConfigError(
            f'{rule.origin}: tensor "{entry.name}" holds {entry.dtype}, which {name} does not encode',
            hint="write a pattern that leaves it out",
        )
    if name in CASTS:
        return as_float(entry, name, rule.why)
    backend = name.partition(":")[0]
    if (backend == "gguf") != (target.container == "gguf"):
        raise ConfigError(f"{rule.origin}: a {target.container} file cannot hold {name}")
    if backend_of(name) is not None and target.for_host and layers.exact:
        why = _refused_by_host(entry, layers)
        if why is not None:
            raise ConfigError(
                f'{rule.origin}: {layers.host} cannot load tensor "{entry.name}" packed: {why}',
                hint="write a pattern that leaves it out",
            )
    reason = target.fits(name, entry.shape, params_for(entry, name, target))
    if reason is not None:
        raise ConfigError(f'{rule.origin}: tensor "{entry.name}": {reason}')
    if backend == "gguf":
        return gguf_rules.packed(entry, target, name, rule.why)
    return pack(entry, target, name, rule.why)


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


def _check_gguf(decision: Decision, most: int) -> None:
    entry = decision.entry
    if len(entry.shape) > most:
        raise UnsupportedError(
            f"GGUF holds tensors of at most {most} dimensions, got {len(entry.shape)} "
            f'(tensor "{entry.name}", shape {list(entry.shape)})',
            hint="convert to a safetensors format",
        )
    plain = decision.format == COPY and entry.is_plain
    if plain and not entry.is_float and entry.dtype not in GGUF_INTEGERS:
        raise UnsupportedError(
            f'GGUF has no type for {entry.dtype} (tensor "{entry.name}")', hint="convert to a safetensors format"
        )


def _agree_with_host(
    decisions: list[Decision], target: Target, layers: Layers, backend: str
) -> tuple[list[Decision], list[str], list[str]]:
    """Leaves unpacked what the host's reading of the skip list also hits."""
    if not target.for_host:
        return decisions, [], []
    modules = {d.entry.name: _module(d.entry, layers) for d in decisions}
    kept = set(layers.linears)
    if engine_packing(backend) is not None:
        # Layers without a tensor of their own are those that are tied.
        kept -= set(modules.values())
        modules = {d.entry.name: d.entry.name.rpartition(".")[0] for d in decisions}
        kept |= {modules[d.entry.name] for d in decisions if _is_matrix(d.entry)}
    packed = {modules[d.entry.name] for d in decisions if backend_of(d.result) is not None}
    kept -= packed
    skip_list, caught = packing(backend).settle(layers.host, packed, kept, fixed=layers.fixed, prefix=layers.prefix)
    if not caught:
        return decisions, skip_list, []
    host = layers.host or "a host"
    settled = []
    for decision in decisions:
        entry = caught.get(modules[decision.entry.name])
        if entry is not None and backend_of(decision.result) is not None:
            why = f'{host} reads "{entry}" in the skip list as this layer too'
            plain = COPY if decision.entry.is_plain else FLOATS.get(decision.entry.dtype, target.plain)
            decision = replace(decision, format=plain, params={}, why=why)
        settled.append(decision)
    word = "layer is" if len(caught) == 1 else "layers are"
    return settled, skip_list, [f"{len(caught)} more {word} left unpacked, because of how {host} reads skip lists"]


def _is_matrix(entry: Entry) -> bool:
    return len(entry.shape) > 1 and entry.name.endswith(".weight")


def _module(entry: Entry, layers: Layers) -> str:
    layer = layers.tensors.get(entry.name)
    return layer.module if layer is not None else entry.name.rpartition(".")[0]


def _is_same(decision: Decision) -> bool:
    """Whether the tensor is packed anew with nothing lost: MXFP4 is the same numbers in every layout."""
    return all((name or "").endswith(":mxfp4") for name in (decision.format, decision.entry.format))


def _doubts(decisions: Iterable[Decision], target: Target) -> list[str]:
    decisions = list(decisions)
    doubts = []
    twice = sum(1 for d in decisions if ":" in d.format and not d.entry.is_plain and not _is_same(d))
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
