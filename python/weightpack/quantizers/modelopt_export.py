"""Checkpoints that ModelOpt exported for vLLM, TensorRT-LLM and SGLang: read and run without ModelOpt.

`quant_method` is `modelopt` as for its layers, the keys of the section are others: `quant_algo`,
`config_groups`, `ignore`. Older exports have it in `hf_quant_config.json` alone. What a weight is packed
as is told by its arrays, so that mixed checkpoints need nothing special:

| `weight` | `weight_scale` | packed as |
|---|---|---|
| F8_E4M3 [N, K] | F32: one, one a row, or one a block [N/b, 1, K/b, 1] | FP8 |
| F8_E4M3 [N, K] | U8 [N, K/32] | MXFP8 |
| U8 [N, K/2] | F8_E4M3 [N, K/b], and `weight_scale_2` F32 | NVFP4 |
| U8 [N, K/2] | U8 [N, K/32] | MXFP4 |
| U8 [N/2, K] | F32 [N, K/b] | INT4 (AWQ) |
| I8 [N, K] | F32: one, or one a row | INT8 |

`pre_quant_scale` [K] multiplies the layer's input. `input_scale` is the range of activations: FP8 layers
use it for products in FP8 on a CUDA device of capability 8.9 or later; everywhere else, and in all other
layers, weights are decoded and activations stay as they are, which is closer to the unpacked model.
The scales of a packed key-value cache are kept, and the cache itself is not packed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ConfigError
from .base import Exported, Quantizer
from .config import QuantizationConfig, names_of
from .dtypes import torch_dtype
from .modelopt_entries import refuse_bare_codes

ALGORITHMS = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4",
    "W4A8_NVFP4_FP8", "MXFP4", "W4A8_MXFP4_FP8", "W4A16_AWQ", "W4A8_AWQ", "W8A16", "W8A8_SQ_PER_CHANNEL",
    "MIXED_PRECISION",
)  # fmt: skip
COMPONENTS = ("weight_scale_2", "weight_scale", "input_scale", "pre_quant_scale", "k_scale", "v_scale", "output_scale")


@dataclass(frozen=True)
class ModelOptExportConfig(QuantizationConfig):
    """The section of an exported checkpoint, key by key; what this class does not know is in `other`.

    `ignore` names what is not packed (`exclude_modules` in `hf_quant_config.json`). The arrays of the
    checkpoint decide, and the list is for reading. Raises `ConfigError` for an unknown `quant_algo`.
    """

    quant_method = "modelopt"
    ALIASES: ClassVar[Mapping[str, str]] = {"exclude_modules": "ignore"}

    quant_algo: str | None = None
    ignore: tuple[str, ...] | None = None
    config_groups: Mapping[str, Any] | None = None
    quantized_layers: Mapping[str, Any] | None = None
    group_size: int | None = None
    has_zero_point: bool | None = None
    pre_quant_scale: bool | None = None
    kv_cache_quant_algo: str | None = None
    kv_cache_scheme: Mapping[str, Any] | None = None
    producer: Mapping[str, Any] | None = None
    other: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.quant_algo is not None and str(self.quant_algo).upper() not in ALGORITHMS:
            raise ConfigError(f"quant_algo {self.quant_algo!r} is none of {', '.join(ALGORITHMS)}")
        if self.has_zero_point:
            raise ConfigError("has_zero_point is True, and weights with zero points have no form of ModelOpt's")
        self._set("ignore", names_of(self.ignore, "ignore"))

    @property
    def quantizer_name(self) -> str:
        return "modelopt_export"

    def to_dict(self) -> dict[str, Any]:
        """The section as it was read, without empty keys."""
        fields = {key: value for key, value in super().to_dict().items() if value is not None and key != "other"}
        return {**(self.other or {}), **fields}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: nothing has a default."""
        return self.to_dict()

    @classmethod
    def from_file_beside(cls, content: Any) -> ModelOptExportConfig:
        """The config of `hf_quant_config.json`. Raises `ConfigError` for what is none."""
        if not isinstance(content, Mapping) or not isinstance(content.get("quantization"), Mapping):
            raise ConfigError('hf_quant_config.json has no section "quantization"')
        found: ModelOptExportConfig = cls.from_dict(content)
        return found

    @classmethod
    def _read(cls, config_dict: Mapping[str, Any]) -> dict[str, Any]:
        section = dict(config_dict)
        inner = section.pop("quantization", None)
        if isinstance(inner, Mapping):
            section |= inner
        known = {"other", "quant_method", *cls.__dataclass_fields__, *cls.ALIASES}
        other = {key: value for key, value in section.items() if key not in known}
        found = super()._read({key: value for key, value in section.items() if key not in other})
        return {**found, "other": {**(found.get("other") or {}), **other} or None}


class ModelOptExportQuantizer(Quantizer):
    """Puts layers in place that keep the exported bytes, and decode them where they run."""

    name = "modelopt_export"
    is_serializable = True
    is_trainable = True
    config: ModelOptExportConfig

    def validate_environment(self, *, torch_dtype: Any = None, device_map: Any = None) -> None:
        super().validate_environment(torch_dtype=torch_dtype, device_map=device_map)
        if not self.pre_quantized:
            raise ConfigError(
                "a config with quant_algo describes a checkpoint that is packed already",
                hint='NVIDIAModelOptConfig(quant_type="FP8") packs one while it is loaded',
            )

    def preprocess_model(
        self,
        model: Any,
        *,
        skip: Iterable[str] = (),
        keep_in_fp32: Iterable[str] = (),
        packed: Collection[str] | None = None,
    ) -> None:
        refuse_bare_codes(getattr(self, "entries", {}), packed or ())
        super().preprocess_model(model, skip=skip, keep_in_fp32=keep_in_fp32, packed=packed or ())

    def replace_layer(self, path: str, module: Any) -> Any:
        from .modelopt_linear import PackedLinear

        return PackedLinear(module.in_features, module.out_features, bias=module.bias is not None)

    def component_of(self, key: str) -> tuple[str, str] | None:
        path, _, leaf = key.rpartition(".")
        return (f"{path}.weight", leaf) if path and leaf in COMPONENTS else None

    def create_quantized_param(self, model: Any, name: str, value: Any, *, device: Any, dtype: Any = None) -> None:
        layer = model.get_submodule(name.rpartition(".")[0])
        layer.install(value if isinstance(value, Mapping) else {"": value}, device=device, dtype=dtype, name=name)

    def beside(self, model: Any) -> Mapping[str, str]:
        """`hf_quant_config.json`, which TensorRT-LLM reads."""
        from . import modelopt_unified

        layers = {path: model.get_submodule(path) for path in self.quantized}
        file = modelopt_unified.file_of(self.config, layers)
        return {modelopt_unified.FILE: json.dumps(file, indent=4) + "\n"}

    def exported(self, model: Any, form: str, skeleton: Callable[[], Any]) -> Exported:
        """`unified` is what it has anyway."""
        if form != "unified":
            return super().exported(model, form, skeleton)
        return Exported(self.stored_state(model)[0], self.config.to_dict(), self.beside(model))

    def dequantize(self, model: Any, *, dtype: Any = None) -> Any:
        from .modules import replace_layers

        wanted = None if dtype is None else torch_dtype(dtype)

        replace_layers(model, lambda path, layer: layer.plain(wanted) if path in self.quantized else None)
        self.quantized = {}
        return model
