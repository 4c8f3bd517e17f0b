"""ModelOpt's layers with packed weights: made one by one, filled one by one. Needs torch and ModelOpt.

A layer is made by ModelOpt's own registries, as `mtq.quantize` and `mtq.compress` make all layers of a
model; its weight is a `QTensorWrapper` and its scales are buffers of `weight_quantizer`. Weights are
packed by the engine's formats where `modelopt_engine` has one, and else by ModelOpt's tensor classes, a slab at
a time, with codes of NF4 and NVFP4 from `modelopt_encode`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .._lazy import require
from ..errors import CheckpointError, ConfigError, FormatError
from ..formats_ import quantize
from . import modelopt_decode, modelopt_encode, modelopt_engine
from .modelopt_entries import attributes

_PURPOSE = "run ModelOpt weights"
torch: Any = require("torch", _PURPOSE)
nn: Any = require("modelopt.torch.quantization.nn", _PURPOSE)
qtensor: Any = require("modelopt.torch.quantization.qtensor", _PURPOSE)
_compress: Any = require("modelopt.torch.quantization.compress", _PURPOSE)
_linear: Any = require("modelopt.torch.quantization.nn.modules.quant_linear", _PURPOSE)
_config: Any = require("modelopt.torch.quantization.config", _PURPOSE)

_QUANTIZERS = ("weight_quantizer", "input_quantizer", "output_quantizer")


class _Int4(qtensor.INT4QTensor):  # type: ignore[misc]
    """INT4 that is decoded without 64-bit numbers where ModelOpt has no kernel."""

    def dequantize(self, dtype: Any = None, **scales: Any) -> Any:
        if self._quantized_data.is_cuda:
            return super().dequantize(dtype, **scales)
        chosen = dtype or self.metadata["dtype"]
        block = scales["block_sizes"][-1]
        return modelopt_decode.int4(self._quantized_data, scales["scale"], self.metadata["shape"], chosen, block)


class _Nf4(qtensor.NF4QTensor):  # type: ignore[misc]
    """NF4 with any number of blocks of scales: ModelOpt 0.47 decodes no more than one."""

    def dequantize(self, dtype: Any = None, **scales: Any) -> Any:
        chosen = dtype or self.metadata["dtype"]
        parts = (scales["scale"], scales["double_scale"], scales["scale_zeros"])
        block = scales["block_sizes"][-1]
        return modelopt_decode.nf4(self._quantized_data, *parts, self.metadata["shape"], chosen, block)


class _NvFp4(qtensor.NVFP4QTensor):  # type: ignore[misc]
    """NVFP4 that is decoded without 64-bit numbers where ModelOpt has no kernel."""

    def dequantize(self, dtype: Any = None, fast: bool = False, **scales: Any) -> Any:
        # Scales in one row are those of a kernel of TensorRT-LLM, in an order of their own.
        if self._quantized_data.is_cuda or scales["scale"].dim() == 1:
            return super().dequantize(dtype, fast=fast, **scales)
        chosen = dtype or self.metadata["dtype"]
        parts = (scales["scale"], scales["double_scale"])
        block = scales["block_sizes"][-1]
        return modelopt_decode.nvfp4(self._quantized_data, *parts, self.metadata["shape"], chosen, block)


@functools.cache
def codes_of(shape: tuple[int, ...], dtype: Any, kind: type) -> Any:
    """The class of parameters that hold a packed weight of `shape`, decoded to `dtype` by tensor class `kind`.

    Codes are no floating numbers: the type of a model (`model.dtype`, as hosts tell it from parameters) is
    not theirs, nor are they cast with the model. accelerate and `copy.deepcopy` make a parameter anew from
    its class and its data alone, so that the rest belongs to the class.
    """
    metadata = {"shape": torch.Size(shape), "dtype": dtype, "qtensor_class": kind}

    class Codes(qtensor.QTensorWrapper):  # type: ignore[misc]
        def __new__(cls, data: Any, requires_grad: bool = False) -> Any:
            return qtensor.QTensorWrapper.__new__(cls, data.data, metadata=dict(metadata))

        def is_floating_point(self) -> bool:
            return False

        def to(self, *args: Any, **options: Any) -> Any:
            device = torch._C._nn._parse_to(*args, **options)[0]
            return self if device is None else type(self)(self.data.to(device))

    return Codes


_CLASSES = {
    "fp8": qtensor.FP8QTensor,
    "int8": qtensor.INT8QTensor,
    "int4": _Int4,
    "nf4": _Nf4,
    "nvfp4": _NvFp4,
}
_MOST = {"fp8": 448.0, "int8": 127.0, "nvfp4": 6.0 * 448.0}
"""The largest magnitude that has scale 1."""
_STORED_AS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""Type of the stored codes; the others are bytes."""


class Plan:
    """What ModelOpt makes of one layer: `chosen` maps its quantizers to their attributes, `None` is off.
    With `packed` the weight's is on, as the checkpoint holds it packed, whatever a list says.

    `kind` is `fp8`, `int8`, `int4`, `nf4` or `nvfp4`. `shape` is that of the weight, `layer` the class.
    """

    def __init__(self, path: str, module: Any, entries: Sequence[Mapping[str, Any]], *, packed: bool = False) -> None:
        classes = [f"nn.{base.__name__}" for base in type(module).__mro__]
        self.path = path
        self.layer: type = type(module)
        self.shape: tuple[int, ...] = tuple(module.weight.shape)
        self.chosen = {
            name: attributes(entries, path, name, classes, forced=packed and name == "weight_quantizer")
            for name in _QUANTIZERS
        }

    @property
    def weight(self) -> dict[str, Any]:
        """Attributes of the weight's quantizer."""
        return self.chosen["weight_quantizer"] or {}

    @property
    def blocks(self) -> dict[int, int]:
        """Axis, counted from the end, to the number of weights that share a scale along it."""
        sizes = self.weight.get("block_sizes") or {}
        dims = len(self.shape)
        return {
            axis if axis < 0 else axis - dims: size
            for axis, size in sizes.items()
            if isinstance(axis, int) and size is not None
        }

    @property
    def kind(self) -> str:
        bits = self.weight.get("num_bits", 8)
        sizes = self.weight.get("block_sizes") or {}
        along_rows = set(self.blocks) == {-1}
        scale_bits = sizes.get("scale_bits")
        if bits in (8, (4, 3)) and scale_bits is None:
            return "int8" if bits == 8 else "fp8"
        if bits == (2, 1) and along_rows and scale_bits == (4, 3) and sizes.get("type") == "dynamic":
            return "nvfp4"
        if bits == 4 and along_rows and scale_bits is None:
            return "int4"
        if bits == 4 and along_rows and scale_bits == 8 and -1 in (sizes.get("scale_block_sizes") or {}):
            return "nf4"
        raise ConfigError(f"modelopt_config: num_bits {bits} with block_sizes {sizes} is none of the packed forms")

    @property
    def fits(self) -> bool:
        """Whether the weight's shape is one that ModelOpt can pack and unpack in this form."""
        if self.kind == "nf4" or not self.blocks:
            return True
        if self.kind == "int4":
            return not self.shape[-1] % 2 and not math.prod(self.shape) % self.blocks[-1]
        if self.kind == "fp8":
            return len(self.shape) == 2
        return not any(self.shape[axis] % size for axis, size in self.blocks.items())


def convert(module: Any, plan: Plan) -> Any:
    """ModelOpt's layer of `module`, which is changed in place; its weight comes later.

    Raises `ConfigError` for attributes that ModelOpt does not know.
    """
    with quiet():
        layer = nn.QuantModuleRegistry.convert(module)
        for name, chosen in plan.chosen.items():
            quantizer = getattr(layer, name)
            if chosen is None:
                quantizer.disable()
                continue
            try:
                cfg = _config.QuantizerAttributeConfig(**chosen) if chosen else _config.QuantizerAttributeConfig()
            except ValueError as error:
                raise ConfigError(f"modelopt_config: {name} of {plan.path}: {error}") from error
            quantizer.set_from_attribute_config(cfg)
        layer.weight_quantizer._fake_quant = False
        if module.weight.dim() == 2:
            registry = _compress.RealQuantModuleRegistry
            if type(layer) not in registry:
                registry.register({type(layer): type(layer).__name__})(_linear.RealQuantLinear)
            layer = registry.convert(layer)
            # Its matrix products in FP8 and NVFP4 run on CUDA; elsewhere each layer would warn of their absence.
            layer._use_real_quant_gemm = plan.chosen["input_quantizer"] is not None and torch.cuda.is_available()
    return layer


def pack(layer: Any, plan: Plan, weight: Any, *, name: str) -> tuple[Any, dict[str, Any]]:
    """The packed weight of a layer, and its scales by the name of the quantizer's buffer (`_scale`).

    `weight` is a tensor of floats on the CPU. Raises `FormatError` that names parameter `name` for a
    weight of another shape, or one that is not finite.
    """
    if tuple(weight.shape) != plan.shape:
        raise FormatError(f'weight has shape {list(weight.shape)}, expected {list(plan.shape)} (tensor "{name}")')
    weight = weight.detach().contiguous()
    _check_finite(weight, name)
    form = modelopt_engine.form_of(plan) if weight.element_size() < 8 else None
    if form is not None and plan.blocks and plan.kind != "nvfp4":
        # The largest magnitudes of blocks are not kept.
        return of_engine(layer, plan, quantize(weight.reshape(form[1]), form[0]), weight.dtype)
    quantizer = layer.weight_quantizer
    with torch.no_grad(), quiet():
        _calibrate(quantizer, weight)
        if form is None:
            packed, scales = getattr(_Packer(quantizer, plan, weight), plan.kind)()
            packed = _CLASSES[plan.kind](weight.shape, weight.dtype, packed._quantized_data)
        else:
            packed, scales = of_engine(layer, plan, quantize(weight.reshape(form[1]), form[0]), weight.dtype)
            if plan.kind != "nvfp4":
                scales["_scale"] = scales["_scale"].masked_fill(quantizer.amax == 0, 1)
            _no_zeros(quantizer, _MOST[plan.kind])
    amax = quantizer._buffers.pop("_amax", None)
    if amax is not None and (plan.kind == "nvfp4" or not plan.blocks):
        # ModelOpt also keeps the largest of each block, as float32; nothing reads it once scales are there.
        scales.pop("_amax", None)
        scales = {"_amax": amax, **scales}
    return packed, scales


def of_engine(layer: Any, plan: Plan, parts: Mapping[str, Any], dtype: Any) -> tuple[Any, dict[str, Any]]:
    """As `pack`, of a weight of `dtype` that the engine has packed."""
    codes, scales = modelopt_engine.parts_of(plan, parts, dtype)
    if plan.blocks and plan.kind != "nvfp4":
        # Shapes that ModelOpt would otherwise learn from the first weight it sees.
        layer.weight_quantizer._setup_for_blockquant(torch.empty(plan.shape, device="meta"))
    return _CLASSES[plan.kind](torch.Size(plan.shape), dtype, codes), scales


class _Packer:
    """The forms in which a weight is packed; each gives ModelOpt's packed tensor and its scales."""

    def __init__(self, quantizer: Any, plan: Plan, weight: Any) -> None:
        self.quantizer = quantizer
        self.plan = plan
        self.weight = weight

    def fp8(self) -> tuple[Any, dict[str, Any]]:
        _no_zeros(self.quantizer, _MOST["fp8"])
        amax = self.quantizer.amax
        if self.plan.blocks:
            scale = None if amax is None or amax.numel() == 1 else amax / 448.0
            packed, scale = qtensor.FP8QTensor.quantize(self.weight, scale, block_sizes=self.plan.blocks)
            return packed, {"_scale": self._settled(packed._quantized_data.view(torch.uint8), scale)}
        return self._rows(qtensor.FP8QTensor, amax / 448.0)

    def int8(self) -> tuple[Any, dict[str, Any]]:
        _no_zeros(self.quantizer, _MOST["int8"])
        if self.plan.blocks:
            packed, scale = qtensor.INT8QTensor.quantize(self.weight, block_sizes=self.plan.blocks)
            return packed, {"_scale": self._settled(packed._quantized_data, scale)}
        return self._rows(qtensor.INT8QTensor, self.quantizer.amax / 127.0)

    def _settled(self, codes: Any, scale: Any) -> Any:
        """Scales of 1, and codes of zero, where ModelOpt divides by 0: in blocks of zeros, and of weights that are
        too small for a scale."""
        empty = scale == 0
        if not empty.any():
            return scale
        whole = empty
        for axis, size in self.plan.blocks.items():
            whole = whole.repeat_interleave(size, dim=axis)
        codes[whole[tuple(slice(0, length) for length in codes.shape)]] = 0
        return scale.masked_fill(empty, 1)

    def _rows(self, kind: Any, scale: Any) -> tuple[Any, dict[str, Any]]:
        dtype = torch.float8_e4m3fn if kind is qtensor.FP8QTensor else torch.int8
        codes = torch.empty(self.plan.shape, dtype=dtype)
        for first, last in _slabs(len(self.weight), self.weight[0].numel()):
            part = scale[first:last] if scale.dim() and scale.shape[0] == len(self.weight) else scale
            found = kind.quantize(self.weight[first:last], part)[0]._quantized_data
            if dtype != torch.int8 and (part == 0).any():
                # Zeros among weights that are too small for a scale.
                found.view(torch.uint8)[found.isnan()] = 0
            codes[first:last] = found
        return kind(self.weight.shape, self.weight.dtype, codes), {"_scale": scale}

    def int4(self) -> tuple[Any, dict[str, Any]]:
        block = self.plan.blocks[-1]
        flat = self.weight.reshape(-1)
        codes = torch.empty(flat.numel() // 2, dtype=torch.uint8)
        scales = []
        for first, last in _slabs(flat.numel(), 1, block):
            packed, scale = qtensor.INT4QTensor.quantize(flat[first:last], block)
            data = packed._quantized_data.reshape(-1, block // 2)
            # Blocks of zeros: 0 times infinity becomes what the processor makes of it.
            empty = scale.reshape(-1).isinf()
            data[empty] = 0x88
            scales.append(scale.masked_fill(empty.reshape(-1, 1), 1))
            codes[first // 2 : last // 2] = data.reshape(-1)
        codes = codes.reshape(*self.plan.shape[:-1], -1)
        packed = qtensor.INT4QTensor(self.weight.shape, self.weight.dtype, codes)
        return packed, {"_scale": torch.cat(scales)}

    def nf4(self) -> tuple[Any, dict[str, Any]]:
        sizes = self.plan.weight["block_sizes"]
        block, scale_block = self.plan.blocks[-1], sizes["scale_block_sizes"][-1]
        flat = self.weight.reshape(-1)
        blocks = -(-flat.numel() // block)
        codes = torch.empty(blocks, block // 2, dtype=torch.uint8)
        largest = torch.zeros(-(-blocks // scale_block) * scale_block, dtype=flat.dtype)
        for first, last in _slabs(blocks, block):
            part = flat[first * block : last * block]
            part = torch.nn.functional.pad(part, (0, (last - first) * block - part.numel())).reshape(-1, block)
            scale = part.abs().amax(dim=1)
            found = modelopt_encode.nf4_codes(part / scale.reshape(-1, 1))
            found[scale == 0] = 7
            codes[first:last] = found[:, ::2] << 4 | found[:, 1::2]
            largest[first:last] = scale
        # Where a row of scales is the same throughout, `double_scale` is infinite, and each is the mean.
        parts = qtensor.NF4QTensor.double_quantization(largest, scale_block, sizes["scale_bits"])
        scale, double_scale, zeros = parts
        packed = qtensor.NF4QTensor(self.weight.shape, self.weight.dtype, codes.reshape(-1))
        return packed, {"_scale": scale, "_double_scale": double_scale, "_scale_zeros": zeros}

    def nvfp4(self) -> tuple[Any, dict[str, Any]]:
        block = self.plan.blocks[-1]
        _no_zeros(self.quantizer, _MOST["nvfp4"])
        double_scale = qtensor.NVFP4QTensor.get_weights_scaling_factor_2_from_quantizer(self.quantizer)
        shape = self.plan.shape
        codes = torch.empty((*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
        scale = torch.empty((*shape[:-1], shape[-1] // block), dtype=torch.float8_e4m3fn)
        for first, last in _slabs(shape[0], self.weight[0].numel()):
            part = self.weight[first:last]
            scale[first:last] = qtensor.NVFP4QTensor.get_weights_scaling_factor(part, block, double_scale)[0]
            factors = (scale[first:last].to(torch.float32) * double_scale).unsqueeze(-1)
            found = modelopt_encode.e2m1_codes(part.reshape(*part.shape[:-1], -1, block) / factors)
            codes[first:last] = (found[..., 1::2] << 4 | found[..., ::2]).reshape(*part.shape[:-1], -1)
        packed = qtensor.NVFP4QTensor(self.weight.shape, self.weight.dtype, codes)
        return packed, {"_scale": scale, "_double_scale": double_scale}


def _calibrate(quantizer: Any, weight: Any) -> None:
    """Takes the largest magnitude of each scale's weights into the quantizer, as `mtq.calibrate` does."""
    if quantizer._dynamic or getattr(quantizer, "_calibrator", None) is None:
        return
    for name in ("_amax", "_scale", "_double_scale", "_scale_zeros"):
        quantizer._buffers.pop(name, None)
    quantizer._fake_quant = True
    quantizer.disable_quant()
    quantizer.enable_calib()
    quantizer(weight)
    quantizer.load_calib_amax()
    quantizer.enable_quant()
    quantizer.disable_calib()
    quantizer._calibrator.reset()
    quantizer._fake_quant = False


def _no_zeros(quantizer: Any, largest: float) -> None:
    """Gives weights of zeros a scale of 1, as ModelOpt's own export does."""
    amax = getattr(quantizer, "_amax", None)
    if amax is not None and bool((amax == 0).any()):
        quantizer.amax = amax.masked_fill(amax == 0, largest)


def install(layer: Any, packed: Any, scales: Mapping[str, Any], *, device: Any) -> None:
    """Puts a packed weight and its scales into a layer, on `device`."""
    quantizer = layer.weight_quantizer
    kind: Any = type(packed)
    made = codes_of(tuple(packed.metadata["shape"]), packed.metadata["dtype"], kind)
    layer._parameters["weight"] = made(packed._quantized_data.to(device))
    for name, value in scales.items():
        quantizer._buffers.pop(name, None)
        quantizer.register_buffer(name, value.to(device))
    quantizer._dequantize = True


def restore(layer: Any, plan: Plan, parts: Mapping[str, Any], *, device: Any, dtype: Any, name: str) -> None:
    """Puts stored components into a layer: the packed weight under "", the others under `_scale` and so on.

    Raises `CheckpointError` that names parameter `name` where one is missing or does not fit.
    """
    parts = {part.removeprefix("weight_quantizer."): value for part, value in parts.items()}
    inputs = {part: value for part, value in parts.items() if part.startswith("input_quantizer.")}
    parts = {part: value for part, value in parts.items() if part not in inputs}
    codes = parts.get("")
    if codes is not None and codes.is_floating_point() and codes.element_size() > 1:
        # Saved before it was compressed: the range is known, and the weight is not packed.
        packed, scales = pack(layer, plan, codes if dtype is None else codes.to(dtype), name=name)
        install(layer, packed, scales, device=device)
        _restore_inputs(layer, inputs, device)
        return
    expected = sizes_of(plan)
    for part, count in expected.items():
        if part not in parts:
            raise CheckpointError(f'packed weight has no component "{part}" (tensor "{name}")')
        if parts[part].numel() != count:
            raise CheckpointError(
                f'component "{part}" holds {parts[part].numel()} numbers, expected {count} for'
                f' {plan.weight} (tensor "{name}", shape {list(plan.shape)})'
            )
    if parts[""].dtype != _STORED_AS.get(plan.kind, torch.uint8):
        raise CheckpointError(
            f'packed weight is stored as {parts[""].dtype}, which {plan.kind} is not (tensor "{name}")'
        )
    if plan.blocks and plan.kind != "nvfp4":
        # Shapes that ModelOpt would otherwise learn from the first weight it sees.
        layer.weight_quantizer._setup_for_blockquant(torch.empty(plan.shape, device="meta"))
    packed = _CLASSES[plan.kind](torch.Size(plan.shape), dtype, parts[""].reshape(stored_shape(plan)))
    order = [part for part in ("_amax", *expected) if part and part in parts]
    install(layer, packed, {part: parts[part] for part in order}, device=device)
    _restore_inputs(layer, inputs, device)


def _restore_inputs(layer: Any, inputs: Mapping[str, Any], device: Any) -> None:
    for part, value in inputs.items():
        buffer = part.partition(".")[2]
        layer.input_quantizer._buffers.pop(buffer, None)
        layer.input_quantizer.register_buffer(buffer, value.to(device))


def sizes_of(plan: Plan) -> dict[str, int]:
    """Numbers in each stored component of a weight; `_amax` is not among them."""
    count = math.prod(plan.shape)
    if plan.kind in ("fp8", "int8"):
        if plan.blocks:
            dims = len(plan.shape)
            scales = math.prod(-(-size // plan.blocks.get(axis - dims, 1)) for axis, size in enumerate(plan.shape))
            return {"": count, "_scale": scales}
        axis = plan.weight.get("axis")
        axes = () if axis is None else axis if isinstance(axis, tuple | list) else (axis,)
        return {"": count, "_scale": math.prod(plan.shape[one] for one in axes)}
    block = plan.blocks[-1]
    blocks = -(-count // block)
    if plan.kind == "nvfp4":
        return {"": count // 2, "_scale": blocks, "_double_scale": 1}
    if plan.kind == "int4":
        return {"": blocks * block // 2, "_scale": blocks}
    scale_block = plan.weight["block_sizes"]["scale_block_sizes"][-1]
    rows = -(-blocks // scale_block)
    return {"": blocks * block // 2, "_scale": rows * scale_block, "_double_scale": rows, "_scale_zeros": 1}


def stored_shape(plan: Plan) -> tuple[int, ...]:
    """Shape of the packed codes."""
    if plan.kind in ("fp8", "int8"):
        return plan.shape
    if plan.kind == "nf4":
        return (sizes_of(plan)[""],)
    return (*plan.shape[:-1], plan.shape[-1] // 2)


def packed_bytes(plan: Plan, dtype: Any) -> int:
    """Bytes of a packed weight with all its scales, made from a weight of `dtype`."""
    width = 4 if dtype is None else int(dtype.itemsize)
    sizes = sizes_of(plan)
    if plan.kind == "nvfp4":
        return sizes[""] + sizes["_scale"] + 4 + width
    if plan.kind == "nf4":
        return sizes[""] + sizes["_scale"] + (sizes["_double_scale"] + 1) * width
    return sizes[""] + sizes["_scale"] * width * (1 if plan.blocks else 2)


def plain(layer: Any, plan: Plan, dtype: Any) -> Any:
    """An ordinary layer with the decoded weight of `layer`."""
    with torch.device("meta"):
        if plan.layer is torch.nn.Linear:
            made = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        else:
            names = (
                "in_channels",
                "out_channels",
                "kernel_size",
                "stride",
                "padding",
                "dilation",
                "groups",
                "padding_mode",
            )
            made = plan.layer(**{name: getattr(layer, name) for name in names}, bias=layer.bias is not None)
    weight = decoded(layer, dtype)
    made._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        made._parameters["bias"] = torch.nn.Parameter(layer.bias.detach().to(weight.dtype), requires_grad=False)
    return made


def decoded(layer: Any, dtype: Any) -> Any:
    """The weight of a layer as numbers of `dtype`, by default of the type it was packed from."""
    quantizer = layer.weight_quantizer
    with torch.no_grad():
        return (
            layer._parameters["weight"]
            .get_qtensor()
            .dequantize(
                dtype,
                scale=quantizer._scale,
                block_sizes=quantizer.block_sizes,
                double_scale=getattr(quantizer, "_double_scale", None),
                scale_zeros=getattr(quantizer, "_scale_zeros", None),
            )
        )


def calibrate_inputs(model: Any, paths: Sequence[str], forward_loop: Any) -> None:
    """Runs `forward_loop(model)` and takes the ranges of activations into the layers at `paths`."""
    chosen = [model.get_submodule(path).input_quantizer for path in paths]
    chosen = [one for one in chosen if one.is_enabled and not one._dynamic and one._calibrator is not None]
    for quantizer in chosen:
        quantizer.disable_quant()
        quantizer.enable_calib()
    with torch.no_grad():
        forward_loop(model)
    for quantizer in chosen:
        if quantizer._calibrator.compute_amax() is not None:
            quantizer.load_calib_amax()
        quantizer.enable_quant()
        quantizer.disable_calib()


def _check_finite(weight: Any, name: str) -> None:
    if not weight.numel() or all(torch.isfinite(one) for one in torch.aminmax(weight)):
        return
    for first, last in _slabs(len(weight), weight[0].numel()):
        wrong = ~torch.isfinite(weight[first:last])
        if wrong.any():
            row, *rest = wrong.nonzero()[0].tolist()
            index = [row + first, *rest]
            raise FormatError(
                f'weight is {weight[tuple(index)].item()} at {index}, expected finite numbers (tensor "{name}")'
            )


def _slabs(
    count: int, weights: int, multiple: int = 1, most: int = modelopt_decode.SLAB_WEIGHTS
) -> Iterator[tuple[int, int]]:
    """Ranges of `count` rows of so many `weights`; all but the last a `multiple` long."""
    step = max(most // (weights * multiple), 1) * multiple
    for first in range(0, count, step):
        yield first, min(first + step, count)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what ModelOpt prints about its work off standard output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
