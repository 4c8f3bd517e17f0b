"""Layers of bitsandbytes that run on any CPU: imported once a model is built, with torch and bitsandbytes.

They are bitsandbytes' own classes, with its own forward on a GPU, and differ on the CPU: weights are
decoded by weightpack for each product, and nothing of the layer is changed by running it. The state
dict holds the bytes that were loaded, whatever was computed in between.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from .._lazy import require
from ..errors import BackendError, CheckpointError, WeightpackError
from .bitsandbytes_products import decode_4bit, decode_8bit, multiply_4bit, multiply_8bit

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
    described = _described(name, states[0], parts[states[0]])
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


_BLOCK_SIZES = tuple(1 << power for power in range(5, 13))
_FIELDS_4BIT = ("quant_state", "blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized")
_COMPONENTS = {"absmax", "quant_map", "nested_absmax", "nested_quant_map"}


def _described(name: str, key: str, state: Any) -> dict[str, Any]:
    """The JSON of a packed weight, whose values are what they should be."""
    try:
        described = json.loads(bytes(state.detach().cpu().reshape(-1).view(torch.uint8).tolist()))
    except ValueError as error:
        raise CheckpointError(f'quant_state is not JSON: {error} (tensor "{name}")') from error
    if not isinstance(described, dict):
        raise CheckpointError(f'quant_state is not what bitsandbytes writes (tensor "{name}")')
    checks: dict[str, Callable[[Any], bool]] = {
        "quant_type": lambda value: key == f"{STATE}{value}",
        "blocksize": lambda value: value in _BLOCK_SIZES,
        "dtype": lambda value: value in ("float32", "float16", "bfloat16"),
        "shape": lambda value: isinstance(value, list) and len(value) == 2,
    }
    if "nested_offset" in described:
        checks["nested_offset"] = lambda value: isinstance(value, int | float)
        checks["nested_blocksize"] = lambda value: isinstance(value, int) and value > 0
        checks["nested_dtype"] = lambda value: value == "float32"
    for field, is_right in checks.items():
        if not is_right(described.get(field)):
            raise CheckpointError(
                f'quant_state is not what bitsandbytes writes: {field} is {described.get(field)!r} (tensor "{name}")'
            )
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
    is_nested = "nested_offset" in described
    if parts["absmax"].is_floating_point() == is_nested:
        kind = "packed" if is_nested else "not packed"
        raise CheckpointError(f'absmax is {parts["absmax"].dtype}, and quant_state says {kind} (tensor "{name}")')
    if is_nested:
        wanted["nested_absmax"] = -(-blocks // int(described["nested_blocksize"]))
    for part, count in wanted.items():
        if parts[part].numel() != count:
            raise CheckpointError(f'{part} holds {parts[part].numel()} numbers, expected {count} (tensor "{name}")')


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
        packed: bool,
    ) -> Any:
        """An empty layer. `bias` is the parameter itself, or `None`.

        The weight has the shape that the checkpoint's has: [N, K], or that of the codes if `packed`.
        """
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
            shape = (elements, 1) if packed else (out_features, in_features)
            layer.weight = bnb.nn.Params4bit(
                torch.empty(shape, dtype=storage),
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

    def decoded(self, dtype: Any = None) -> Any:
        """The weights, [N, K]; `dtype` is by default the type they were packed from."""
        return decode_4bit(self.weight, dtype or self.weight.quant_state.dtype)

    def __setstate__(self, state: Any) -> None:
        """A copy, or a pickled layer: pickle forgets the class of a parameter, copies refer to the old layer."""
        super().__setstate__(state)
        weight = self._parameters["weight"]
        if getattr(weight, "quant_state", None) is not None:
            if not isinstance(weight, bnb.nn.Params4bit):
                weight = bnb.nn.Params4bit(weight.data, **{key: weight.__dict__[key] for key in _FIELDS_4BIT})
            self.set_weight(weight)

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
        return multiply_4bit(inner, weight, bias).to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Codes that are stored as a floating type are bytes all the same, and are not cast."""
        weight = self._parameters["weight"]
        storage = weight.dtype
        if not storage.is_floating_point or self.quant_state is None:
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
        shape = (self.out_features, self.in_features)
        if name not in state_dict or tuple(state_dict[name].shape) == shape:
            super()._load_from_state_dict(state_dict, *arguments)
            return
        start = f"{name}."
        parts = {key[len(start) :]: value for key, value in state_dict.items() if key.startswith(start)}
        parts[""] = state_dict[name]
        device = self.weight.device if self.weight.device.type != "meta" else parts[""].device
        try:
            own = {part: value.detach().clone() for part, value in parts.items()}
            self.set_weight(params_4bit(name, own, shape, device))
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

    def decoded(self, dtype: Any = None) -> Any:
        """The weights, [N, K]; `dtype` is float32 by default."""
        if self.weight.dtype != torch.int8:
            return self.weight.data.to(dtype or torch.float32)
        return decode_8bit(self.weight.data, self.scales(), dtype or torch.float32)

    def __setstate__(self, state: Any) -> None:
        """A copy, or a pickled layer: pickle forgets the class of a parameter, copies hold the codes twice."""
        super().__setstate__(state)
        weight = self._parameters["weight"]
        if not isinstance(weight, bnb.nn.Int8Params) and hasattr(weight, "SCB"):
            fields = {key: weight.__dict__[key] for key in ("has_fp16_weights", "CB", "SCB")}
            weight = bnb.nn.Int8Params(weight.data, requires_grad=weight.requires_grad, **fields)
            self._parameters["weight"] = weight
        self._share_codes()

    def _share_codes(self) -> None:
        """`CB` is the weight's own memory, and the scales are where the codes are."""
        weight = self._parameters["weight"]
        if weight.dtype != torch.int8 or weight.device.type == "meta":
            return
        for holder in (weight, self.state):
            if getattr(holder, "CB", None) is not None:
                holder.CB = weight.data
            if getattr(holder, "SCB", None) is not None:
                holder.SCB = holder.SCB.to(weight.device)

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
        return multiply_8bit(x, codes, scales, bias, threshold=self.state.threshold, rounds=not self.training)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Codes and scales are moved together, as they are: releases of bitsandbytes take a weight that is moved
        to the CPU for one to be packed."""
        weight = self._parameters["weight"]
        if weight.dtype != torch.int8:
            return super()._apply(fn, recurse)
        self._parameters["weight"] = torch.nn.Parameter(weight.data.as_subclass(torch.Tensor), requires_grad=False)
        try:
            super()._apply(fn, recurse)
        finally:
            moved = self._parameters["weight"].data
            if "meta" in (moved.device.type, weight.device.type):
                weight = bnb.nn.Int8Params(moved, requires_grad=False, has_fp16_weights=False)
            else:
                weight.data = moved
            self._parameters["weight"] = weight
        self._share_codes()
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
        if name not in state_dict or self.weight.dtype != torch.int8:
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


def plain_layer(layer: Any, dtype: Any) -> Any:
    """An ordinary layer with the decoded weights of a `Linear4bit` or `Linear8bitLt`: of the class that it was
    made from. Raises `BackendError` where the weights are not in memory."""
    if layer.weight.device.type == "meta":
        raise BackendError("the weights are offloaded", hint="load the model without offloading to dequantize it")
    weights = layer.decoded(dtype)
    kind = getattr(layer, "source_cls", torch.nn.Linear)
    with torch.device("meta"):
        if kind.__name__ == "Conv1D":
            plain = kind(layer.out_features, layer.in_features)
            weights = weights.T.contiguous()
        else:
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = torch.nn.Parameter(weights)
    if layer.bias is not None:
        plain.bias = torch.nn.Parameter(layer.bias.detach().to(weights.dtype))
    hook = getattr(layer, "_hf_hook", None)
    if hook is not None:
        require("accelerate.hooks", "place modules").add_hook_to_module(plain, hook)
    return plain
