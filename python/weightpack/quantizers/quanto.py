"""optimum-quanto: 8-bit, 4-bit and 2-bit weights that run in torch operations, on any device.

Weights are packed in the library's bytes without it (`quanto_packing`) and run in its layers
(`quanto_layers`), which need neither a compiler nor a GPU. A checkpoint in quanto's form is known from
`config.json`, or from the file `quanto_qmap.json` that the library itself writes next to the weights.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from .._lazy import require
from ..errors import CheckpointError, ConfigError, UnsupportedError
from ..placement import Placement
from .base import Packing, Quantizer, Requirement
from .config import QuantizationConfig, QuantizationMethod, names_of, one_of
from .dtypes import stored_name, torch_dtype
from .modules import owner, replace_layers

WEIGHTS = ("int8", "int4", "int2", "float8")
_COMPONENT = re.compile(r"^((?:.+\.)?weight)\.(_data|_scale|_shift)(?:\._data)?$")
_CONSTANTS = ("input_scale", "output_scale")
"""Scales of activations, in every layer of quanto's and every file, 1 where activations are not quantized."""
_CONSTANT = re.compile(r"^(.+\.)?(input_scale|output_scale)$")


@dataclasses.dataclass(frozen=True)
class QuantoConfig(QuantizationConfig):
    """Weights as `int8`, `int4`, `int2` or `float8` (E4M3).

    `weights_dtype` is diffusers' name of the field, `weights` that of transformers: either may be given,
    both are written and read. `activations` can only be `None`: quantized activations need calibration.
    `quantization_map` is for checkpoints whose layers differ: type of the weights by path of the layer.
    Raises `ConfigError` for other types, `UnsupportedError` for quantized activations.
    """

    quant_method: ClassVar[str] = QuantizationMethod.QUANTO
    ALIASES: ClassVar[Mapping[str, str]] = {"weights": "weights_dtype"}

    weights_dtype: str | None = None
    modules_to_not_convert: tuple[str, ...] | None = None
    activations: str | None = None
    quantization_map: Mapping[str, str] | None = None
    weights: dataclasses.InitVar[str | None] = None

    def __post_init__(self, weights: str | None) -> None:
        given = {_type_name(name) for name in (self.weights_dtype, weights) if name is not None}
        if len(given) > 1:
            raise ConfigError(f"QuantoConfig: weights {weights!r} contradicts weights_dtype {self.weights_dtype!r}")
        chosen = given.pop() if given else "int8"
        self._set("weights_dtype", chosen)
        self._set("weights", chosen)
        if self.activations == "none":
            self._set("activations", None)
        if self.activations is not None:
            one_of(self.activations, ("int8", "float8"), "activations")
            raise UnsupportedError(
                f"quanto: activations {self.activations!r} need scales that are measured on data after loading",
                hint="leave activations out, or calibrate with optimum.quanto itself",
            )
        self._set("modules_to_not_convert", names_of(self.modules_to_not_convert, "modules_to_not_convert"))
        if self.quantization_map is not None:
            types = {str(path): _type_name(name) for path, name in self.quantization_map.items()}
            self._set("quantization_map", types)

    def to_dict(self) -> dict[str, Any]:
        """All fields; the type of weights under the names of both hosts."""
        return self._for_hosts(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        """`quant_method` and the fields that differ from their default."""
        return self._for_hosts(super().to_diff_dict())

    def _for_hosts(self, fields: dict[str, Any]) -> dict[str, Any]:
        if fields.get("quantization_map") is None:
            fields.pop("quantization_map", None)
        if "weights_dtype" in fields:
            fields["weights"] = fields["weights_dtype"]
        return fields

    @classmethod
    def from_file_beside(cls, content: Any) -> QuantoConfig:
        """The config in quanto's own `quanto_qmap.json`: for each layer the types of weights and activations.

        Raises `CheckpointError` for other content, `UnsupportedError` for quantized activations.
        """
        types: dict[str, str] = {}
        if not isinstance(content, Mapping):
            raise CheckpointError("quanto_qmap.json is not an object of layers")
        for path, row in content.items():
            if not isinstance(row, Mapping) or not isinstance(row.get("weights"), str):
                raise CheckpointError(f'quanto_qmap.json: layer "{path}" does not say what its weights are')
            if row.get("activations", "none") not in ("none", None):
                raise UnsupportedError(f'quanto: layer "{path}" has {row["activations"]} activations, expected none')
            if row["weights"] != "none":
                types[path] = _type_name(row["weights"])
        if not types:
            raise CheckpointError("quanto_qmap.json names no layer with packed weights")
        most = max(WEIGHTS, key=list(types.values()).count)
        return cls(most, quantization_map=types)


class QuantoQuantizer(Quantizer):
    """Puts quanto's layers in the place of linear ones; for packed checkpoints also of convolutions."""

    name: ClassVar[str] = "quanto"
    requirements: ClassVar[tuple[Requirement, ...]] = (Requirement("optimum.quanto", "0.2.6", "run quanto weights"),)

    is_serializable = True
    is_trainable = True
    is_compileable = True

    config: QuantoConfig

    def __init__(self, config: QuantizationConfig, *, pre_quantized: bool = True) -> None:
        super().__init__(config, pre_quantized=pre_quantized)
        self._packed: Collection[str] | None = None

    def is_offloaded(self, path: str) -> bool:
        """On disk, and on the CPU where an accelerator runs the rest: accelerate's hooks cannot move quanto's
        tensors back and forth, so these layers stay as they are."""
        if super().is_offloaded(path):
            return True
        if not isinstance(self.device_map, Mapping):
            return False
        placement = Placement(self.device_map)
        return placement.has_accelerator and placement.of(path) == "cpu"

    def weights_of(self, path: str) -> str:
        """The type of the weights of the layer at `path`."""
        return (self.config.quantization_map or {}).get(path, str(self.config.weights_dtype))

    def preprocess_model(
        self,
        model: Any,
        *,
        skip: Iterable[str] = (),
        keep_in_fp32: Iterable[str] = (),
        packed: Collection[str] | None = None,
    ) -> None:
        """See `Quantizer.preprocess_model`. Raises `ConfigError` where the device map offloads a layer that the
        checkpoint holds packed."""
        self._packed = packed if self.pre_quantized else None
        for name in self._packed or ():
            path = name.rpartition(".")[0]
            if self.is_offloaded(path):
                raise ConfigError(
                    f'device_map offloads "{path}" to the CPU or disk, and the checkpoint holds it packed',
                    hint='packed weights stay on the device that runs them; device_map="cpu" runs all on the CPU',
                )
        super().preprocess_model(model, skip=skip, keep_in_fp32=keep_in_fp32, packed=packed)

    def takes(self, path: str, module: Any) -> bool:
        """Linear layers; of a packed checkpoint every layer that quanto may have packed."""
        if self._packed is None:
            return super().takes(path, module)
        nn = require("torch", "load models").nn
        return isinstance(module, nn.Linear | nn.Conv2d)

    def replace_layer(self, path: str, module: Any) -> Any:
        """quanto's layer, without a weight."""
        from .quanto_layers import layer_for

        return layer_for(module, self.weights_of(path))

    def packed_bytes(self, model: Any, name: str) -> int | None:
        """Bytes of codes, scales and shifts."""
        if not self.check_if_quantized_param(model, name):
            return None
        from .quanto_packing import packed_bytes

        layer, _ = owner(model, name)
        return packed_bytes(layer.weight.shape, self.weights_of(name.rpartition(".")[0]), layer.weight.dtype.itemsize)

    def component_of(self, key: str) -> tuple[str, str] | None:
        """`a.weight._data._data` and `a.weight._data` are both component `_data` of `a.weight`; the scales of
        activations, `a.input_scale` and `a.output_scale`, come with it."""
        found = _COMPONENT.match(key)
        if found:
            return found[1], found[2]
        found = _CONSTANT.match(key)
        return (f"{found[1] or ''}weight", found[2]) if found else None

    def packing(self, model: Any, name: str) -> Packing | None:
        """By the engine, in groups of weights as they are in the layer and not as in files."""
        if self.pre_quantized:
            return None
        from .quanto_packing import grouped_shape

        weights = self.weights_of(name.rpartition(".")[0])
        layer, _ = owner(model, name)
        through = None if self.torch_dtype is None else stored_name(self.torch_dtype)
        return Packing(f"quanto:{weights}", through=through, shape=grouped_shape(layer.weight.shape, weights))

    def create_quantized_param(self, model: Any, name: str, value: Any, *, device: Any, dtype: Any = None) -> None:
        """Sets a weight from a full-precision tensor or from `_data`, `_scale` and `_shift`.

        A tensor is rounded to `dtype` and packed. Raises `FormatError` for values that cannot be packed,
        `CheckpointError` for components that are missing or are not those of the layer.
        """
        import torch

        from .quanto_layers import assemble
        from .quanto_packing import encode, named

        layer, leaf = owner(model, name)
        weights = self.weights_of(name.rpartition(".")[0])
        shape = layer.weight.shape
        stored: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
        if "" in stored and "_data" not in stored:
            # A layer of quanto's that was saved before its weight was packed.
            value = stored[""]
        if isinstance(value, Mapping):
            components = _checked(named(value), weights, tuple(shape), name)
            scale_dtype = dtype or components["_scale"].dtype
            for component in components.keys() - {"_data"}:
                components[component] = components[component].to(scale_dtype)
        else:
            if tuple(value.shape) != tuple(shape):
                raise CheckpointError(f'tensor "{name}" has shape {list(value.shape)}, expected {list(shape)}')
            components = encode(value, weights, dtype=dtype, name=name)
            scale_dtype = components["_scale"].dtype
        components = {component: tensor.to(device) for component, tensor in components.items()}
        layer._parameters[leaf] = torch.nn.Parameter(assemble(components, weights, shape), requires_grad=False)
        for constant in _CONSTANTS:
            scale = stored.get(constant, getattr(layer, constant))
            setattr(layer, constant, scale.to(device=device, dtype=scale_dtype))

    def update_missing_keys(self, model: Any, missing: Sequence[str]) -> list[str]:
        """Without the scales of activations, which are 1 where these are not quantized."""
        own = {f"{path}.{constant}" for path in self.quantized for constant in _CONSTANTS}
        return [key for key in missing if key not in own]

    def dequantize(self, model: Any, *, dtype: Any = None) -> Any:
        """Puts ordinary layers in place; weights are computed in float32 and rounded once to `dtype`."""
        from .quanto_layers import plain_layer

        dtype = None if dtype is None else torch_dtype(dtype)
        replace_layers(model, lambda path, module: plain_layer(module, dtype) if path in self.quantized else None)
        self.quantized = {}
        return model


def _type_name(name: Any) -> str:
    """`int4` for `int4` and quanto's own `qint4`."""
    text = str(name)
    text = "float8" if text in ("qfloat8", "qfloat8_e4m3fn") else text
    return one_of(text.removeprefix("q") if text.startswith("qint") else text, WEIGHTS, "weights_dtype")


def _checked(value: Mapping[str, Any], weights: str, shape: tuple[int, ...], name: str) -> dict[str, Any]:
    """The components of a packed weight, each there, of the type and shape of the layer."""
    from .quanto_packing import BITS, CODE_DTYPES, component_shapes

    shapes = component_shapes(shape, weights)
    for component, expected in shapes.items():
        key = f"{name}.{component}" + ("._data" if component == "_data" and BITS[weights] < 8 else "")
        if component not in value:
            raise CheckpointError(f'tensor "{key}" is missing: weight "{name}" is packed as quanto:{weights}')
        stored = value[component]
        right = stored.dtype == CODE_DTYPES[weights] if component == "_data" else stored.dtype.is_floating_point
        if not right or (tuple(stored.shape) != expected and not _is_scalar(stored, component, expected)):
            found = f"{str(stored.dtype).removeprefix('torch.')} {list(stored.shape)}"
            raise CheckpointError(f'tensor "{key}" is {found}, and quanto:{weights} has shape {list(expected)}')
    return {component: value[component] for component in shapes}


def _is_scalar(stored: Any, component: str, expected: tuple[int, ...]) -> bool:
    """Scales of one weight row are stored with and without dimensions."""
    return component == "_scale" and stored.numel() == 1 and expected == ()
