"""bitsandbytes: weights of 4 bits (NF4, FP4) and of 8 (LLM.int8).

One config for both, with the fields that transformers and diffusers know, and one quantizer each.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, ClassVar

from .._lazy import require
from ..errors import ConfigError, FormatError
from ..placement import DISK, Placement
from .base import Packing, Quantizer, Requirement
from .config import QuantizationConfig, QuantizationMethod, flag, names_of, one_of
from .dtypes import dtype_name, stored_name, torch_dtype
from .modules import owner, replace_layers

QUANT_TYPES = ("fp4", "nf4")
STORAGE_TYPES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
COMPUTE_TYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class BitsAndBytesConfig(QuantizationConfig):
    """How bitsandbytes packs and runs weights; exactly one of `load_in_4bit` and `load_in_8bit` is true.

    | field | says |
    |---|---|
    | `llm_int8_threshold` | 8 bit: activations from this magnitude on are multiplied in full precision |
    | `llm_int8_skip_modules` | both: modules that are left as they are, see `weightpack.matcher` |
    | `llm_int8_enable_fp32_cpu_offload` | both: what a mixed `device_map` puts on the CPU or disk is not packed |
    | `llm_int8_has_fp16_weight` | 8 bit: weights stay in 16 bits and are packed in each forward |
    | `bnb_4bit_compute_dtype` | 4 bit: type of the products, float32, float16 or bfloat16 |
    | `bnb_4bit_quant_type` | 4 bit: `fp4` or `nf4` |
    | `bnb_4bit_use_double_quant` | 4 bit: scales are packed as well |
    | `bnb_4bit_quant_storage` | 4 bit: element type that the packed bytes are held as |

    Types are given as a name or a `torch.dtype`. Raises `ConfigError` for anything else.
    """

    quant_method: ClassVar[str] = QuantizationMethod.BITS_AND_BYTES.value

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: tuple[str, ...] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: Any = "float32"
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: Any = "uint8"

    def __post_init__(self) -> None:
        for field in _FLAGS:
            flag(getattr(self, field), field)
        if self.load_in_4bit == self.load_in_8bit:
            both = "both set" if self.load_in_4bit else "neither set"
            raise ConfigError(f"load_in_4bit and load_in_8bit are {both}, expected one of them")
        threshold = self.llm_int8_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < math.inf:
            raise ConfigError(f"llm_int8_threshold {threshold!r} is not a number from 0 on")
        self._set("llm_int8_threshold", float(threshold))
        self._set("llm_int8_skip_modules", names_of(self.llm_int8_skip_modules, "llm_int8_skip_modules"))
        one_of(self.bnb_4bit_quant_type, QUANT_TYPES, "bnb_4bit_quant_type")
        for field, default, choices in (
            ("bnb_4bit_compute_dtype", "float32", COMPUTE_TYPES),
            ("bnb_4bit_quant_storage", "uint8", STORAGE_TYPES),
        ):
            value = getattr(self, field)
            self._set(field, one_of(dtype_name(default if value is None else value, field), choices, field))

    @property
    def quantizer_name(self) -> str:
        """`bitsandbytes_4bit` or `bitsandbytes_8bit`."""
        return "bitsandbytes_4bit" if self.load_in_4bit else "bitsandbytes_8bit"

    @property
    def skip_list(self) -> tuple[str, ...]:
        """`llm_int8_skip_modules`, for both widths."""
        return self.llm_int8_skip_modules or ()

    def is_quantizable(self) -> bool:
        """True: a config that packs nothing cannot be made."""
        return self.load_in_4bit or self.load_in_8bit

    def quantization_method(self) -> str:
        """`nf4`, `fp4` or `llm_int8`, as the hosts call them."""
        return self.bnb_4bit_quant_type if self.load_in_4bit else "llm_int8"

    def with_loading_choices(self, given: Any) -> BitsAndBytesConfig:
        """What a caller may still choose for a packed model: the type of the products, where it is not left at
        its default, and whether modules may be offloaded."""
        compute = given.bnb_4bit_compute_dtype
        return replace(
            self,
            llm_int8_enable_fp32_cpu_offload=given.llm_int8_enable_fp32_cpu_offload,
            bnb_4bit_compute_dtype=self.bnb_4bit_compute_dtype if compute == "float32" else compute,
        )


_FLAGS = (
    "load_in_4bit",
    "load_in_8bit",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "bnb_4bit_use_double_quant",
)


class _BitsAndBytesQuantizer(Quantizer):
    """What both widths have in common: which layers, which devices."""

    config: BitsAndBytesConfig
    requirements: ClassVar[tuple[Requirement, ...]] = (
        Requirement("torch", "2.4", "run bitsandbytes weights"),
        Requirement("accelerate", "0.26.0", "place bitsandbytes weights"),
        Requirement("bitsandbytes", "0.46.1", "run bitsandbytes weights"),
    )
    is_serializable = True
    is_trainable = True

    casts_before_packing: bool = True
    """Whether weights are rounded to the model's own type before they are packed, as both hosts do; otherwise
    they are packed from the type they are stored in."""

    def validate_environment(self, *, torch_dtype: Any = None, device_map: Any = None) -> None:
        """Raises `BackendError` for a package that is missing or too old, `ConfigError` for a `device_map` that
        puts layers to be packed on the CPU or disk of a machine whose GPU runs the rest. No GPU is needed."""
        super().validate_environment(torch_dtype=torch_dtype, device_map=device_map)
        self._check_offload(device_map)

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """By default float16, as in diffusers; other hosts say what the files hold."""
        return torch_dtype if torch_dtype is not None else require("torch", "load models").float16

    def update_device_map(self, device_map: Any) -> Any:
        """`None`: the current GPU, where there is one."""
        if device_map is None:
            torch = require("torch", "load models")
            if torch.cuda.is_available():
                device_map = {"": torch.cuda.current_device()}
            elif hasattr(torch, "xpu") and torch.xpu.is_available():
                device_map = {"": f"xpu:{torch.xpu.current_device()}"}
        self._check_offload(device_map)
        self.device_map = device_map
        return device_map

    def is_offloaded(self, path: str) -> bool:
        """Also on the CPU, where a GPU runs the rest."""
        if not isinstance(self.device_map, Mapping):
            return False
        placement = Placement(self.device_map)
        device = placement.of(path)
        return device == DISK or (placement.has_accelerator and device == "cpu")

    def preprocess_model(
        self,
        model: Any,
        *,
        skip: Iterable[str] = (),
        keep_in_fp32: Iterable[str] = (),
        packed: Collection[str] | None = None,
    ) -> None:
        """Raises `ConfigError` where the device map offloads a layer that is packed in the checkpoint."""
        super().preprocess_model(model, skip=skip, keep_in_fp32=keep_in_fp32, packed=packed)
        if not self.pre_quantized:
            return
        for name in packed or ():
            path = name.removesuffix(".weight")
            if self.is_offloaded(path):
                raise ConfigError(
                    f'device_map offloads "{path}" to the CPU or disk, and the checkpoint holds it packed',
                    hint='packed weights stay on the device that runs them; device_map="cpu" runs all on the CPU',
                )

    def takes(self, path: str, module: Any) -> bool:
        """Linear layers, and the `Conv1D` of GPT-2, a linear layer whose weight lies the other way round."""
        return super().takes(path, module) or _is_conv1d(type(module), module)

    def dequantize(self, model: Any, *, dtype: Any = None) -> Any:
        """Linear layers, and `Conv1D` where they were, with weights decoded where they are: no GPU is needed.

        `dtype` is by default the type the weights were packed from; int8 does not record it, and gives the type
        that the model was loaded in, or float32.
        """
        layers = _layers()
        kind = layers.Linear4bit if self.config.load_in_4bit else layers.Linear8bitLt
        wanted = None if dtype is None else torch_dtype(dtype)
        if wanted is None and self.config.load_in_8bit:
            wanted = self.torch_dtype
        replace_layers(model, lambda _, layer: layers.plain_layer(layer, wanted) if isinstance(layer, kind) else None)
        self.quantized = {}
        bits = "4bit" if self.config.load_in_4bit else "8bit"
        for mark in (f"is_loaded_in_{bits}", f"is_{bits}_serializable"):
            if hasattr(model, mark):
                setattr(model, mark, False)
        return model

    def _check_offload(self, device_map: Any) -> None:
        left = [path for path in _offloaded(device_map) if path not in self.config.skip_list]
        if left and not self.config.llm_int8_enable_fp32_cpu_offload:
            named = ", ".join(f'"{path}"' for path in left)
            raise ConfigError(
                f"device_map offloads {named} to the CPU or disk, where bitsandbytes weights are not packed",
                hint="llm_int8_enable_fp32_cpu_offload=True leaves these modules in full precision",
            )

    def _through(self) -> str | None:
        """Name in files of the type that weights are rounded to before they are packed."""
        if not self.casts_before_packing or self.torch_dtype is None:
            return None
        name = stored_name(self.torch_dtype)
        return name if name in ("F16", "BF16", "F32") else None

    def _pack(self, name: str, value: Any, packing: Packing, dtype: Any, **choices: Any) -> dict[str, Any]:
        """Components of a full-precision tensor, packed on the CPU."""
        from ..formats_ import quantize

        weights = value.detach().to("cpu")
        if packing.transpose:
            weights = weights.T
        if self.casts_before_packing and dtype is not None and dtype.is_floating_point:
            weights = weights.to(dtype)
        try:
            return quantize(weights.contiguous(), packing.format, **choices)
        except FormatError as error:
            raise FormatError(f'{error.message} (tensor "{name}")', hint=error.hint) from error


class BitsAndBytes4BitQuantizer(_BitsAndBytesQuantizer):
    """Packs linear layers to NF4 or FP4 and runs them: on the CPU through weightpack, on a GPU by bitsandbytes."""

    name = "bitsandbytes_4bit"

    def replace_layer(self, path: str, module: Any) -> Any:
        """Raises `ConfigError` for a weight whose bytes do not fill whole elements of the storage type."""
        rows, columns = _shape(module)
        storage = torch_dtype(self.config.bnb_4bit_quant_storage)
        size = -(-rows * columns // 2)
        if size % storage.itemsize and not self.pre_quantized:
            raise ConfigError(
                f"{path}: {size} packed bytes are not a multiple of the {storage.itemsize} bytes of "
                f"bnb_4bit_quant_storage {self.config.bnb_4bit_quant_storage}",
                hint="bnb_4bit_quant_storage='uint8' takes any shape",
            )
        layer = _layers().Linear4bit.on_meta(
            columns,
            rows,
            bias=module.bias,
            compute_dtype=torch_dtype(self.config.bnb_4bit_compute_dtype),
            quant_type=self.config.bnb_4bit_quant_type,
            double_quant=self.config.bnb_4bit_use_double_quant,
            storage=storage,
            packed=self.pre_quantized,
        )
        # Both hosts look at it to know what a layer was.
        layer.source_cls = type(module)
        return layer

    def component_of(self, key: str) -> tuple[str, str] | None:
        """Statistics stand behind the name of the weight: `a.weight.absmax`."""
        for ending in _STATISTICS:
            if key.endswith(ending):
                return key.removesuffix(ending), ending[1:]
        return None

    def packing(self, model: Any, name: str) -> Packing | None:
        """NF4 or FP4 with the config's choices."""
        layer, _ = owner(model, name)
        through = self._through()
        params: dict[str, Any] = {"double_quant": self.config.bnb_4bit_use_double_quant}
        if through is not None:
            params["dtype"] = through
        return Packing(
            f"bitsandbytes:{self.config.bnb_4bit_quant_type}",
            params,
            through=through,
            transpose=_is_conv1d(layer.source_cls),
        )

    def create_quantized_param(self, model: Any, name: str, value: Any, *, device: Any, dtype: Any = None) -> None:
        """Raises `CheckpointError` for statistics that are missing or do not fit, `FormatError` for weights that
        are not finite."""
        layer, _ = owner(model, name)
        if not isinstance(value, Mapping):
            packing = self.packing(model, name)
            assert packing is not None
            double_quant = self.config.bnb_4bit_use_double_quant
            value = self._pack(name, value, packing, dtype or self.torch_dtype, double_quant=double_quant)
        parts = dict(value)
        storage = torch_dtype(self.config.bnb_4bit_quant_storage)
        main = parts.get("")
        if main is not None and not self.pre_quantized and main.dtype != storage:
            parts[""] = main.reshape(-1).view(storage).reshape(-1, 1)
        layer.set_weight(_layers().params_4bit(name, parts, (layer.out_features, layer.in_features), device))

    def postprocess_model(self, model: Any) -> None:
        """Leaves the marks that the hosts and accelerate look for."""
        model.is_loaded_in_4bit = True
        model.is_4bit_serializable = True


class BitsAndBytes8BitQuantizer(_BitsAndBytesQuantizer):
    """Packs linear layers to int8 with one scale per row, and runs them by LLM.int8."""

    name = "bitsandbytes_8bit"

    def replace_layer(self, path: str, module: Any) -> Any:
        """A layer of the same shape; with `llm_int8_has_fp16_weight` its weight is not packed."""
        rows, columns = _shape(module)
        layer = _layers().Linear8bitLt.on_meta(
            columns,
            rows,
            bias=module.bias,
            threshold=self.config.llm_int8_threshold,
            has_fp16_weights=self._keeps_weights(),
        )
        layer.source_cls = type(module)
        return layer

    def _keeps_weights(self) -> bool:
        return self.config.llm_int8_has_fp16_weight and not self.pre_quantized

    def component_of(self, key: str) -> tuple[str, str] | None:
        """The scales stand beside the weight: `a.SCB`."""
        path, _, leaf = key.rpartition(".")
        return (f"{path}.weight", leaf) if path and leaf in ("SCB", "weight_format") else None

    def packing(self, model: Any, name: str) -> Packing | None:
        """int8, unless weights are kept."""
        if self._keeps_weights():
            return None
        layer, _ = owner(model, name)
        return Packing("bitsandbytes:int8", through=self._through(), transpose=_is_conv1d(layer.source_cls))

    def create_quantized_param(self, model: Any, name: str, value: Any, *, device: Any, dtype: Any = None) -> None:
        """Raises `CheckpointError` for scales that are missing or do not fit, `FormatError` for weights that are
        not finite in float16."""
        layer, _ = owner(model, name)
        packing = self.packing(model, name)
        if packing is None:
            weights = value.T.contiguous() if _is_conv1d(layer.source_cls) else value
            layer.set_weight(_layers().params_16bit(weights, device, dtype or self.torch_dtype))
            return
        if not isinstance(value, Mapping):
            value = self._pack(name, value, packing, dtype or self.torch_dtype)
        layer.set_weight(_layers().params_8bit(name, value, (layer.out_features, layer.in_features), device))

    def postprocess_model(self, model: Any) -> None:
        """Leaves the marks that the hosts and accelerate look for."""
        model.is_loaded_in_8bit = True
        model.is_8bit_serializable = True


_STATISTICS = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    *(f".quant_state.bitsandbytes__{kind}" for kind in QUANT_TYPES),
)


def _layers() -> Any:
    return import_module(f"{__package__}.bitsandbytes_layers")


def _is_conv1d(kind: type, module: Any = None) -> bool:
    """Whether a class is transformers' `Conv1D`; known by its name, for the library may be absent."""
    return kind.__name__ == "Conv1D" and (module is None or hasattr(module, "nf"))


def _shape(module: Any) -> tuple[int, int]:
    """Output and input features of a layer that is taken."""
    if _is_conv1d(type(module)):
        columns, rows = module.weight.shape
        return int(rows), int(columns)
    return int(module.out_features), int(module.in_features)


def _offloaded(device_map: Any) -> list[str]:
    """The modules that a device map puts on disk, or on the CPU beside a GPU."""
    if not isinstance(device_map, Mapping):
        return []
    kinds = {path: str(getattr(device, "type", device)) for path, device in device_map.items()}
    beside = ("cpu", "disk") if set(kinds.values()) - {"cpu", "disk"} else ("disk",)
    return [path for path, kind in kinds.items() if kind in beside]
