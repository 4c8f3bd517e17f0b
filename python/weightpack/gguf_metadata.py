"""The key-value pairs of a GGUF file that weightpack itself knows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .decision import Decision
from .model_config import main_dtype

FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "gguf:q4_0": 2,
    "gguf:q4_1": 3,
    "gguf:q8_0": 7,
    "gguf:q5_0": 8,
    "gguf:q5_1": 9,
    "gguf:q2_k": 10,
    "gguf:q3_k": 12,
    "gguf:q4_k": 15,
    "gguf:q5_k": 17,
    "gguf:q6_k": 18,
    "gguf:iq2_xxs": 19,
    "gguf:iq2_xs": 20,
    "gguf:iq3_xxs": 23,
    "gguf:iq1_s": 24,
    "gguf:iq4_nl": 25,
    "gguf:iq3_s": 26,
    "gguf:iq2_s": 28,
    "gguf:iq4_xs": 30,
    "gguf:iq1_m": 31,
    "bf16": 32,
    "gguf:tq1_0": 36,
    "gguf:tq2_0": 37,
    "gguf:mxfp4": 38,
    "gguf:nvfp4": 39,
    "gguf:q1_0": 40,
    "gguf:q2_0": 41,
}
"""`general.file_type` by the most common format (llama.cpp's `LLAMA_FTYPE_MOSTLY_*`; the K types
by their `_M` mixture, as gguf-py does)."""

QUANTIZATION_VERSION = 2
"""`general.quantization_version`: the layout of ggml's block types (`GGML_QNT_VERSION`)."""


def gguf_metadata(
    decisions: Sequence[Decision],
    config: Mapping[str, Any] | None,
    name: str,
    more: Sequence[tuple[str, str, Any]] = (),
    file_type: int | None = None,
) -> list[tuple[str, str, Any]]:
    """The key-value pairs of a new GGUF file: `(key, type, value)`.

    `more` are pairs of an architecture, which come before ours; `file_type` is that of a recipe.
    """
    results = Counter(d.result for d in decisions if len(d.entry.shape) > 1)
    packed = [kind for kind, _ in results.most_common() if kind.startswith("gguf:")]
    kinds = packed or [kind for kind, _ in results.most_common() if kind in FILE_TYPES]
    pairs: list[tuple[str, str, Any]] = [
        ("general.architecture", "str", architecture(config)),
        ("general.name", "str", name),
    ]
    if file_type is None and kinds:
        file_type = FILE_TYPES.get(kinds[0])
    if file_type is not None:
        pairs.append(("general.file_type", "u32", file_type))
    if packed:
        pairs.append(("general.quantization_version", "u32", QUANTIZATION_VERSION))
    source = main_dtype(d.entry for d in decisions)
    if source is not None:
        pairs.append(("weightpack.source_dtype", "str", source))
    given = {key for key, _, _ in more}
    return [*more, *(pair for pair in pairs if pair[0] not in given)]


def architecture(config: Mapping[str, Any] | None) -> str:
    """The name that GGUF readers know a model by: `model_type`, or the class name in snake case."""
    if config is None:
        return "unknown"
    if isinstance(config.get("model_type"), str):
        name = config["model_type"]
    else:
        name = str(config.get("_class_name", "unknown"))
        name = re.sub(r"(?<=[a-z])(?=[A-Z0-9])|(?<=[A-Z0-9])(?=[A-Z][a-z])", "_", name)
    return re.sub(r"[^a-z0-9_]", "_", name.lower()) or "unknown"
