"""Made-up models of a few rows each, whose types per recipe are compared with those of llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from weightpack import recipes, rules
from weightpack.decision import GgufChoices, Target
from weightpack.entry import Entry, Part
from weightpack.mapping import Facts
from weightpack.targets import FormatInfo

BLOCKS = {
    "f16": 1,
    "q4_0": 32,
    "q4_1": 32,
    "q5_0": 32,
    "q5_1": 32,
    "q8_0": 32,
    "iq4_nl": 32,
    "mxfp4": 32,
    "q1_0": 128,
    "q2_0": 64,
}
ROWS = 2


@dataclass(frozen=True)
class Model:
    """A model by its facts; tensors have as few rows as their kind allows."""

    architecture: str = "llama"
    layers: int = 8
    heads: int = 4
    heads_kv: int = 4
    experts: int = 0
    tied: bool = False
    columns: int = 256
    fused: bool = False

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all tensors."""
        matrix, vector = (ROWS, self.columns), (self.columns,)
        yield "token_embd.weight", matrix
        yield "output_norm.weight", vector
        if not self.tied:
            yield "output.weight", matrix
        for layer in range(self.layers):
            block = f"blk.{layer}"
            yield f"{block}.attn_norm.weight", vector
            names = ["attn_qkv"] if self.fused else ["attn_q", "attn_k", "attn_v"]
            for name in (*names, "attn_output"):
                yield f"{block}.{name}.weight", matrix
            yield f"{block}.ffn_norm.weight", vector
            if self.experts:
                yield f"{block}.ffn_gate_inp.weight", (self.experts, self.columns)
            for name in ("ffn_up", "ffn_gate", "ffn_down"):
                if self.experts:
                    yield f"{block}.{name}_exps.weight", (self.experts, *matrix)
                else:
                    yield f"{block}.{name}.weight", matrix

    @property
    def facts(self) -> Facts:
        """What recipes know of it."""
        return Facts(self.architecture, self.layers, self.heads // self.heads_kv, self.experts)


MODELS = {
    "llama": Model(),
    "llama tied": Model(tied=True),
    "llama shared values": Model(heads=8, heads_kv=2),
    "llama tied shared values": Model(heads=8, heads_kv=2, tied=True),
    "llama 33 layers": Model(layers=33, heads=8, heads_kv=4),
    "llama 70B": Model(layers=80, heads=8, heads_kv=1),
    "llama 8 experts": Model(experts=8, heads=8, heads_kv=2),
    "llama 4 experts": Model(experts=4),
    "llama rows of 288": Model(columns=288),
    "llama rows of 264": Model(columns=264),
    "falcon": Model("falcon", fused=True),
    "falcon 32 layers": Model("falcon", layers=32, fused=True, tied=True),
    "qwen2 80 layers": Model("qwen2", layers=80, tied=True),
    "gpt2": Model("gpt2", layers=12, fused=True),
}


def fits(name: str, shape: tuple[int, ...], params: object) -> str | None:
    """As the format table answers, from the sizes of ggml's blocks."""
    block = BLOCKS.get(name.removeprefix("gguf:"), 256)
    return f"row of {shape[-1]} weights is not a multiple of block_size {block}" if shape[-1] % block else None


def entry(name: str, shape: tuple[int, ...]) -> Entry:
    """A tensor that is stored in f16, vectors in f32."""
    stored, plain = ("F32", "f32") if len(shape) == 1 or "norm" in name or "gate_inp" in name else ("F16", "f16")
    weights = math.prod(shape)
    nbytes = weights * (4 if stored == "F32" else 2)
    return Entry(name, shape, stored, plain, nbytes, weights, (Part(name, stored, shape, nbytes),))


def types(model: Model, recipe: str, *, importance: bool) -> dict[str, str]:
    """The type of every tensor, as weightpack decides."""
    chosen = recipes.family(recipes.LLAMA).recipes[recipe]
    entries = [entry(name, shape) for name, shape in model.shapes()]
    vectors = frozenset(e.name for e in entries) if importance else None
    choices = GgufChoices(recipe=chosen, facts=model.facts, importance=vectors, from_gguf=True)
    row = FormatInfo(f"gguf:{recipe}", recipe, "gguf", "recipe", "", "", 4, "always")
    decided = rules.decide(entries, Target(row, "gguf", fits, gguf=choices))
    return {d.entry.name: d.result.removeprefix("gguf:") for d in decided.tensors}


def shortened(found: dict[str, str]) -> dict[str, str]:
    """The same, with the layers of one name and type in one row: `q_k:0-3,5`."""
    rows: dict[str, dict[str, list[int]]] = {}
    result: dict[str, str] = {}
    for name, kind in found.items():
        if not name.startswith("blk."):
            result[name] = kind
            continue
        _, layer, rest = name.split(".", 2)
        rows.setdefault(rest, {}).setdefault(kind, []).append(int(layer))
    for rest, kinds in sorted(rows.items()):
        parts = sorted(kinds.items(), key=lambda row: row[1])
        result[rest] = (
            "; ".join(f"{kind} {_ranges(layers)}" for kind, layers in parts) if len(parts) > 1 else parts[0][0]
        )
    return result


def _ranges(layers: list[int]) -> str:
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
