"""Models packed for ModelOpt, in the form that vLLM, TensorRT-LLM and SGLang read: its unified export.

What a layer keeps and what is written for it; K is the row length of a weight [N, K]:

| packed as | `quant_algo` | `weight` | scales |
|---|---|---|---|
| FP8, one scale | FP8 | F8_E4M3 [N, K] as it is | `weight_scale` F32 [] |
| FP8, one a row | FP8_PER_CHANNEL_PER_TOKEN | as it is | `weight_scale` F32 [N] |
| FP8, blocks of 128 x 128 | fp8_pb_wo | as it is | `weight_scale` F32 [N/128, 1, K/128, 1] |
| INT8 | W8A16; W8A8_SQ_PER_CHANNEL with INT8 inputs | I8 [N, K] as it is | `weight_scale` F32 [N] |
| INT4 | W4A16_AWQ | U8 [N/2, K]: signed codes, even row low | `weight_scale` F32 [N, K/b] |
| NVFP4 | W4A16_NVFP4; NVFP4 with such inputs | U8 [N, K/2] as it is | F8_E4M3 [N, K/16], `weight_scale_2` F32 [] |

`input_scale` F32 [] is written where the range of inputs is known, from a `forward_loop`. Engines that
compute in FP8 or NVFP4 need it; weight-only NVFP4, INT8 and INT4, and FP8 per row, do without.

Scales are those that the codes were made with, so that nothing changes but for one thing: layers that an
engine runs as one (query, key and value; gate and up) share their `weight_scale_2` there, and the block
scales of those with a smaller one are rounded anew, as ModelOpt does with compressed models.

What has no such form is refused: NF4, convolutions, other blocks, other inputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from .._lazy import require
from ..errors import ConfigError
from ..packings.modelopt import shortened, together

QUANTIZERS = ("weight_quantizer", "input_quantizer", "output_quantizer")
FILE = "hf_quant_config.json"
_BLOCK = 128
_SIZED = {
    "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "MXFP8", "W4A16_AWQ", "W4A8_AWQ",
}  # fmt: skip
"""Algorithms whose description has a `group_size`."""
_HINT = "modules_to_not_convert= leaves layers as they are; without form= the model is saved for weightpack itself"

Description = dict[str, Any]
"""`quant_algo` of a layer, and what belongs to it."""


def exported(model: Any, state: Mapping[str, Any], plans: Mapping[str, Any]) -> tuple[dict[str, Any], Description]:
    """The tensors of the export by name, and `hf_quant_config.json`.

    `state` is the model's, `plans` says how each packed layer is. Raises `ConfigError` that names a layer
    which has no such form.
    """
    layers = {path: _Layer(path, plan, state) for path, plan in plans.items()}
    for paths in together(layers):
        _share_scales([layers[path] for path in paths])
    tensors: dict[str, Any] = {}
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        owner = path.rpartition(".")[0] if path.endswith(QUANTIZERS) else path
        if owner not in layers:
            tensors[name] = value
        elif leaf == "weight" and path == owner:
            tensors.update({f"{owner}.{part}": tensor for part, tensor in layers[owner].tensors.items()})
        elif path == owner:
            tensors[name] = value
    described = {path: layer.description for path, layer in layers.items()}
    version = str(require("modelopt", "tell its release").__version__)
    return tensors, _file({"name": "modelopt", "version": version}, described, unpacked(model, layers))


class _Layer:
    """One packed layer as it is exported."""

    def __init__(self, path: str, plan: Any, state: Mapping[str, Any]) -> None:
        self.path = path
        self.plan = plan
        self.inputs = plan.chosen["input_quantizer"]
        self.weight = state[f"{path}.weight"]
        self._state = state
        if len(plan.shape) != 2:
            raise self._refusal("is a convolution", "disable_conv_quantization=True leaves them as they are")
        self.tensors: dict[str, Any] = {}
        self.description = getattr(self, f"_{plan.kind}")()

    def _refusal(self, told: str, hint: str = _HINT) -> ConfigError:
        return ConfigError(f'"{self.path}" {told}, for which the unified export has no form', hint=hint)

    def _scale(self, name: str = "_scale") -> Any:
        return self._state[f"{self.path}.weight_quantizer.{name}"]

    def _put(self, weight: Any, scale: Any, largest_input: float | None) -> None:
        """The tensors; `largest_input` is the largest number of the type of inputs."""
        self.tensors = {"weight": weight, "weight_scale": scale}
        amax = self._state.get(f"{self.path}.input_quantizer._amax")
        if largest_input is not None and amax is not None:
            if amax.numel() != 1:
                raise self._refusal(f"has {amax.numel()} ranges of inputs")
            self.tensors["input_scale"] = amax.float().reshape(()) / largest_input

    def _takes(self, *bits: Any) -> Any:
        """The type of inputs, which must be one of `bits` or none."""
        found = None if self.inputs is None else self.inputs.get("num_bits", 8)
        found = tuple(found) if isinstance(found, list) else found
        if found not in (None, *bits):
            raise self._refusal(f"has {self.plan.kind.upper()} weights and inputs of {found} bits")
        return found

    def _axis(self) -> Any:
        axis = self.plan.weight.get("axis")
        axis = axis[0] if isinstance(axis, tuple | list) and len(axis) == 1 else axis
        if axis not in (None, 0):
            raise self._refusal(f"has scales along axis {axis}")
        return axis

    def _fp8(self) -> Description:
        self._takes((4, 3))
        scale = self._scale().float()
        if not self.plan.blocks:
            by_row = self._axis() == 0
            self._put(self.weight, scale.reshape(-1 if by_row else ()), 448.0)
            return {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN" if by_row else "FP8"}
        if self.plan.blocks != {-1: _BLOCK, -2: _BLOCK}:
            raise self._refusal(f"is packed in blocks of {self.plan.blocks}")
        rows, columns = (-(-size // _BLOCK) for size in self.plan.shape)
        self._put(self.weight, scale.reshape(rows, 1, columns, 1), None)
        return {"quant_algo": "fp8_pb_wo"}

    def _int8(self) -> Description:
        inputs = self._takes(8)
        if self.plan.blocks:
            raise self._refusal(f"is packed in blocks of {self.plan.blocks}")
        self._axis()
        self._put(self.weight, self._scale().float().reshape(-1).expand(self.plan.shape[0]).contiguous(), 127.0)
        return {"quant_algo": "W8A16" if inputs is None else "W8A8_SQ_PER_CHANNEL"}

    def _int4(self) -> Description:
        self._takes()
        rows, columns = self.plan.shape
        block = self.plan.blocks[-1]
        if rows % 2 or columns % block:
            raise self._refusal(f"has a weight of {rows} rows in {columns} columns, packed in blocks of {block}")
        self._put(by_row_pairs(self.weight), 1 / self._scale().float().reshape(rows, columns // block), None)
        return {
            "quant_algo": "W4A16_AWQ",
            "group_size": block,
            "has_zero_point": False,
            "pre_quant_scale": False,
        }

    def _nvfp4(self) -> Description:
        inputs = self._takes((2, 1))
        rows, columns = self.plan.shape
        block = self.plan.blocks[-1]
        self._put(self.weight, self._scale().reshape(rows, columns // block), 6.0 * 448.0)
        second = self._scale("_double_scale").float().reshape(())
        self.tensors = {**self.tensors, "weight_scale_2": second}
        return {"quant_algo": "W4A16_NVFP4" if inputs is None else "NVFP4", "group_size": block}

    def _nf4(self) -> Description:
        raise self._refusal("is packed as NF4")


def by_row_pairs(codes: Any) -> Any:
    """INT4 codes [N, K/2], two of a row in a byte with the even one high and 8 for zero, as [N/2, K]: two rows
    in a byte with the even one low, in two's complement."""
    torch = require("torch", "export weights")
    even, odd = codes[0::2], codes[1::2]
    made = torch.empty((even.shape[0], 2 * even.shape[1]), dtype=torch.uint8, device=codes.device)
    made[:, 0::2] = even >> 4 | odd & 0xF0
    made[:, 1::2] = even & 0x0F | odd << 4
    return made.bitwise_xor_(0x88)


def _share_scales(group: list[_Layer]) -> None:
    """Gives NVFP4 layers one `weight_scale_2`, and layers with inputs of the same type one `input_scale`."""
    torch = require("torch", "export weights")
    found = [layer.tensors["weight_scale_2"] for layer in group if "weight_scale_2" in layer.tensors]
    if len(found) == len(group):
        largest = torch.stack(found).amax()
        for layer, second in zip(group, found, strict=True):
            if second != largest:
                scale = layer.tensors["weight_scale"].float() * (second / largest)
                layer.tensors["weight_scale"] = scale.clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
                layer.tensors["weight_scale_2"] = largest.clone()
    inputs = [layer.tensors["input_scale"] for layer in group if "input_scale" in layer.tensors]
    if len(inputs) == len(group) and group[0].description["quant_algo"] != "FP8":
        for layer in group:
            layer.tensors["input_scale"] = torch.stack(inputs).amax()


def unpacked(model: Any, packed: Iterable[str]) -> list[str]:
    """Patterns of the modules with matrices that are not packed, each as short as the packed ones allow."""
    packed = set(packed)
    kept = [
        path
        for path, module in model.named_modules()
        if path and path not in packed and any(one is not None and one.dim() > 1 for one in module._parameters.values())
    ]
    return shortened(kept, packed)


def _file(producer: Mapping[str, Any], layers: Mapping[str, Description], ignored: list[str]) -> Description:
    """The content of `hf_quant_config.json`."""
    kinds = {json.dumps(description, sort_keys=True): description for description in layers.values()}
    quantization: Description = {"quant_algo": None, "kv_cache_quant_algo": None}
    if len(kinds) == 1:
        quantization |= {**next(iter(kinds.values())), "exclude_modules": ignored}
    elif kinds:
        quantization |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": dict(layers), "exclude_modules": ignored}
    return {"producer": dict(producer), "quantization": quantization}


def section(file: Mapping[str, Any]) -> Description:
    """The `quantization_config` of `config.json` for an `hf_quant_config.json`."""
    quantization = file["quantization"]
    algorithm = quantization["quant_algo"]
    made: Description = {}
    if algorithm in ("FP8", "NVFP4", "W4A16_NVFP4"):
        made["config_groups"] = {"group_0": {**_group(quantization), "targets": ["Linear"]}}
    elif algorithm == "MIXED_PRECISION":
        layers = quantization["quantized_layers"]
        kinds: dict[str, list[str]] = {}
        for path, description in layers.items():
            kinds.setdefault(json.dumps(description, sort_keys=True), []).append(path)
        made["config_groups"] = {
            f"group_{number}": {**_group(json.loads(kind)), "targets": sorted(paths)}
            for number, (kind, paths) in enumerate(kinds.items())
        }
        made["quantized_layers"] = dict(layers)
    made |= {"ignore": quantization.get("exclude_modules") or [], "quant_algo": algorithm}
    return {**made, "producer": dict(file["producer"]), "quant_method": "modelopt"}


def _group(description: Mapping[str, Any]) -> Description:
    """A group of layers as the section has it."""
    algorithm = description["quant_algo"]
    bits = {"W8A16": 8, "W8A8_SQ_PER_CHANNEL": 8, "W4A16_AWQ": 4}.get(algorithm)
    weights: Description = {"dynamic": False, "num_bits": bits or 8, "type": "int" if bits else "float"}
    if "NVFP4" in algorithm:
        weights["num_bits"] = 4
    if description.get("group_size"):
        weights["group_size"] = description["group_size"]
    inputs = dict(weights)
    if "CHANNEL" in algorithm:
        weights["strategy"] = "channel"
    return (
        {"weights": weights}
        if "A16" in algorithm or "_wo" in algorithm
        else {"input_activations": inputs, "weights": weights}
    )


def file_of(config: Any, layers: Mapping[str, Any]) -> Description:
    """`hf_quant_config.json` of a model that was exported: `config` is its section, `layers` its packed ones."""
    algorithm = str(config.quant_algo)
    cache = config.kv_cache_quant_algo
    if cache is None and config.kv_cache_scheme is not None:
        is_fp8 = isinstance(config.kv_cache_scheme, Mapping) and config.kv_cache_scheme.get("num_bits") == 8
        cache = "FP8" if is_fp8 else config.kv_cache_scheme
    quantization: Description = {"quant_algo": config.quant_algo, "kv_cache_quant_algo": cache}
    first = next(iter(layers.values()), None)
    if algorithm in _SIZED and first is not None:
        quantization["group_size"] = first.in_features // first.weight_scale.shape[-1]
    if "AWQ" in algorithm:
        quantization["has_zero_point"] = False
        given = config.pre_quant_scale
        smoothed = any(hasattr(layer, "pre_quant_scale") for layer in layers.values())
        quantization["pre_quant_scale"] = smoothed if given is None else given
    if config.quantized_layers is not None:
        quantization["quantized_layers"] = dict(config.quantized_layers)
    quantization["exclude_modules"] = list(config.ignore or ())
    return {"producer": dict(config.producer or {"name": "modelopt"}), "quantization": quantization}
