"""FP8 weights with a scale for each block, as DeepSeek stores them and transformers' `FineGrainedFP8Config`
describes.

The section has the keys and values that transformers 5.23 writes. Weights with one scale for a row
(`FbgemmFp8Config`) or for the tensor, which other libraries store, are read, and never left in a result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..decision import Decision, Target
from ..skip_list import settle
from .table import HostConfig, decoded

__all__ = ["FORMATS", "METHODS", "describes", "host_config", "leftovers", "one_kind", "settle"]

METHODS = ("fp8", "fbgemm_fp8")
FORMATS = ("fp8:",)
_BLOCK = "fp8:block"
_ARRAYS = ("_scale_inv",)


def one_kind(decisions: list[Decision], target: Target) -> list[Decision]:
    """Everything is in blocks; what a source has otherwise is decoded."""
    return decoded(decisions, target, lambda d: d.result.startswith("fp8:") and d.result != _BLOCK)


def host_config(decisions: Sequence[Decision], skip_list: Sequence[str], compute: str, host: str | None) -> HostConfig:
    """The section; nothing else is needed."""
    return HostConfig(
        {
            "activation_scheme": "dynamic",
            "dequantize": False,
            "expert_dtype": "fp8",
            "modules_to_convert": None,
            "modules_to_not_convert": list(skip_list) or None,
            "quant_method": "fp8",
            "scale_fmt": "float",
            "weight_block_size": [128, 128],
        }
    )


def leftovers(names: Iterable[str]) -> list[str]:
    """Scales without a weight that is decoded."""
    return [name for name in names if name.endswith(_ARRAYS)]


def describes(key: str, value: str) -> bool:
    """Nothing is told by metadata."""
    return False
