"""Layers whose weight lies in memory as blocks of a GGUF type, decoded each time they run.

`GGUFParameter` is the weight: uint8 [rows, bytes of a row], exactly the bytes of the file. A row of
blocks is a row of the weight, but for weights that a writer flattened because their rows are no
whole blocks (kernels of convolutions); `quant_shape` is the shape of the weight itself.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import nn

from ..errors import FormatError
from ..gguf.blocks import dequantize as decode_on_cpu
from . import gguf_decode

_KEPT_BY = {
    torch.Tensor.to,
    torch.Tensor.cpu,
    torch.Tensor.cuda,
    torch.Tensor.detach,
    torch.Tensor.clone,
    torch.Tensor.contiguous,
    torch.Tensor.pin_memory,
    torch.Tensor.requires_grad_,
    torch.Tensor.share_memory_,
    torch.Tensor.data.__get__,  # type: ignore[attr-defined]
}
"""What gives the same bytes, so that the result is a `GGUFParameter` again."""


class GGUFParameter(nn.Parameter):
    """Blocks of one weight.

    `data` is uint8, `quant_type` the name of the type (`Q4_K`), `quant_shape` the shape of the weight.
    Moves, copies, state dicts and pickles keep all three; any other operation sees plain bytes.
    """

    quant_type: str | None
    quant_shape: tuple[int, ...] | None

    def __new__(
        cls,
        data: Any = None,
        requires_grad: bool = False,
        quant_type: str | None = None,
        quant_shape: tuple[int, ...] | None = None,
    ) -> GGUFParameter:
        """Bytes have no gradient: `requires_grad` is there because callers of `torch.nn.Parameter` give it."""
        if data is None:
            data = torch.empty(0, dtype=torch.uint8)
        if isinstance(data, GGUFParameter):
            quant_type = quant_type or data.quant_type
            quant_shape = quant_shape or data.quant_shape
        made: GGUFParameter = torch.Tensor._make_subclass(cls, plain(data), False)
        made.quant_type = quant_type
        made.quant_shape = None if quant_shape is None else tuple(quant_shape)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if func in _KEPT_BY and isinstance(source, GGUFParameter) and type(result) is not cls:
            is_same = isinstance(result, torch.Tensor) and result.dtype == torch.uint8
            return cls(result, False, source.quant_type, source.quant_shape) if is_same else result
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> GGUFParameter:
        if id(self) not in memo:
            memo[id(self)] = type(self)(plain(self).clone(), False, self.quant_type, self.quant_shape)
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (plain(self), False, self.quant_type, self.quant_shape)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GGUFParameter({self.quant_type}, shape={self.quant_shape}, device={self.device})"

    def dequantize(self, dtype: Any = torch.float32) -> Any:
        """The weight, decoded where it is."""
        return decode(self, str(self.quant_type), self.quant_shape or (), dtype)


def plain(data: Any) -> Any:
    """The tensor without its class; the memory is the same."""
    if type(data) is torch.Tensor:
        return data
    with torch._C.DisableTorchFunctionSubclass():
        return data.detach().as_subclass(torch.Tensor)


def decode(blocks: Any, quant_type: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """The weights of `blocks`, computed in float32 and rounded once to `dtype`, on the device of `blocks`."""
    if torch.compiler.is_compiling():
        with torch._C.DisableTorchFunctionSubclass():
            return gguf_decode.decode(blocks, quant_type, shape, dtype)
    blocks = plain(blocks)
    if blocks.device.type != "cpu":
        return gguf_decode.decode(blocks, quant_type, shape, dtype)
    # As it is stored: rows of blocks need not be rows of the weight.
    return decode_on_cpu(blocks, quant_type, dtype=dtype, threads=torch.get_num_threads()).reshape(shape)


SCRATCH_BYTES = 32 << 20
"""Most bytes of the memory that each thread keeps for decoded weights. Fresh memory costs more than
decoding does: the system hands it out page by page."""

_scratch = threading.local()


def _into_scratch(blocks: Any, quant_type: str, dtype: Any) -> Any:
    """The weights of `blocks`, rows of them, in the memory that this thread keeps for the purpose."""
    blocks = blocks.reshape(-1, blocks.shape[-1])
    weights, nbytes = gguf_decode.sizes(quant_type)
    size = blocks.numel() // nbytes * weights * dtype.itemsize
    held = getattr(_scratch, "held", None)
    if held is None or len(held) < size:
        with torch.inference_mode(False):
            held = _scratch.held = torch.empty(size, dtype=torch.uint8)
    out = held[:size].view(dtype).reshape(len(blocks), -1)
    return decode_on_cpu(blocks, quant_type, out=out, threads=torch.get_num_threads())


class GGUFLayer(nn.Module):
    """What the layers have in common: `quant_type` and `quant_shape` of the weight, and `compute_dtype`."""

    quant_type: str
    quant_shape: tuple[int, ...]
    compute_dtype: Any
    replaced: type[nn.Module]
    """The class of the layer whose place it took."""

    @staticmethod
    def take_over(module: Any, quant_type: str, compute_dtype: Any, shape: tuple[int, ...] | None = None) -> Any:
        """The decoding layer for `module`, with everything that it holds; `module` itself is not changed.
        `shape` is that of the weight, where `module` does not have it any more."""
        made = _adopt(module, layer_class(module))
        made.replaced = type(module)
        made.quant_type = quant_type
        made.quant_shape = tuple(module.weight.shape) if shape is None else shape
        made.compute_dtype = compute_dtype
        return made

    def give_back(self, dtype: Any, decoded: dict[int, Any]) -> Any:
        """The layer that was there before, its weight decoded to `dtype`. `decoded` remembers weights by
        the identity of their blocks."""
        blocks = self._parameters["weight"]
        if id(blocks) not in decoded:
            decoded[id(blocks)] = nn.Parameter(decode(blocks, self.quant_type, self.quant_shape, dtype))
        made = _adopt(self, self.replaced)
        for name in ("replaced", "quant_type", "quant_shape", "compute_dtype", "output_dtype"):
            made.__dict__.pop(name, None)
        made._parameters["weight"] = decoded[id(blocks)]
        return made

    def set_output_dtype(self, dtype: Any) -> None:
        """Tells an embedding what to give; other layers give what they are given."""

    def cast(self, input: Any) -> Any:
        """`input` in `compute_dtype`. Raises `FormatError` where it is not floating: what a model casts to the
        type of a packed weight is lost."""
        if not input.is_floating_point():
            raise FormatError(
                f"input is {input.dtype}: the model casts it to the type of packed weights",
                hint="name the layer in modules_to_not_convert",
            )
        return input.to(self.compute_dtype)

    def decoded_weight(self) -> Any:
        """The weight in `compute_dtype`."""
        return decode(self._parameters["weight"], self.quant_type, self.quant_shape, self.compute_dtype)

    def weight_in_scratch(self) -> Any:
        """The same in the memory that the thread keeps, unless it is too large; the next layer overwrites it."""
        if self.compute_dtype.itemsize * prod(self.quant_shape) > SCRATCH_BYTES:
            return self.decoded_weight()
        blocks = plain(self._parameters["weight"])
        return _into_scratch(blocks, self.quant_type, self.compute_dtype).reshape(self.quant_shape)

    def _decodes_to_scratch(self, *tensors: Any) -> bool:
        """Whether nothing needs the weight once the layer has run, and the kernels decode it."""
        blocks: Any = self._parameters["weight"]
        if torch.compiler.is_compiling() or blocks.device.type != "cpu":
            return False
        return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))

    def extra_repr(self) -> str:
        """The layer's own, and the type."""
        return f"{super().extra_repr()}, quant_type={self.quant_type}"


class GGUFLinear(GGUFLayer, nn.Linear):
    """A linear layer on blocks. Computes in `compute_dtype`, and gives the type of its input."""

    def forward(self, input: Any) -> Any:
        """input [..., in_features] gives [..., out_features]."""
        given, bias = self.cast(input), _in(self.bias, self.compute_dtype)
        if self._decodes_to_scratch(given, bias):
            return self._by_rows(given, bias).to(input.dtype)
        weight = self.decoded_weight()
        with _decoded_again(self, weight):
            found = nn.functional.linear(given, weight, bias)
        return found.to(input.dtype)

    def _by_rows(self, given: Any, bias: Any) -> Any:
        """The product, some rows of the weight at a time where it is larger than the scratch memory."""
        rows, columns = self.quant_shape
        blocks = plain(self._parameters["weight"])
        step = max(1, SCRATCH_BYTES // (columns * self.compute_dtype.itemsize))
        if step >= rows or blocks.shape != (rows, blocks.shape[-1]):
            return nn.functional.linear(given, self.weight_in_scratch(), bias)
        found = given.new_empty((*given.shape[:-1], rows))
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            weight = _into_scratch(blocks[part], self.quant_type, self.compute_dtype)
            found[..., part] = nn.functional.linear(given, weight, None if bias is None else bias[part])
        return found


class _GGUFConvolution(GGUFLayer):
    def forward(self, input: Any) -> Any:
        """As the layer that it stands for."""
        given, bias = self.cast(input), _in(self.bias, self.compute_dtype)
        is_inference = self._decodes_to_scratch(given, bias)
        weight = self.weight_in_scratch() if is_inference else self.decoded_weight()
        with _decoded_again(self, weight):
            found = self._conv_forward(given, weight, bias)  # type: ignore[operator]
        return found.to(input.dtype)


class GGUFConv1d(_GGUFConvolution, nn.Conv1d):
    """A convolution on blocks. Computes in `compute_dtype`, and gives the type of its input."""


class GGUFConv2d(_GGUFConvolution, nn.Conv2d):
    """A convolution on blocks. Computes in `compute_dtype`, and gives the type of its input."""


class GGUFConv3d(_GGUFConvolution, nn.Conv3d):
    """A convolution on blocks. Computes in `compute_dtype`, and gives the type of its input."""


class GGUFEmbedding(GGUFLayer, nn.Embedding):
    """An embedding on blocks: only the rows that are asked for are decoded, straight to `output_dtype`,
    the type that the model was loaded in."""

    output_dtype: Any = None

    def set_output_dtype(self, dtype: Any) -> None:
        """`dtype` is what rows are given in."""
        self.output_dtype = dtype

    def forward(self, input: Any) -> Any:
        """input, whole numbers [...], gives [..., embedding_dim]; what the class that it stands for does with
        rows is done to those that were asked for."""
        rows = self._rows(input)
        if self.replaced is nn.Embedding:
            return rows
        numbers = torch.arange(input.numel(), device=input.device).reshape(input.shape)
        return _on_table(self, self.replaced, rows.reshape(-1, rows.shape[-1]), numbers)

    def _rows(self, input: Any) -> Any:
        dtype = self.output_dtype or self.compute_dtype
        blocks = plain(self._parameters["weight"]).reshape(-1)
        count, width = self.quant_shape
        if len(blocks) % count or width % gguf_decode.sizes(self.quant_type)[0]:
            weight = decode(blocks, self.quant_type, self.quant_shape, dtype)
            return nn.functional.embedding(input, weight)
        asked = nn.functional.embedding(input.reshape(-1), blocks.reshape(count, -1))
        return decode(asked, self.quant_type, (*input.shape, width), dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `model.half()` changes what plain embeddings give, too.
        if self.output_dtype is not None:
            self.output_dtype = fn(torch.zeros((), dtype=self.output_dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


_LAYERS: dict[type, type[GGUFLayer]] = {
    nn.Linear: GGUFLinear,
    nn.Conv1d: GGUFConv1d,
    nn.Conv2d: GGUFConv2d,
    nn.Conv3d: GGUFConv3d,
    nn.Embedding: GGUFEmbedding,
}


def layer_class(module: Any) -> type[GGUFLayer] | None:
    """The class that takes the place of `module`, or `None` where there is none.

    That of an embedding class of its own is there as well, if what it gives for a token depends on
    that token's row alone (as Gemma's, which scales rows).
    """
    if getattr(module, "max_norm", None) is not None:
        return None
    found = _LAYERS.get(type(module))
    if found is None and isinstance(module, nn.Embedding) and not isinstance(module, GGUFLayer):
        return GGUFEmbedding if _is_by_row(module) else None
    return found


def _is_by_row(module: Any) -> bool:
    """Whether an embedding gives the same from a table of the asked rows, numbered anew: tried out."""
    cls = type(module)
    table = torch.linspace(-1, 1, 6 * module.embedding_dim).reshape(6, -1)
    ids = torch.tensor([[3, 1], [5, 1]])
    try:
        with torch.no_grad():
            whole = _on_table(module, cls, table, ids)
            asked = _on_table(module, cls, table[ids.reshape(-1)], torch.arange(4).reshape(2, 2))
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(whole, torch.Tensor) and whole.device.type != "meta" and torch.equal(whole, asked)


def _on_table(module: Any, cls: Any, table: Any, ids: Any) -> Any:
    """What an embedding of class `cls` with the content of `module` makes of another table."""
    stand_in = _adopt(module, cls)
    stand_in._parameters["weight"] = table
    stand_in.num_embeddings, stand_in.padding_idx = len(table), None
    return cls.forward(stand_in, ids)


def _adopt(module: Any, cls: Any) -> Any:
    """A module of class `cls` with the content of `module`: tables of its own, values shared."""
    made = cls.__new__(cls)
    made.__dict__.update({name: _own(value) for name, value in module.__dict__.items()})
    return made


def _own(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, dict | set) else value


def _in(bias: Any, dtype: Any) -> Any:
    return None if bias is None else bias.to(dtype)


@contextlib.contextmanager
def _decoded_again(layer: GGUFLayer, weight: Any) -> Iterator[None]:
    """Inside, autograd does not hold on to `weight`, the decoded one: the way back decodes it again, so
    that training adapters does not keep every layer's weight in memory."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield
        return
    place = weight.untyped_storage().data_ptr()
    blocks, quant_type, shape, dtype = layer._parameters["weight"], layer.quant_type, layer.quant_shape, weight.dtype

    def pack(tensor: Any) -> Any:
        if tensor.dtype == dtype and tensor.device == weight.device and tensor.untyped_storage().data_ptr() == place:
            return tensor.shape, tensor.stride(), tensor.storage_offset()
        return tensor

    def unpack(kept: Any) -> Any:
        if isinstance(kept, torch.Tensor):
            return kept
        return decode(blocks, quant_type, shape, dtype).as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
