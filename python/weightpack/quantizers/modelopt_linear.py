"""A linear layer with the bytes of ModelOpt's export, decoded where it runs. Needs torch alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._lazy import require
from ..errors import CheckpointError
from . import modelopt_decode

torch: Any = require("torch", "run ModelOpt weights")

FP8_CAPABILITY = (8, 9)
"""The oldest CUDA device with products of FP8 numbers."""


class Codes(torch.nn.Parameter):  # type: ignore[misc]
    """A packed weight. Codes are no floating numbers, and the type of a model (`model.dtype`, as hosts tell
    it from parameters) is not theirs; nor are they cast with the model."""

    def __new__(cls, data: Any, requires_grad: bool = False) -> Any:
        return super().__new__(cls, data.data, False)

    def is_floating_point(self) -> bool:
        return False


class PackedLinear(torch.nn.Linear):  # type: ignore[misc]
    """y = x W^T + b with W [out, in] as exported; `kind` says how it is packed.

    `weight` holds the codes and is no weight to compute with; scales are buffers under their names in
    the checkpoint, so that the state dict is the checkpoint's.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        with torch.device("meta"):
            super().__init__(in_features, out_features, bias=bias)
        self.weight.requires_grad_(False)
        self.kind = "plain"
        self.dtype = torch.float32

    def install(self, parts: Mapping[str, Any], *, device: Any, dtype: Any, name: str) -> None:
        """Takes the stored arrays, the codes under "". `dtype` is that of the decoded weight.

        Raises `CheckpointError` that names parameter `name` for arrays that are no packed form.
        """
        shape = (self.out_features, self.in_features)
        self.kind = kind_of(parts, shape, name)
        if dtype is not None:
            self.dtype = dtype
        for part, value in parts.items():
            if part == "":
                if self.kind == "plain":
                    weight = torch.nn.Parameter(value.to(device, self.dtype), requires_grad=False)
                else:
                    weight = Codes(value.to(device))
                self._parameters["weight"] = weight
            else:
                value = value.to(self.dtype) if part == "pre_quant_scale" else value
                self._buffers.pop(part, None)
                self.register_buffer(part, value.to(device))

    def decoded(self, dtype: Any = None) -> Any:
        """W as numbers of `dtype` [out, in]."""
        dtype = dtype or self.dtype
        weight = self.weight.detach()
        if self.kind == "plain":
            return weight.to(dtype)
        scale = self.weight_scale
        shape = (self.out_features, self.in_features)
        if self.kind in ("fp8", "int8"):
            return modelopt_decode.exported(weight, scale, dtype)
        if self.kind == "mxfp8":
            return modelopt_decode.exported(weight, torch.exp2(scale.float() - 127), dtype)
        if self.kind == "nvfp4":
            block = self.in_features // scale.shape[-1]
            return modelopt_decode.nvfp4(weight, scale, self.weight_scale_2.float(), shape, dtype, block)
        if self.kind == "mxfp4":
            return modelopt_decode.mxfp4(weight, scale, shape, dtype, self.in_features // scale.shape[-1])
        # The `weight_scale_2` of W4A8 is how a kernel turns the product into FP8, and no part of the weight.
        return modelopt_decode.int4_rows(weight, scale, dtype)

    def forward(self, x: Any) -> Any:
        """[..., in] to [..., out], in the type of `x`."""
        if hasattr(self, "pre_quant_scale"):
            x = x * self.pre_quant_scale.to(x.dtype)
        if self._runs_in_fp8(x):
            return self._fp8(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, self.decoded(x.dtype), bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Scales move with the model, and keep their type."""
        scales = {name: value for name, value in self._buffers.items() if name != "pre_quant_scale"}
        super()._apply(fn, recurse)
        for name, value in scales.items():
            moved = self._buffers[name]
            if moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self

    def _runs_in_fp8(self, x: Any) -> bool:
        if self.kind != "fp8" or not x.is_cuda or not hasattr(self, "input_scale") or x.requires_grad:
            return False
        aligned = self.in_features % 16 == 0 and self.out_features % 16 == 0
        one_scale = self.weight_scale.numel() == 1 and self.input_scale.numel() == 1
        wanted = x.dtype in (torch.bfloat16, torch.float16)
        return aligned and one_scale and wanted and torch.cuda.get_device_capability(x.device) >= FP8_CAPABILITY

    def _fp8(self, x: Any) -> Any:
        """The product of FP8 numbers, with activations in the range that was calibrated."""
        scale = self.input_scale.float().reshape(())
        limit = torch.finfo(torch.float8_e4m3fn).max
        rows = (x.reshape(-1, self.in_features).float() / scale).clamp(-limit, limit).to(torch.float8_e4m3fn)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.weight_scale.float().reshape(()),
            bias=bias,
            out_dtype=x.dtype,
        )
        return out.reshape(*x.shape[:-1], self.out_features)

    def plain(self, dtype: Any = None) -> Any:
        """An ordinary layer with the decoded weight; `pre_quant_scale` is part of it."""
        with torch.device("meta"):
            made = torch.nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        weight = self.decoded(torch.float32 if hasattr(self, "pre_quant_scale") else dtype)
        if hasattr(self, "pre_quant_scale"):
            weight = (weight * self.pre_quant_scale.float()).to(dtype or self.dtype)
        made._parameters["weight"] = torch.nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            made._parameters["bias"] = torch.nn.Parameter(self.bias.detach().to(weight.dtype), requires_grad=False)
        return made

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


def kind_of(parts: Mapping[str, Any], shape: tuple[int, int], name: str) -> str:
    """How a weight of `shape` [N, K] is packed: `fp8`, `mxfp8`, `nvfp4`, `mxfp4`, `int4`, `int8`, or `plain`.

    Raises `CheckpointError` that names parameter `name` for arrays that are none of these.
    """
    if "" not in parts:
        raise CheckpointError(f'packed weight has scales and no codes (tensor "{name}")')
    codes, scale = parts[""], parts.get("weight_scale")
    rows, columns = shape
    found = tuple(codes.shape)
    if codes.is_floating_point() and codes.element_size() > 1 and found == shape:
        return "plain"
    if scale is None:
        raise CheckpointError(f'weight is stored as {codes.dtype}, and has no weight_scale (tensor "{name}")')
    sizes = tuple(scale.shape)
    by_row = len(sizes) == 2 and sizes[0] == rows and sizes[1] > 0 and columns % sizes[1] == 0
    if found == shape and codes.dtype == torch.float8_e4m3fn:
        if scale.dtype == torch.uint8 and by_row:
            return "mxfp8"
        if scale.is_floating_point() and modelopt_decode.blocks_of(sizes, shape) is not None:
            return "fp8"
    elif found == shape and codes.dtype == torch.int8 and modelopt_decode.blocks_of(sizes, shape) is not None:
        return "int8"
    elif found == (rows, columns // 2) and codes.dtype == torch.uint8 and by_row:
        if scale.dtype == torch.uint8:
            return "mxfp4"
        if scale.dtype == torch.float8_e4m3fn and "weight_scale_2" in parts:
            return "nvfp4"
    if found == (rows // 2, columns) and codes.dtype == torch.uint8 and by_row and scale.is_floating_point():
        return "int4"
    raise CheckpointError(
        f"weight is stored as {codes.dtype} {list(found)} with weight_scale {scale.dtype} {list(sizes)}, which is no"
        f' packed form of {list(shape)} (tensor "{name}")'
    )
