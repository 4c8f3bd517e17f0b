"""Rotary position embedding: what a reader is told of its base, its scaling and its factors.

A `config.json` says it in one of three ways: `rope_theta` with `rope_scaling`, `rope_parameters`,
or `rope_parameters` for each kind of attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from .text_files import object_at

DEFAULT_BASE = 10000.0

_YARN = {
    "extrapolation_factor": "yarn_ext_factor",
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}


@dataclass(frozen=True)
class Rotation:
    """`base` of the frequencies, and of layers with a sliding window where theirs differs, `kind`
    of scaling, and the `parameters` of the scaling."""

    base: float = DEFAULT_BASE
    sliding_base: float | None = None
    kind: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def metadata(self) -> list[tuple[str, str, Any]]:
        """The pairs that describe the scaling, without the name of the architecture."""
        if self.kind not in ("linear", "yarn"):
            return []
        pairs: list[tuple[str, str, Any]] = [
            ("rope.scaling.type", "str", self.kind),
            ("rope.scaling.factor", "f32", self._number("factor")),
        ]
        if self.kind == "yarn":
            length = int(self._number("original_max_position_embeddings"))
            pairs.append(("rope.scaling.original_context_length", "u32", length))
            pairs += [
                (f"rope.scaling.{key}", "f32", self._number(name))
                for name, key in _YARN.items()
                if self.parameters.get(name) is not None
            ]
        return pairs

    def factors(self, head_size: int) -> list[float] | None:
        """What each frequency is divided by, for the scaling of Llama 3; `None` for all others.

        High frequencies keep their value, low ones are divided by `factor`, and between the two
        bounds the divisor goes from one to the other. Computed in f32, in the
        order of torch 2.13 as llama.cpp's scripts call it.
        """
        if self.kind != "llama3":
            return None
        import numpy as np

        one = np.float32(1)
        factor = np.float32(self._number("factor", 8.0))
        low, high = self._number("low_freq_factor", 1.0), self._number("high_freq_factor", 4.0)
        length = self._number("original_max_position_embeddings", 8192)
        if not high > low > 0:
            raise CheckpointError(f"config.json: high_freq_factor {high} is not above low_freq_factor {low}")
        exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
        frequencies = one / np.power(self.base, exponents.astype(np.float64)).astype(np.float32)
        divisors = []
        # The peer divides a number by an array as it multiplies the array's reciprocal.
        for wavelength in (one / frequencies) * np.float32(2 * math.pi):
            if wavelength < length / high:
                divisors.append(1.0)
            elif wavelength > length / low:
                divisors.append(float(factor))
            else:
                smooth = ((one / wavelength) * np.float32(length) - np.float32(low)) / np.float32(high - low)
                divisors.append(float(one / ((one - smooth) / factor + smooth)))
        return divisors

    def _number(self, name: str, default: float | None = None) -> float:
        value = self.parameters.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0 or math.isinf(value):
            raise CheckpointError(f"config.json: rope scaling {self.kind} has {name} {value!r}, expected a number")
        return float(value)


def read_rotation(config: Mapping[str, Any]) -> tuple[Rotation, list[str]]:
    """What `config` says of the rotation, and warnings for the person.

    Raises `UnsupportedError` for a scaling that the reader does not have.
    """
    whole = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(whole, Mapping):
        raise CheckpointError("config.json: rope_parameters is not an object")
    sliding = whole.get("sliding_attention")
    parameters = object_at(whole.get("full_attention", {} if sliding is not None else whole), "rope_parameters")
    base = _base(parameters.get("rope_theta", config.get("rope_theta")))
    local = sliding.get("rope_theta") if isinstance(sliding, Mapping) else config.get("rope_local_base_freq")
    kind = str(parameters.get("rope_type", parameters.get("type")) or "default").lower()
    share = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share not in (None, 1, 1.0):
        raise UnsupportedError(f"partial_rotary_factor {share} has no place in the result's metadata")
    warnings = []
    if kind == "dynamic":
        warnings.append("llama.cpp does not scale positions dynamically: texts longer than the context differ")
    elif kind not in ("default", "linear", "yarn", "llama3"):
        raise UnsupportedError(f'rope scaling "{kind}" has no place in the result\'s metadata')
    if kind == "yarn" and parameters.get("original_max_position_embeddings") is None:
        length = config.get("original_max_position_embeddings", config.get("max_position_embeddings"))
        parameters = {**parameters, "original_max_position_embeddings": length}
    return Rotation(base, None if local is None else _base(local), kind, dict(parameters)), warnings


def _base(value: Any) -> float:
    if value is None:
        return DEFAULT_BASE
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0 or math.isinf(value):
        raise CheckpointError(f"config.json: rope_theta is {value!r}, expected a positive number")
    return float(value)
