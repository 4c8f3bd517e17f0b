"""Layers of bitsandbytes that run on any CPU: imported once a model is built, with torch and bitsandbytes.

They are bitsandbytes' own classes, with its own forward on a GPU, and differ on the CPU: weights are
decoded by weightpack for each product, and nothing of the layer is changed by running it. The state
dict holds the bytes that were loaded, whatever was computed in between.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from .._lazy import require
from ..errors import CheckpointError, WeightpackError
from ..formats_ import dequantize

_PURPOSE = "run bitsandbytes weights"
torch: Any = require("torch", _PURPOSE)
bnb: Any = require("bitsandbytes", _PURPOSE)

STATE = "quant_state.bitsandbytes__"
"""How the name of the component that describes the others begins; `nf4` or `fp4` follows."""


def params_4bit(name: str, parts: Mapping[str, Any], shape: tuple[int, ...], device: Any) -> Any:
    """The parameter of a packed weight of `shape` [N, K] on `device`.

    `parts` maps components to tensors as files hold them; the main one may be stored as any element
    type, its bytes are the codes. Raises `CheckpointError` that names parameter `name` where a
    component is missing or does not fit.
    """
    states = sorted(part for part in parts if part.startswith(STATE))
    if len(states) != 1:
        found = f"has {', '.join(states)}" if states else "has no quant_state"
        raise CheckpointError(
            f'packed weight {found}, expected one "{STATE}nf4" or "{STATE}fp4" (tensor "{name}")',
            hint=None if states else "without it the weight cannot be decoded; the file was not saved whole",
        )
    described = _described(name, parts[states[0]])
    nested = ("nested_absmax", "nested_quant_map") if "nested_offset" in described else ()
    lacking = [part for part in ("", "absmax", "quant_map", *nested) if part not in parts]
    if lacking:
        listed = ", ".join(part or "weight" for part in lacking)
        raise CheckpointError(f'packed weight has no {listed} beside its quant_state (tensor "{name}")')
    _check_sizes(name, parts, described, shape)
    stored = {key: value for key, value in parts.items() if key and key in _COMPONENTS | set(states)}
    state = bnb.functional.QuantState.from_dict(stored, device=torch.device(device))
    codes = parts[""].to(device)
    return bnb.nn.Params4bit(
        codes,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=codes.dtype,
        bnb_quantized=True,
    )


_COMPONENTS = {"absmax", "quant_map", "nested_absmax", "nested_quant_map"}


def _described(name: str, state: Any) -> dict[str, Any]:
    """The JSON of a packed weight."""
    try:
        described = json.loads(bytes(state.detach().cpu().reshape(-1).view(torch.uint8).tolist()))
    except ValueError as error:
        raise CheckpointError(f'quant_state is not JSON: {error} (tensor "{name}")') from error
    needed = {"quant_type", "blocksize", "dtype", "shape"}
    if not isinstance(described, dict) or not needed <= described.keys():
        raise CheckpointError(f'quant_state is not what bitsandbytes writes (tensor "{name}")')
    return described


def _check_sizes(name: str, parts: Mapping[str, Any], described: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    if list(described["shape"]) != list(shape):
        raise CheckpointError(
            f'packed weight is of shape {list(described["shape"])}, the model has {list(shape)} (tensor "{name}")'
        )
    weights = shape[0] * shape[1]
    blocks = -(-weights // int(described["blocksize"]))
    held = parts[""].numel() * parts[""].element_size()
    if held != -(-weights // 2):
        raise CheckpointError(f'{held} bytes of codes for {weights} weights of 4 bits (tensor "{name}")')
    wanted = {"absmax": blocks}
    if "nested_offset" in described:
        wanted["nested_absmax"] = -(-blocks // int(described["nested_blocksize"]))
    for part, count in wanted.items():
        if parts[part].numel() != count:
            raise CheckpointError(f'{part} holds {parts[part].numel()} numbers, expected {count} (tensor "{name}")')


def absmax_of(state: Any) -> Any:
    """The scale of each block, float32 [blocks], of a `QuantState`."""
    if not state.nested:
        return state.absmax.float()
    scales = state.state2.absmax.float().repeat_interleave(state.state2.blocksize)[: state.absmax.numel()]
    return state.state2.code.float()[state.absmax.long()] * scales + state.offset


def decode_4bit(weight: Any, dtype: Any) -> Any:
    """The weights of a packed parameter, [N, K], rounded once to `dtype`, where the parameter is."""
    state = weight.quant_state
    if weight.device.type != "cpu":
        wanted = copy.copy(state)
        wanted.dtype = dtype
        return bnb.functional.dequantize_4bit(weight.data, wanted)
    return dequantize(
        {"": weight.data.reshape(-1, 1).view(torch.uint8), "absmax": absmax_of(state)},
        f"bitsandbytes:{state.quant_type}",
        shape=tuple(state.shape),
        dtype=dtype,
        block_size=state.blocksize,
    )


class _Product4bit(torch.autograd.Function):  # type: ignore[misc]
    """x of shape [..., K] times the transposed weight, plus a bias. Keeps the packed weight only: it is decoded
    again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Any, bias: Any, weight: Any) -> Any:
        ctx.weight = weight
        ctx.dtype = x.dtype
        return torch.nn.functional.linear(x, decode_4bit(weight, x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Any) -> Any:
        of_x, of_bias, _ = ctx.needs_input_grad
        x = bias = None
        if of_x:
            x = (gradient.to(ctx.dtype) @ decode_4bit(ctx.weight, ctx.dtype)).to(ctx.dtype)
        if of_bias:
            bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return x, bias, None


class Linear4bit(bnb.nn.Linear4bit):  # type: ignore[misc]
    """bitsandbytes' `Linear4bit` whose weight is packed from the start, and which keeps it so.

    On the CPU x is cast to `compute_dtype` (`None`: as it comes), multiplied with the decoded weight, and
    the result cast back.
    """

    @classmethod
    def on_meta(
        cls,
        in_features: int,
        out_features: int,
        *,
        bias: Any,
        compute_dtype: Any,
        quant_type: str,
        double_quant: bool,
        storage: Any,
    ) -> Any:
        """An empty layer: its weight has the size of the codes. `bias` is the parameter itself, or `None`."""
        with torch.device("meta"):
            layer = cls(
                in_features,
                out_features,
                bias=False,
                compute_dtype=compute_dtype,
                compress_statistics=double_quant,
                quant_type=quant_type,
                quant_storage=storage,
            )
            elements = -(-in_features * out_features // 2) // storage.itemsize
            layer.weight = bnb.nn.Params4bit(
                torch.empty((elements, 1), dtype=storage),
                compress_statistics=double_quant,
                quant_type=quant_type,
                quant_storage=storage,
                bnb_quantized=True,
            )
        layer.bias = bias
        return layer.requires_grad_(False)

    def set_weight(self, weight: Any) -> None:
        """Puts a parameter made by `params_4bit` in place."""
        weight.module = self
        self._parameters["weight"] = weight
        self.quant_state = weight.quant_state
        self.quant_storage = weight.quant_storage

    def forward(self, x: Any) -> Any:
        """x of shape [..., K] gives [..., N], in the type of x."""
        weight = self.weight
        if x.device.type != "cpu" or weight.device.type != "cpu":
            return super().forward(x)
        if getattr(weight, "quant_state", None) is None:
            bnb.nn.modules.fix_4bit_weight_quant_state_from_module(self)
            weight = self.weight
        dtype = self.compute_dtype if self.compute_type_is_set else None
        inner = x if dtype is None else x.to(dtype)
        bias = None if self.bias is None else self.bias.to(inner.dtype)
        if torch.is_grad_enabled() and (inner.requires_grad or (bias is not None and bias.requires_grad)):
            return _Product4bit.apply(inner, bias, weight).to(x.dtype)
        return torch.nn.functional.linear(inner, decode_4bit(weight, inner.dtype), bias).to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Codes that are stored as a floating type are bytes all the same, and are not cast."""
        weight = self._parameters["weight"]
        storage = weight.dtype
        if not storage.is_floating_point or getattr(weight, "quant_state", None) is None:
            return super()._apply(fn, recurse)
        weight.data = weight.data.view(torch.uint8)
        try:
            return super()._apply(fn, recurse)
        finally:
            weight = self._parameters["weight"]
            weight.data = weight.data.view(storage)

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
        """Takes a saved weight with all its statistics."""
        name = f"{prefix}weight"
        arguments = (prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        start = f"{name}."
        parts = {key[len(start) :]: value for key, value in state_dict.items() if key.startswith(start)}
        if name not in state_dict or not any(part.startswith(STATE) for part in parts):
            super()._load_from_state_dict(state_dict, *arguments)
            return
        parts[""] = state_dict[name]
        device = self.weight.device if self.weight.device.type != "meta" else parts[""].device
        try:
            own = {part: value.detach().clone() for part, value in parts.items()}
            self.set_weight(params_4bit(name, own, (self.out_features, self.in_features), device))
        except WeightpackError as error:
            error_msgs.append(str(error))
        rest = {key: value for key, value in state_dict.items() if key != name and not key.startswith(start)}
        super()._load_from_state_dict(rest, *arguments)
        if name in missing_keys:
            missing_keys.remove(name)


def params_8bit(name: str, parts: Mapping[str, Any], shape: tuple[int, ...], device: Any) -> Any:
    """The parameter of an int8 weight of `shape` [N, K] on `device`: `""` int8 [N, K], `SCB` float32 [N].

    Raises `CheckpointError` that names parameter `name` where a component is missing or does not fit.
    """
    lacking = [part or "weight" for part in ("", "SCB") if part not in parts]
    if lacking:
        raise CheckpointError(f'packed weight has no {", ".join(lacking)} (tensor "{name}")')
    codes, scales = parts[""], parts["SCB"]
    if codes.dtype != torch.int8 or tuple(codes.shape) != tuple(shape):
        raise CheckpointError(
            f'weight is {codes.dtype} {list(codes.shape)}, expected int8 {list(shape)} (tensor "{name}")'
        )
    if scales.numel() != shape[0]:
        raise CheckpointError(f'SCB holds {scales.numel()} numbers, expected {shape[0]} (tensor "{name}")')
    order = parts.get("weight_format")
    if order is not None and int(order) != 0:
        raise CheckpointError(
            f'weight_format is {int(order)}, expected 0, rows in order (tensor "{name}")',
            hint="a release of bitsandbytes that still reads this layout can save the model anew",
        )
    codes = codes.to(device)
    return bnb.nn.Int8Params(
        codes,
        requires_grad=False,
        has_fp16_weights=False,
        CB=codes,
        SCB=scales.reshape(-1).float().to(device),
    )


def params_16bit(weights: Any, device: Any, dtype: Any) -> Any:
    """The parameter of a weight that is packed anew in each forward."""
    return bnb.nn.Int8Params(weights.to(device, dtype), requires_grad=False, has_fp16_weights=True)


def decode_8bit(codes: Any, scales: Any, dtype: Any) -> Any:
    """int8 weights [N, K] with the largest magnitude of each row [N], rounded once to `dtype`, where they are."""
    if codes.device.type != "cpu":
        return bnb.functional.int8_vectorwise_dequant(codes, scales).to(dtype)
    return dequantize({"": codes.detach(), "SCB": scales.detach()}, "bitsandbytes:int8", dtype=dtype)


def _multiply_8bit(x: Any, codes: Any, scales: Any, bias: Any, threshold: float) -> Any:
    """LLM.int8: rows of x [M, K] are rounded to int8, columns that reach `threshold` multiplied as they are."""
    packed, stats, outliers = bnb.functional.int8_vectorwise_quant(x.to(torch.float16), threshold=threshold)
    ops = torch.ops.bitsandbytes
    if threshold > 0:
        return ops.int8_mixed_scaled_mm(x, packed, codes, stats, scales, outliers, bias)[0]
    return ops.int8_scaled_mm.default(packed, codes, stats, scales, bias=bias, dtype=x.dtype)


class _Product8bit(torch.autograd.Function):  # type: ignore[misc]
    """x of shape [M, K] times the transposed int8 weight, plus a bias; the gradient of x is that of the decoded
    weight. `rounds` says whether x is rounded to int8, as in inference."""

    @staticmethod
    def forward(ctx: Any, x: Any, bias: Any, codes: Any, scales: Any, threshold: float, rounds: bool) -> Any:
        ctx.codes, ctx.scales, ctx.dtype = codes, scales, x.dtype
        if rounds:
            return _multiply_8bit(x, codes, scales, bias, threshold)
        return torch.nn.functional.linear(x, decode_8bit(codes, scales, x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Any) -> Any:
        x = bias = None
        if ctx.needs_input_grad[0]:
            x = gradient.to(ctx.dtype) @ decode_8bit(ctx.codes, ctx.scales, ctx.dtype)
        if ctx.needs_input_grad[1]:
            bias = gradient.sum(0)
        return x, bias, None, None, None, None


class Linear8bitLt(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """bitsandbytes' `Linear8bitLt`; on the CPU a forward moves and casts nothing of it.

    There x is rounded to int8 row by row when the layer evaluates, as bitsandbytes does; when it trains the
    weight is decoded and x is left alone.
    """

    @classmethod
    def on_meta(
        cls, in_features: int, out_features: int, *, bias: Any, threshold: float, has_fp16_weights: bool
    ) -> Any:
        """An empty layer. `bias` is the parameter itself, or `None`."""
        with torch.device("meta"):
            layer = cls(in_features, out_features, bias=False, has_fp16_weights=has_fp16_weights, threshold=threshold)
            if not has_fp16_weights:
                empty = torch.empty((out_features, in_features), dtype=torch.int8)
                layer.weight = bnb.nn.Int8Params(empty, requires_grad=False, has_fp16_weights=False)
        layer.bias = bias
        return layer.requires_grad_(False)

    def set_weight(self, weight: Any) -> None:
        """Puts a parameter made by `params_8bit` in place."""
        self._parameters["weight"] = weight
        self.state.CB = self.state.SCB = None

    def scales(self) -> Any:
        """`SCB`, float32 [N], which a forward on a GPU moves from the weight to the state; `None` before loading."""
        return self.weight.SCB if getattr(self.weight, "SCB", None) is not None else self.state.SCB

    def forward(self, x: Any) -> Any:
        """x of shape [..., K] gives [..., N], in the type of x."""
        scales = self.scales()
        if x.device.type != "cpu" or self.weight.dtype != torch.int8 or scales is None:
            return super().forward(x)
        codes = self.weight.data
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        rounds = not self.training and rows.numel() > 0
        out = _Product8bit.apply(rows, bias, codes, scales, self.state.threshold, rounds)
        return out.reshape(*x.shape[:-1], codes.shape[0])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Codes and scales stay together, wherever they stand."""
        super()._apply(fn, recurse)
        weight, state = self._parameters["weight"], self.state
        if weight.dtype == torch.int8 and weight.device.type != "meta":
            for holder in (weight, state):
                if getattr(holder, "CB", None) is not None:
                    holder.CB = weight.data
                if getattr(holder, "SCB", None) is not None:
                    holder.SCB = holder.SCB.to(weight.device)
        return self

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
        """Takes a saved weight with its scales."""
        name = f"{prefix}weight"
        arguments = (prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if name not in state_dict or f"{prefix}SCB" not in state_dict:
            super()._load_from_state_dict(state_dict, *arguments)
            return
        keys = {"": name, "SCB": f"{prefix}SCB", "weight_format": f"{prefix}weight_format"}
        parts = {part: state_dict[key].detach().clone() for part, key in keys.items() if key in state_dict}
        device = self.weight.device if self.weight.device.type != "meta" else parts[""].device
        try:
            self.set_weight(params_8bit(name, parts, (self.out_features, self.in_features), device))
        except WeightpackError as error:
            error_msgs.append(str(error))
        rest = {key: value for key, value in state_dict.items() if key not in keys.values()}
        super()._load_from_state_dict(rest, *arguments)
        if name in missing_keys:
            missing_keys.remove(name)
