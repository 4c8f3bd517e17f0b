"""Products with packed weights of bitsandbytes on the CPU, and their decoding anywhere.

4-bit weights are decoded by weightpack some rows at a time, and multiplied while they are in the cache;
for gradients they are decoded again. That is an operator of torch, so that `torch.compile` takes it as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

from .._lazy import require
from ..formats_ import dequantize

_PURPOSE = "run bitsandbytes weights"
torch: Any = require("torch", _PURPOSE)
bnb: Any = require("bitsandbytes", _PURPOSE)

SLAB_BYTES = 8 << 20
"""Decoded weights that are held at a time. They stay in the cache until they are multiplied, and memory of that
size is not returned to the system in between."""


def absmax_of(state: Any) -> Any:
    """The scale of each block, float32 [blocks], of a `QuantState`."""
    if not state.nested:
        return state.absmax.float()
    nested = state.state2
    scales = nested.absmax.float().repeat_interleave(nested.blocksize)[: state.absmax.numel()]
    values = nested.code.float().index_select(0, state.absmax.reshape(-1).int())
    return values.mul_(scales).add_(state.offset)


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


def codes_of(weight: Any) -> Any:
    """The bytes of a packed parameter, whatever they are stored as: uint8, flat."""
    return weight.data.reshape(-1).view(torch.uint8)


def _slabs(
    codes: Any, absmax: Any, quant_type: str, shape: tuple[int, int], block_size: int, dtype: Any
) -> Iterator[tuple[slice, Any]]:
    """The weights of a packed matrix, some rows after the other: which, and [rows, K] of `dtype` in memory that is
    used again for the next."""
    rows, columns = shape
    # Slabs begin where a block does.
    unit = block_size // math.gcd(block_size, columns)
    step = max(unit, SLAB_BYTES // (columns * dtype.itemsize) // unit * unit)
    memory = torch.empty((min(step, rows), columns), dtype=dtype)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        start, end = first * columns, last * columns
        slab = memory[: last - first]
        dequantize(
            {
                "": codes[start // 2 : -(-end // 2)].reshape(-1, 1),
                "absmax": absmax[start // block_size : -(-end // block_size)],
            },
            f"bitsandbytes:{quant_type}",
            shape=(last - first, columns),
            out=slab,
            block_size=block_size,
            threads=torch.get_num_threads(),
        )
        yield slice(first, last), slab


_ARGUMENTS = "Tensor codes, Tensor absmax, str quant_type, int rows, int columns, int block_size"


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "weightpack::linear_4bit",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor x, Tensor? bias, {_ARGUMENTS}) -> Tensor",
)
def _linear(
    x: Any, bias: Any, codes: Any, absmax: Any, quant_type: str, rows: int, columns: int, block_size: int
) -> Any:
    out = x.new_empty((*x.shape[:-1], rows))
    for part, slab in _slabs(codes, absmax, quant_type, (rows, columns), block_size, x.dtype):
        out[..., part] = torch.nn.functional.linear(x, slab, None if bias is None else bias[part])
    return out


@_linear.register_fake  # type: ignore[untyped-decorator]
def _(x: Any, bias: Any, codes: Any, absmax: Any, quant_type: str, rows: int, columns: int, block_size: int) -> Any:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "weightpack::linear_4bit_gradient",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor gradient, {_ARGUMENTS}) -> Tensor",
)
def _linear_gradient(
    gradient: Any, codes: Any, absmax: Any, quant_type: str, rows: int, columns: int, block_size: int
) -> Any:
    total = gradient.new_zeros((*gradient.shape[:-1], columns), dtype=torch.float32)
    for part, slab in _slabs(codes, absmax, quant_type, (rows, columns), block_size, gradient.dtype):
        total += gradient[..., part] @ slab
    return total.to(gradient.dtype)


@_linear_gradient.register_fake  # type: ignore[untyped-decorator]
def _(gradient: Any, codes: Any, absmax: Any, quant_type: str, rows: int, columns: int, block_size: int) -> Any:
    return gradient.new_empty((*gradient.shape[:-1], columns))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Of a product only the packed weight is kept."""
    _, _, codes, absmax, *ctx.layout = inputs
    ctx.save_for_backward(codes, absmax)


def _differentiate(ctx: Any, gradient: Any) -> tuple[Any, ...]:
    of_x, of_bias = ctx.needs_input_grad[:2]
    x = _linear_gradient(gradient, *ctx.saved_tensors, *ctx.layout) if of_x else None
    bias = gradient.reshape(-1, gradient.shape[-1]).sum(0) if of_bias else None
    return x, bias, *[None] * 6


_linear.register_autograd(_differentiate, setup_context=_keep)


def multiply_4bit(x: Any, weight: Any, bias: Any) -> Any:
    """x of shape [..., K] times the transposed packed weight, plus a bias, in the type of x; on the CPU."""
    state = weight.quant_state
    rows, columns = state.shape
    return _linear(x, bias, codes_of(weight), absmax_of(state), state.quant_type, rows, columns, state.blocksize)


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "weightpack::decode_int8",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor",
)
def _decode_int8(codes: Any, scales: Any, dtype: Any) -> Any:
    return dequantize({"": codes, "SCB": scales}, "bitsandbytes:int8", dtype=dtype)


@_decode_int8.register_fake  # type: ignore[untyped-decorator]
def _(codes: Any, scales: Any, dtype: Any) -> Any:
    return codes.new_empty(codes.shape, dtype=dtype)


def decode_8bit(codes: Any, scales: Any, dtype: Any) -> Any:
    """int8 weights [N, K] with the largest magnitude of each row [N], rounded once to `dtype`, where they are."""
    if codes.device.type != "cpu":
        return bnb.functional.int8_vectorwise_dequant(codes, scales).to(dtype)
    return _decode_int8(codes.detach(), scales.detach(), dtype)


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


def multiply_8bit(x: Any, codes: Any, scales: Any, bias: Any, *, threshold: float, rounds: bool) -> Any:
    """x of shape [..., K] times the transposed int8 weight, plus a bias, in the type of x; on the CPU.

    `rounds`: x is rounded to int8 row by row first, but for columns that reach `threshold`.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = _Product8bit.apply(rows, bias, codes, scales, threshold, rounds and rows.numel() > 0)
    return out.reshape(*x.shape[:-1], codes.shape[0])
