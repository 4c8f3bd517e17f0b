"""A model on its way into a GGUF file: its tensors under the names of the result, what recipes and
importance vectors know of them, and how each is asked for from the engine.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import keymaps, recipes
from .architectures import NONE, find_architecture
from .assembly import joined, source_row
from .checkpoint import Checkpoint
from .decision import GGML_DIMENSIONS, Decision, GgufChoices
from .entry import Entry
from .errors import CheckpointError, UnsupportedError
from .folder import Model
from .gguf_metadata import gguf_metadata
from .gguf_rules import INSTEAD
from .importance import COUNTS, SUMS, Importance
from .mapping import ArchitecturePlan, Facts
from .targets import FormatInfo, format_table


@dataclass(frozen=True)
class GgufOptions:
    """What a person asked for, as far as it only concerns GGUF: see `weightpack.convert`."""

    arch: str | None = None
    fallback: str = "auto"
    importance: Importance | None = None
    weighted: bool = False
    requantize: bool = False


@dataclass(frozen=True)
class GgufModel:
    """One model on its way into GGUF.

    `entries` are its tensors as they are in the result, `choices` what the rules go by, `plan` the
    layout of its architecture (`None` where the names of the source are kept), `vectors` the names
    of importance vectors by those of tensors.
    """

    entries: Sequence[Entry]
    choices: GgufChoices
    plan: ArchitecturePlan | None = None
    vectors: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def output(
        self, decisions: Sequence[Decision], model: Model, name: str, number: int, others: Mapping[str, int]
    ) -> dict[str, Any]:
        """The part of a request that describes the file: its pairs and tensors. `number` is that of
        the model's checkpoint; `others` are those of further ones: "importance", with the vectors,
        and "generated", with what `generated` gives."""
        more = self.plan.metadata if self.plan is not None else ()
        recipe = self.choices.recipe
        pairs = gguf_metadata(decisions, model.config, name, more, recipe.file_type if recipe is not None else None)
        output: dict[str, Any] = {}
        if self.choices.from_gguf:
            output["metadata_from"] = number
            # The source's own pairs are carried over.
            pairs = [pair for pair in pairs if pair[0] not in ("general.architecture", "general.name")]
        output["metadata"] = [list(pair) for pair in pairs]
        output["tensors"] = [self.request(decision, number, others) for decision in decisions]
        output["max_dimensions"] = self.choices.most_dimensions
        return output

    def warnings_of(self, decisions: Sequence[Decision]) -> list[str]:
        """What a person should know of this model and of what was decided."""
        warnings = [*self.warnings, *_fallbacks(decisions)]
        if self.choices.importance is not None and not self.choices.weighted:
            packed = [d.entry.name for d in decisions if d.format.startswith("gguf:")]
            without = [name for name in packed if name not in self.vectors]
            if without:
                word = "tensor has" if len(without) == 1 else "tensors have"
                warnings.append(f'{len(without)} packed {word} no importance vector (first "{without[0]}")')
        return warnings

    def generated(self) -> bytes | None:
        """A safetensors file with the tensors whose values no source holds, if there are any."""
        computed = [tensor for tensor in self.choices.mapped.values() if tensor.values is not None]
        if not computed:
            return None
        header: dict[str, Any] = {}
        data = b""
        for tensor in computed:
            values = tensor.values or ()
            stored = struct.pack(f"<{len(values)}f", *values)
            offsets = [len(data), len(data) + len(stored)]
            header[tensor.name] = {"dtype": "F32", "shape": [len(values)], "data_offsets": offsets}
            data += stored
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    def request(self, decision: Decision, number: int, others: Mapping[str, int]) -> dict[str, Any]:
        """How the engine is asked for one tensor of checkpoint `number`."""
        name = decision.entry.name
        mapped = self.choices.mapped.get(name)
        if mapped is not None and mapped.values is not None:
            number, mapped = others["generated"], None
        row = source_row(decision, mapped, number)
        if decision.format.startswith("gguf:"):
            if name in self.vectors:
                vector = self.vectors[name]
                row["importance"] = {
                    "checkpoint": others["importance"],
                    "sums": f"{vector}{SUMS}",
                    "counts": f"{vector}{COUNTS}",
                }
            elif self.choices.weighted:
                row["importance"] = {"checkpoint": None}
        return row


def prepare(
    model: Model, checkpoint: Checkpoint, entries: Sequence[Entry], to: FormatInfo, options: GgufOptions
) -> GgufModel:
    """The model as `to` and `options` want it, before any tensor is decided.

    Raises `UnsupportedError` for tensors that have no place in the architecture, `ConfigError` for
    a recipe that does not fit it.
    """
    from_gguf = checkpoint.container == "gguf"
    known = checkpoint.metadata if from_gguf else {}
    stored = str(known.get("general.architecture", ""))
    arch = options.arch
    if from_gguf and arch is None:
        # The tensors of a GGUF file have the names of its architecture already.
        arch = stored if stored in keymaps.NAMES else NONE
    if model.component and arch not in (None, NONE):
        # Of a pipeline, one component is meant; the others are what they are.
        is_diffusers = model.config is not None and "_class_name" in model.config
        arch = arch if (arch in keymaps.NAMES) == is_diffusers else None
    architecture = find_architecture(arch, model.config, [entry.name for entry in entries])
    plan = None
    if architecture is not None:
        try:
            plan = architecture.plan(entries, model.config, model.folder)
        except (CheckpointError, UnsupportedError) as error:
            if options.arch is not None or error.hint is not None:
                raise
            raise type(error)(error.message, hint=f"--arch {NONE} keeps the names of the source") from error
    if plan is not None:
        by_name = {entry.name: entry for entry in entries}
        family, facts = plan.recipes, plan.facts
        entries = [joined(mapped, by_name) for mapped in plan.tensors]
    else:
        is_image = model.config is not None and "_class_name" in model.config
        family = recipes.IMAGE if is_image else recipes.LLAMA
        facts = _facts(model.config, known, stored, entries, recipes.family(family).kinds)
    vectors: dict[str, str] = {}
    warnings = list(plan.warnings) if plan is not None else []
    if plan is not None and plan.left_out:
        name, why = next(iter(plan.left_out.items()))
        count = len(plan.left_out)
        warnings.append(f"{count} tensor{'s are' if count > 1 else ' is'} not in the result: {name} ({why})")
    if options.importance is not None:
        vectors, more = options.importance.match(entries, recipes.family(family).kinds)
        warnings += more
    choices = GgufChoices(
        family,
        recipes.find_recipe(to, family),
        facts,
        options.fallback,
        {mapped.name: mapped for mapped in plan.tensors} if plan is not None else {},
        frozenset(vectors) if options.importance is not None else None,
        options.weighted,
        {row.name: row.encodes for row in format_table()},
        from_gguf,
        options.requantize,
        _most_dimensions(family, entries, from_gguf),
    )
    return GgufModel(entries, choices, plan, vectors, tuple(warnings))


def _most_dimensions(family: str, entries: Sequence[Entry], from_gguf: bool) -> int:
    """Readers of diffusion models take kernels of video convolutions as they are; those built on
    ggml take no more dimensions than it has."""
    most = max((len(entry.shape) for entry in entries), default=0)
    return max(most, GGML_DIMENSIONS) if family == recipes.IMAGE or from_gguf else GGML_DIMENSIONS


def _fallbacks(decisions: Sequence[Decision]) -> list[str]:
    fallen = [decision for decision in decisions if INSTEAD in decision.why]
    if not fallen:
        return []
    word = "tensor falls" if len(fallen) == 1 else "tensors fall"
    return [f'{len(fallen)} {word} back to another type (first "{fallen[0].entry.name}": {fallen[0].why})']


def _facts(
    config: Mapping[str, Any] | None,
    known: Mapping[str, Any],
    architecture: str,
    entries: Sequence[Entry],
    kinds: recipes.Kinds,
) -> Facts:
    """What recipes know of a model whose names are kept: from GGUF metadata, from `config.json`, or
    from the names of its tensors."""
    found = dict(config or {})
    for key in ("text_config", "llm_config"):
        if isinstance(found.get(key), Mapping):
            found.update(found[key])
    if architecture:
        found = {
            "num_hidden_layers": known.get(f"{architecture}.block_count"),
            "num_attention_heads": known.get(f"{architecture}.attention.head_count"),
            "num_key_value_heads": known.get(f"{architecture}.attention.head_count_kv"),
            "num_experts": known.get(f"{architecture}.expert_count"),
        }

    def number(*keys: str) -> int | None:
        for key in keys:
            value = found.get(key)
            if isinstance(value, list) and value:
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return None

    layers = number("num_hidden_layers", "n_layer", "num_layers")
    if layers is None:
        numbers = [layer for entry in entries if (layer := kinds.layer_of(entry.name)) is not None]
        layers = max(numbers, default=-1) + 1
    heads = number("num_attention_heads", "n_head")
    shared = number("num_key_value_heads", "n_head_kv")
    gqa = 1 if heads is None or shared is None else heads // shared if shared else 0
    experts = number("num_local_experts", "num_experts", "n_routed_experts") or 0
    return Facts(architecture or str((config or {}).get("model_type", "")), layers, gqa, experts)
