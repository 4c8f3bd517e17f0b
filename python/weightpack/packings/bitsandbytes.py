"""bitsandbytes: 4-bit or int8 weights, never both.

The section has the keys and values that transformers 5.23 and diffusers 0.42.1 write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ..decision import Decision, Target
from ..errors import ConfigError, UnsupportedError
from ..skip_list import settle
from .table import HostConfig, decoded, packed_of

__all__ = ["FORMATS", "METHODS", "describes", "host_config", "leftovers", "one_kind", "settle"]

METHODS = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
FORMATS = ("bitsandbytes:",)
_INT8 = "bitsandbytes:int8"
_STATISTICS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")


def one_kind(decisions: list[Decision], target: Target) -> list[Decision]:
    """One config describes 4-bit or 8-bit weights. What was packed before and is of the other kind
    is decoded; two kinds that were asked for are refused."""
    asked = {d.result == _INT8 for d in decisions if d.format.startswith("bitsandbytes:")}
    if len(asked) == 2:
        raise ConfigError("a bitsandbytes checkpoint holds either 4-bit or int8 weights, and both are assigned")
    if not asked:
        asked = {d.result == _INT8 for d in decisions if d.result.startswith("bitsandbytes:")}
        if len(asked) == 2:
            raise UnsupportedError("the checkpoint holds 4-bit and int8 weights at once, which no host loads")
    (is_int8,) = asked
    return decoded(decisions, target, lambda d: d.result.startswith("bitsandbytes:") and (d.result == _INT8) != is_int8)


def host_config(decisions: Sequence[Decision], skip_list: Sequence[str], compute: str, host: str | None) -> HostConfig:
    """The section, the same for all hosts; nothing else is needed."""
    packed = packed_of(decisions)
    is_int8 = packed[0].result == _INT8
    kinds = Counter(d.result.partition(":")[2] for d in packed)
    double = any(d.params.get("double_quant") or _is_double_quantized(d) for d in packed)
    section = {
        "_load_in_4bit": not is_int8,
        "_load_in_8bit": is_int8,
        "bnb_4bit_compute_dtype": "float32" if is_int8 else compute,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4" if is_int8 else kinds.most_common(1)[0][0],
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip_list),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": not is_int8,
        "load_in_8bit": is_int8,
        "quant_method": "bitsandbytes",
    }
    return HostConfig(section)


def leftovers(names: Iterable[str]) -> list[str]:
    """Statistics without their weight."""
    return [name for name in names if name.endswith(_STATISTICS) or ".quant_state.bitsandbytes__" in name]


def describes(key: str, value: str) -> bool:
    """Nothing is told by metadata."""
    return False


def _is_double_quantized(decision: Decision) -> bool:
    return decision.format == "copy" and any(p.name.endswith(".nested_absmax") for p in decision.entry.parts)
