"""GGUF: weights in ggml's blocks, kept as the file has them and decoded when their layer runs.

A `.gguf` file is the way in; `quant_type` packs a model of another kind while it is read. No library
is needed: on the CPU weightpack's kernels decode, on an accelerator torch does (`gguf_decode`).

Differences to diffusers: all block types are decoded, in float32 and rounded once to `compute_dtype`
(diffusers computes with float16 scales); embeddings and convolutions stay packed as well; the config
is set on the model and passes through JSON.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from .._lazy import require
from ..entry import Entry
from ..errors import CheckpointError, ConfigError
from ..matcher import Matcher
from .base import Packing, Quantizer
from .config import QuantizationConfig, QuantizationMethod, names_of, one_of
from .dtypes import dtype_name, torch_dtype
from .gguf_stored import LEAF, checked, checked_shapes, compact

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class GGUFQuantizationConfig(QuantizationConfig):
    """How GGUF weights are run.

    `compute_dtype` is the type that weights are decoded to, and that layers compute in: float32 (the
    default), bfloat16 or float16. `modules_to_not_convert` names modules whose weights are decoded once,
    while loading (see `weightpack.matcher`).

    `quant_type` ("q4_k", "Q8_0") packs the linear layers of a model that is not packed: those whose rows
    are whole blocks of that type. `stored_types` and `stored_shapes` are in the config of a folder of packed
    weights that weightpack wrote, see `gguf_stored`. The hosts do not have these fields.

    >>> GGUFQuantizationConfig(compute_dtype="bf16").to_dict()["compute_dtype"]
    'bfloat16'
    """

    quant_method = QuantizationMethod.GGUF
    IGNORED = frozenset({"pre_quantized", "gguf_file"})

    compute_dtype: Any = None
    modules_to_not_convert: tuple[str, ...] | None = None
    quant_type: str | None = None
    stored_types: Mapping[str, str | None] | None = None
    stored_shapes: Mapping[str, tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        chosen = "float32" if self.compute_dtype is None else dtype_name(self.compute_dtype, "compute_dtype")
        self._set("compute_dtype", one_of(chosen, COMPUTE_DTYPES, "compute_dtype"))
        self._set("modules_to_not_convert", names_of(self.modules_to_not_convert, "modules_to_not_convert"))
        if self.quant_type is not None:
            self._set("quant_type", _encoded_type(self.quant_type))
        if self.stored_types is not None:
            if self.quant_type is not None:
                raise ConfigError("the weights of a model with stored_types are packed, and quant_type would pack them")
            self._set("stored_types", checked(self.stored_types, _types()))
        self._set("stored_shapes", checked_shapes(self.stored_shapes))

    def to_dict(self) -> dict[str, Any]:
        """As in the base; what is only said of stored weights is left out where there are none."""
        fields = super().to_dict()
        return {key: value for key, value in fields.items() if value is not None or not key.startswith("stored_")}

    def with_loading_choices(self, given: Any) -> GGUFQuantizationConfig:
        """With the caller's `compute_dtype` and `modules_to_not_convert`: the file does not know of them."""
        return replace(self, compute_dtype=given.compute_dtype, modules_to_not_convert=given.modules_to_not_convert)

    @classmethod
    def _read(cls, config_dict: Mapping[str, Any]) -> dict[str, Any]:
        fields = dict(config_dict)
        if fields.pop("dequantize", False):
            raise ConfigError(
                "GGUFQuantizationConfig keeps weights packed, and dequantize is true",
                hint="leave quantization_config out: the weights are then decoded while they are read",
            )
        return super()._read(fields)


class GGUFQuantizer(Quantizer):
    """Keeps blocks packed in memory.

    The loader sets `entries`, what the checkpoint says of each parameter, before `preprocess_model`, and
    `origin` where that is a GGUF file: what of it the model does not have.
    """

    name = "gguf"
    is_serializable = True
    is_trainable = True
    is_compileable = True

    config: GGUFQuantizationConfig

    def __init__(self, config: QuantizationConfig, *, pre_quantized: bool = True) -> None:
        if not isinstance(config, GGUFQuantizationConfig):
            raise ConfigError(f"{type(config).__name__} is no GGUFQuantizationConfig")
        # What is stored decides, unless the caller asks for another type.
        super().__init__(config, pre_quantized=config.quant_type is None)
        self.entries: Mapping[str, Entry] = {}
        self.origin: Any = None
        self._decoded = Matcher(())

    @property
    def is_saved_by_host(self) -> bool:
        """No host writes the types of the blocks."""
        return False

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """By default `compute_dtype`."""
        return torch_dtype if torch_dtype is not None else self._compute_dtype()

    def preprocess_model(
        self,
        model: Any,
        *,
        skip: Iterable[str] = (),
        keep_in_fp32: Iterable[str] = (),
        packed: Collection[str] | None = None,
    ) -> None:
        """As in the base. Of a packed checkpoint everything stays packed that is, but for the config's own
        list and what the model keeps in float32: these weights are decoded while they are read."""
        # The class's list counts in any type: its code looks at the type of these weights (T5 casts to it).
        in_fp32 = (*keep_in_fp32, *(getattr(model, "_keep_in_fp32_modules", None) or ()))
        self._decoded = Matcher((*self.config.skip_list, *in_fp32))
        super().preprocess_model(model, skip=skip, keep_in_fp32=in_fp32, packed=packed)
        if packed is not None and self.pre_quantized:
            self._tell_decoded(packed)

    def _tell_decoded(self, packed: Collection[str]) -> None:
        """Warns of packed tensors that take more memory than a person would expect."""
        paths = {name: name.rpartition(".")[0] for name in packed}
        left = [
            name
            for name, path in paths.items()
            if path not in self.quantized and not self._decoded.matches(path) and not self.is_offloaded(path)
        ]
        if left:
            shown = ", ".join(sorted(left)[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            warnings.warn(f"decoded while they are read, as no layer does it when it runs: {shown}", stacklevel=3)

    def takes(self, path: str, module: Any) -> bool:
        """Linear layers; of a packed checkpoint embeddings and convolutions too."""
        from .gguf_layers import layer_class

        if not self.pre_quantized:
            return super().takes(path, module)
        return layer_class(module) is not None

    def replace_layer(self, path: str, module: Any) -> Any:
        """A layer that decodes; `None` where the weight is not packed, or cannot be kept so."""
        from .gguf_layers import GGUFLayer

        if self.pre_quantized:
            if self._decoded.matches(path):
                return None
            entry = self.entries.get(f"{path}.weight")
            stored = _block_type(entry) if entry is not None else None
            if entry is None or stored is None:
                return None
            shape = tuple(module.weight.shape)
            if entry.shape != shape and entry.weights == prod(shape):
                raise CheckpointError(
                    f"{path}.weight has shape {list(entry.shape)} in the checkpoint, and {list(shape)} in the model"
                )
        else:
            stored = str(self.config.quant_type)
            if module.in_features % block_sizes(stored)[0]:
                return None
        return GGUFLayer.take_over(module, stored, self._compute_dtype())

    def packing(self, model: Any, name: str) -> Packing | None:
        """Blocks of `quant_type`."""
        return None if self.pre_quantized else Packing(f"gguf:{str(self.config.quant_type).lower()}")

    def packed_bytes(self, model: Any, name: str) -> int | None:
        """The bytes of its blocks."""
        if not self.check_if_quantized_param(model, name):
            return None
        entry = self.entries.get(name)
        return entry.nbytes if self.pre_quantized and entry is not None else super().packed_bytes(model, name)

    def create_quantized_param(self, model: Any, name: str, value: Any, *, device: Any, dtype: Any = None) -> None:
        """Sets the blocks of one weight: `value` holds them as `""`, uint8, or is a full-precision tensor
        that is packed here."""
        from .gguf_layers import GGUFParameter

        layer = model.get_submodule(name.rpartition(".")[0])
        shape = layer.quant_shape
        blocks = value[""] if isinstance(value, Mapping) else self._packed(value, layer.quant_type)
        weights, nbytes = block_sizes(layer.quant_type)
        if blocks.numel() * weights != prod(shape) * nbytes:
            raise CheckpointError(
                f"{blocks.numel()} bytes of {layer.quant_type}, and a weight of shape {list(shape)} takes "
                f'{prod(shape) // weights * nbytes} (tensor "{name}")'
            )
        if dtype is not None:
            layer.set_output_dtype(dtype)
        parameter = GGUFParameter(blocks.to(device), quant_type=layer.quant_type, quant_shape=shape)
        layer._parameters["weight"] = parameter

    def postprocess_model(self, model: Any) -> None:
        """A layer that was tied to a packed one decodes, too."""
        from .gguf_layers import GGUFLayer, GGUFParameter, layer_class
        from .modules import replace_layers

        def choose(path: str, module: Any) -> Any:
            weight = module._parameters.get("weight")
            if not isinstance(weight, GGUFParameter) or isinstance(module, GGUFLayer) or layer_class(module) is None:
                return None
            new = GGUFLayer.take_over(module, str(weight.quant_type), self._compute_dtype(), weight.quant_shape)
            self.quantized[path] = type(module)
            return new

        replace_layers(model, choose)

    def written_form(self, tensors: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """Blocks as plain bytes, and in the config the type of each."""
        from .gguf_layers import GGUFParameter, plain

        types: dict[str, str | None] = {}
        shapes: dict[str, list[int]] = {}
        found = {}
        for name, tensor in tensors.items():
            path = name.removesuffix(LEAF)
            if isinstance(tensor, GGUFParameter):
                shape, kind = tensor.quant_shape or (), str(tensor.quant_type)
                weights, nbytes = block_sizes(kind)
                types[path] = kind
                if shape != (*tensor.shape[:-1], tensor.shape[-1] // nbytes * weights):
                    shapes[path] = list(shape)
                found[name] = plain(tensor)
            else:
                found[name] = tensor
                if name.endswith(LEAF):
                    types[path] = None
        fields: dict[str, Any] = {"quant_type": None, "stored_types": compact(types)}
        return found, {**fields, "stored_shapes": shapes} if shapes else fields

    def dequantize(self, model: Any, *, dtype: Any = None) -> Any:
        """Ordinary layers again, their weights decoded where they are, in `dtype` (by default the type that
        the model was loaded in). Layers that share a weight share the decoded one."""
        from .gguf_layers import GGUFLayer
        from .modules import replace_layers

        wanted = torch_dtype(dtype) if dtype is not None else self.torch_dtype or self._compute_dtype()
        decoded: dict[int, Any] = {}

        def choose(path: str, module: Any) -> Any:
            return module.give_back(wanted, decoded) if isinstance(module, GGUFLayer) else None

        replace_layers(model, choose)
        self.quantized.clear()
        return model

    def _compute_dtype(self) -> Any:
        return torch_dtype(self.config.compute_dtype)

    def _packed(self, weights: Any, quant_type: str) -> Any:
        require("torch", "load models")
        from ..gguf.blocks import quantize

        return quantize(weights.detach().cpu().contiguous(), quant_type)


def block_sizes(quant_type: str) -> tuple[int, int]:
    """Weights and bytes of a block of a type. Raises `ConfigError` for a type that does not exist."""
    row = _types().get(quant_type)
    if row is None:
        raise ConfigError(f'unknown GGUF type "{quant_type}"')
    return int(row["block_weights"]), int(row["block_bytes"])


def _types() -> dict[str, Any]:
    from .. import _rust

    return {row["name"]: row for row in json.loads(_rust.types())}


def _block_type(entry: Entry) -> str | None:
    """The block type of a stored tensor (`Q4_K`), `None` for plain elements."""
    name = (entry.format or "").removeprefix("gguf:").upper()
    return name if (entry.format or "").startswith("gguf:") and block_sizes(name)[0] > 1 else None


def _encoded_type(name: Any) -> str:
    types = _types()
    known = [key for key, row in types.items() if row["encodes"] == "always" and row["block_weights"] > 1]
    wanted = str(name).upper().removeprefix("GGUF:")
    if wanted in types and types[wanted]["encodes"] == "with importance":
        raise ConfigError(
            f"quant_type {wanted} is only written with an importance for each column",
            hint="convert the model with --importance, and load the result",
        )
    return one_of(wanted, known, "quant_type")
