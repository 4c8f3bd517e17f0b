"""optimum-quanto's layers, made to run wherever torch runs, and its tensors from their components.

The layers here are optimum-quanto's own with these differences:

- 4-bit and 2-bit weights are unpacked with torch operations. The library compiles C++ for it on first use,
  which needs ninja and a compiler, and CUDA's where the weights are there.
- `int8` weights under bfloat16 inputs on the CPU reach torch's `_weight_int8pack_mm` only where the input
  features are a multiple of 16. With 4 times any other number it reads past the end of its operands:
  wrong results for one row of input, a segmentation fault for more.
- `int4` weights in bfloat16 are kept for torch's 4-bit kernel as the library does it, but not where that
  kernel refuses them (output features that are no multiple of 16), and they come back from it without a
  product with an identity matrix.

Results are those of the library bit for bit where it gives any.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .._lazy import require
from . import quanto_packing as packing
from . import quanto_tinygemm as tinygemm

_PURPOSE = "run quanto weights"
_quanto: Any = require("optimum.quanto", _PURPOSE)
_tensors: Any = require("optimum.quanto.tensor.packed", _PURPOSE)
_kernel: Any = require("optimum.quanto.tensor.weights.tinygemm", _PURPOSE)
_QLinear: Any = _quanto.QLinear
_QConv2d: Any = _quanto.QConv2d
_TinyGemm: Any = _kernel.TinyGemmWeightQBitsTensor
_Function: Any = torch.autograd.Function

QTYPES = {"int8": "qint8", "float8": "qfloat8", "int4": "qint4", "int2": "qint2"}
"""quanto's name of each type of weights."""
ALIGNMENT_BYTES = 16
"""Where torch's product of bfloat16 and int8 expects weights: elsewhere, as in files that are mapped, it crashes."""
_WEIGHTS = {_quanto.qtypes[name]: weights for weights, name in QTYPES.items()}
_STORED = {"_data": "_data._data"}
"""Where a component has another name in files: that of weights below eight bits."""


def weights_of(qtype: Any) -> str:
    """`int4` for `qint4`."""
    return _WEIGHTS[qtype]


def stored_name(component: str, weights: str) -> str:
    """Name in files of a component, after `weight.`."""
    return component if packing.BITS[weights] == 8 else _STORED.get(component, component)


def assemble(components: Mapping[str, Any], weights: str, shape: Sequence[int]) -> Any:
    """quanto's tensor for a weight of `shape` from its components, which are on the device it is for."""
    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    qtype = _quanto.qtypes[QTYPES[weights]]
    data, scale = components["_data"], components["_scale"]
    if packing.BITS[weights] == 8:
        axis = None if scale.ndim == 0 else 0
        if data.device.type == "cpu" and data.data_ptr() % ALIGNMENT_BYTES:
            data = data.clone()
        if data.device.type == "cuda" and not _has_cuda_compiler():
            return _quanto.WeightQBytesTensor(qtype, axis, size, stride, data, scale, None)
        return _quanto.WeightQBytesTensor.create(qtype, axis, size, stride, data, scale)
    shift = components["_shift"]
    group = packing.group_size(shape, weights)
    rows = scale.shape[0]
    if weights == "int4" and _for_tinygemm(size, group, scale):
        codes = packing.unpack(data, 4, rows).reshape(size)
        n_groups = size[1] // tinygemm.GROUP_SIZE
        pair = torch.stack(
            [scale.reshape(size[0], n_groups), tinygemm.mid_of(scale, shift).reshape(size[0], n_groups)], 2
        )
        kept = _kernel.TinyGemmPackedTensor(tinygemm.pack_rows(codes), size, stride)
        return _TinyGemm(qtype, 0, group, size, stride, kept, pair.transpose(0, 1).contiguous())
    if data.device.type == "cuda" and _has_kernel(size, scale):
        codes = packing.unpack(data, packing.BITS[weights], rows)
        return _quanto.WeightQBitsTensor.create(qtype, 0, group, size, stride, codes, scale, shift)
    inner = data.shape[1:]
    kept = _tensors.PackedTensor(
        data, packing.BITS[weights], torch.Size((rows, *inner)), torch.empty((rows, *inner), device="meta").stride()
    )
    return _quanto.WeightQBitsTensor(qtype, 0, group, size, stride, kept, scale, shift)


def components_of(weight: Any) -> dict[str, Any]:
    """The components of quanto's tensor, in the form in which they are stored, on its device."""
    if isinstance(weight, _quanto.WeightQBytesTensor):
        plain = weight if type(weight) is _quanto.WeightQBytesTensor else weight.weight_qbytes_tensor()
        return {"_data": plain._data, "_scale": plain._scale}
    if isinstance(weight, _TinyGemm):
        size, group = weight.size(), weight._group_size
        on_cpu = weight.device.type == "cpu"
        codes = tinygemm.unpack_rows(weight._data._data) if on_cpu else weight._data.unpack()
        scale = weight._scale_shift[:, :, 0].t().reshape(-1, 1)
        mid = weight._scale_shift[:, :, 1].t().reshape(-1, 1)
        data = packing.pack(codes.reshape(size.numel() // group, group), 4)
        return {"_data": data, "_scale": scale, "_shift": tinygemm.shift_of(scale, mid)}
    plain = weight if type(weight) is _quanto.WeightQBitsTensor else weight.weight_qbits_tensor()
    return {"_data": plain._data._data, "_scale": plain._scale, "_shift": plain._shift}


def decode(weight: Any, dtype: Any = None) -> Any:
    """The full-precision weight of quanto's tensor, rounded once to `dtype` (its own by default)."""
    return packing.decode(components_of(weight), weights_of(weight.qtype), weight.size(), dtype)


def _dequantized(weight: Any) -> Any:
    return packing.dequantize(components_of(weight), weights_of(weight.qtype), weight.size())


def _for_tinygemm(size: Any, group: int | None, scale: Any) -> bool:
    fits = len(size) == 2 and group == tinygemm.GROUP_SIZE and scale.dtype == torch.bfloat16
    return fits and scale.device.type == "cpu" and size[0] % tinygemm.ROWS_MULTIPLE == 0


def _has_kernel(size: Any, scale: Any) -> bool:
    """Whether the library's own choice of a CUDA form runs here."""
    if len(size) != 2 or size[0] % tinygemm.ROWS_MULTIPLE:
        return False
    return scale.dtype == torch.bfloat16 or _has_cuda_compiler()


def _has_cuda_compiler() -> bool:
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    has_compiler = home is not None and os.path.exists(os.path.join(home, "bin", "nvcc"))
    return has_compiler and bool(cpp_extension.is_ninja_available())


def _moved(weight: Any, device: Any, dtype: Any) -> Any:
    """The same weight on a device, its scales in another type."""
    parts = components_of(weight)
    moved = {name: part.to(device) if name == "_data" else part.to(device, dtype) for name, part in parts.items()}
    return torch.nn.Parameter(assemble(moved, weights_of(weight.qtype), weight.size()), requires_grad=False)


def _cloned(tensor: Any) -> Any:
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor.detach().clone()
    names, meta = tensor.__tensor_flatten__()
    parts = {name: _cloned(getattr(tensor, name)) for name in names}
    return type(tensor).__tensor_unflatten__(parts, meta, None, None)


class _Product(_Function):  # type: ignore[misc]
    """input @ weight.T + bias, with the gradient of the input (and of the bias)."""

    @staticmethod
    def forward(ctx: Any, input: Any, weight: Any, bias: Any) -> Any:
        ctx.weight = weight
        if isinstance(weight, _TinyGemm):
            # The kernel takes rows that lie in one piece; a slice or a transposed input does not.
            columns = input.reshape(-1, input.shape[-1]).contiguous()
            on_cpu = input.device.type == "cpu"
            product = torch._weight_int4pack_mm_for_cpu if on_cpu else torch._weight_int4pack_mm
            flat = product(columns, weight._data._data, weight._group_size, weight._scale_shift)
            output = flat.reshape(*input.shape[:-1], weight.shape[0])
        else:
            # Layers that a host keeps in float32 get such inputs, whatever the weight was packed from.
            output = torch.matmul(input, _dequantized(weight).to(input.dtype).t())
        return output if bias is None else output + bias

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = torch.matmul(gradient, _dequantized(ctx.weight).to(gradient.dtype))
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(tuple(range(gradient.ndim - 1)))
        return of_input, None, of_bias


class _State:
    """Saving, loading, moving and copying of a layer's weight through its components."""

    weight: Any
    weight_qtype: Any
    _parameters: dict[str, Any]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        weight = self.weight
        if not isinstance(weight, _quanto.QTensor):
            return super()._apply(fn, recurse)  # type: ignore[misc]
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[misc]
            # The library changes forms with compiled code, and refuses other types of scales.
            sample = fn(torch.empty(0, dtype=weight.dtype, device=weight.device))
            if (sample.device, sample.dtype) != (weight.device, weight.dtype):
                weight = _moved(weight, sample.device, sample.dtype)
        finally:
            self._parameters["weight"] = weight
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        if isinstance(self.weight, _quanto.QTensor):
            # quanto's tensors have no copy of their own.
            memo[id(self.weight)] = torch.nn.Parameter(_cloned(self.weight), requires_grad=False)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not isinstance(self.weight, _TinyGemm):
            super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
            return
        weights = weights_of(self.weight_qtype)
        for component, value in components_of(self.weight).items():
            destination[f"{prefix}weight.{stored_name(component, weights)}"] = value
        for name in ("bias", "input_scale", "output_scale"):
            value = getattr(self, name)
            if value is not None:
                destination[prefix + name] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weights = weights_of(self.weight_qtype)
        shapes = packing.component_shapes(self.weight.shape, weights)
        keys = {component: f"{prefix}weight.{stored_name(component, weights)}" for component in shapes}
        if packing.BITS[weights] < 8 and all(key in state_dict for key in keys.values()):
            # The library unpacks what it loads with compiled code.
            found = {component: state_dict.pop(key) for component, key in keys.items()}
            device = self.weight.device
            if device.type != "meta":
                found = {component: value.to(device) for component, value in found.items()}
            self.weight = torch.nn.Parameter(assemble(found, weights, self.weight.shape), requires_grad=False)
            # What is left is read as for any module.
            load = super(_quanto.QModuleMixin, self)._load_from_state_dict  # type: ignore[misc]
        else:
            load = super()._load_from_state_dict  # type: ignore[misc]
        load(state_dict, prefix, local_metadata, False, missing_keys, unexpected_keys, error_msgs)


class QuantoLinear(_State, _QLinear):  # type: ignore[misc]
    """A `torch.nn.Linear` whose weight is one of quanto's tensors."""

    def forward(self, input: Any) -> Any:
        weight = self.weight
        if not isinstance(weight, _quanto.QTensor):
            return super().forward(input)
        if isinstance(weight, _quanto.WeightQBitsTensor):
            if type(weight) in (_quanto.WeightQBitsTensor, _TinyGemm):
                return _Product.apply(input, weight, self.bias)
        elif input.device.type == "cpu" and weight.qtype is _quanto.qtypes["qint8"] and self.in_features % 16:
            return _Product.apply(input.to(weight.dtype), weight, self.bias)
        # The library's kernels take rows that lie in one piece.
        return super().forward(input.contiguous())


class QuantoConv2d(_State, _QConv2d):  # type: ignore[misc]
    """A `torch.nn.Conv2d` whose weight is one of quanto's tensors."""

    def forward(self, input: Any) -> Any:
        if not isinstance(self.weight, _quanto.QTensor):
            return super().forward(input)
        return self._conv_forward(input, _dequantized(self.weight), self.bias)


def layer_for(module: Any, weights: str) -> Any:
    """The layer that takes the place of a linear or convolution, on the meta device; `None` for any other."""
    dtype = module.weight.dtype
    shared = {"bias": module.bias is not None, "dtype": dtype, "device": "meta", "weights": QTYPES[weights]}
    if isinstance(module, torch.nn.Linear):
        layer = QuantoLinear(module.in_features, module.out_features, **shared)
    elif isinstance(module, torch.nn.Conv2d):
        layer = QuantoConv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            padding_mode=module.padding_mode,
            **shared,
        )
    else:
        return None
    layer.source_cls = type(module)
    layer.requires_grad_(False)
    layer.bias = module.bias
    for name in ("input_scale", "output_scale"):
        # Buffers are real in a skeleton: these are constants where activations are not quantized.
        setattr(layer, name, torch.ones((), dtype=dtype))
    return layer


def plain_layer(layer: Any, dtype: Any) -> Any:
    """The ordinary layer with the decoded weight of one of these, on its device."""
    weight = torch.nn.Parameter(decode(layer.weight, dtype), requires_grad=False)
    with torch.device("meta"):
        if isinstance(layer, torch.nn.Linear):
            plain: Any = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        else:
            plain = torch.nn.Conv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                stride=layer.stride,
                padding=layer.padding,
                dilation=layer.dilation,
                groups=layer.groups,
                padding_mode=layer.padding_mode,
                bias=layer.bias is not None,
            )
    plain.weight = weight
    if layer.bias is not None:
        plain.bias = torch.nn.Parameter(layer.bias.detach().to(weight.dtype), requires_grad=layer.bias.requires_grad)
    return plain
