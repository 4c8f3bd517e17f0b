"""One weight of torchao: packed, rebuilt from what a checkpoint holds, decoded, and its size.

Packing is torchao's own work on one module at a time. Three things are different here:

- Weights that are not finite are refused; torchao packs them to NaN or to the largest code.
- A block of zeros gives zeros. torchao 0.18 divides 0 by 0 there (float8, and nvfp4 where the whole
  weight is zero) and stores NaN (pytorch/ao#4713). The scale of such a block is the smallest normal
  number, as proposed there; nvfp4 gets a scale of 1 for the tensor.
- A layer that torchao would leave as it is without a word is an error.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from .._lazy import require
from ..errors import BackendError, CheckpointError, FormatError

_PURPOSE = "pack weights for torchao"
_ROWS = 1024


def check_finite(weight: Any, name: str) -> bool:
    """Raises `FormatError` for a weight that holds a NaN or an infinity; gives whether all of it is zero."""
    torch = require("torch", _PURPOSE)
    if weight.numel() == 0:
        return True
    low, high = torch.aminmax(weight.detach())
    if torch.isfinite(low) and torch.isfinite(high):
        return bool(low == 0 and high == 0)
    flat = weight.detach().flatten()
    index = int(torch.nonzero(~torch.isfinite(flat))[0])
    raise FormatError(
        f'{float(flat[index])} at index {index} cannot be packed (tensor "{name}", shape {list(weight.shape)}, '
        f"as {str(weight.dtype).removeprefix('torch.')})"
    )


def pack_whole(module: Any, leaf: str, config: Any, *, name: str, is_zero: bool) -> None:
    """Packs parameter `leaf` of a module in place, by `config`; `name` is the parameter's full name, and
    `is_zero` says whether it holds nothing but zeros. Raises `FormatError` for a weight that torchao leaves
    as it is."""
    shape = list(getattr(module, leaf).shape)
    quantize(module, leaf, config)
    # torchao's description of the layer makes a circle of references, which would keep it in memory.
    module.__dict__.pop("extra_repr", None)
    packed = getattr(module, leaf)
    if not is_packed(packed):
        raise FormatError(
            f'{type(config).__name__} leaves this weight as it is (tensor "{name}", shape {shape})',
            hint="list its module in modules_to_not_convert",
        )
    settle_zeros(require("torch", _PURPOSE), packed, is_zero=is_zero)


def quantize(module: Any, leaf: str, config: Any) -> None:
    """torchao's own packing of one parameter, in place."""
    quantization = require("torchao.quantization", _PURPOSE)
    if leaf == "weight":
        quantization.quantize_(module, config, filter_fn=lambda one, path: one is module)
    else:
        quantization.quantize_(module, quantization.FqnToConfig({leaf: config}), filter_fn=None)


def settle_zeros(torch: Any, weight: Any, *, is_zero: bool = False) -> None:
    """Puts zeros where torchao stored NaN for a block of zeros, or for a weight that `is_zero`."""
    kind = type(weight).__name__
    if kind == "Float8Tensor":
        empty = weight.scale == 0
        if empty.any():
            mask = empty
            for axis, length in enumerate(weight.qdata.shape):
                mask = mask.repeat_interleave(length // mask.shape[axis], dim=axis)
            weight.qdata.view(torch.uint8).masked_fill_(mask, 0)
            weight.scale.masked_fill_(empty, torch.finfo(torch.float32).smallest_normal)
    elif kind == "NVFP4Tensor" and is_zero and weight.per_tensor_scale is not None:
        one = torch.ones_like(weight.per_tensor_scale)
        like = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
        settled = type(weight).to_nvfp4(like, per_tensor_scale=one, is_swizzled_scales=weight.is_swizzled_scales)
        weight.qdata.zero_()
        weight.scale.copy_(settled.scale)
        weight.per_tensor_scale.copy_(one)


def is_packed(weight: Any) -> bool:
    """Whether a parameter is one of torchao's packed tensors."""
    return isinstance(weight, require("torchao.utils", _PURPOSE).TorchAOBaseTensor)


def is_saved_class(weight: Any) -> bool:
    """Whether torchao writes a packed tensor to safetensors."""
    allowed = require("torchao.prototype.safetensors.safetensors_utils", _PURPOSE).ALLOWED_TENSORS_SUBCLASSES
    return type(weight).__name__ in allowed


def decode(weight: Any, dtype: Any = None) -> Any:
    """The numbers of a packed tensor as a plain one, in `dtype` or in the type that it was packed from."""
    torch = require("torch", _PURPOSE)
    method = type(weight).dequantize
    if method is not torch.Tensor.dequantize:
        # Some decode to any type and so round once.
        direct = dtype is not None and "output_dtype" in inspect.signature(method).parameters
        decoded = weight.dequantize(dtype) if direct else weight.dequantize()
        return decoded if dtype is None else decoded.to(dtype)
    if _is_plain_int4(weight):
        from ..formats_ import dequantize

        group = int(weight.block_size[-1])
        return dequantize(arrays_of(weight), "torchao:int4", dtype=dtype or weight.dtype, block_size=group)
    # The int4 tensors have no decoder of their own, but each row of the identity picks a column.
    if weight.dim() != 2:
        raise BackendError(f"torchao does not decode a {type(weight).__name__} of {weight.dim()} dimensions")
    rows, columns = weight.shape
    decoded = torch.empty(rows, columns, dtype=dtype or weight.dtype, device=weight.device)
    for start in range(0, columns, _ROWS):
        count = min(_ROWS, columns - start)
        picked = torch.zeros(count, columns, dtype=weight.dtype, device=weight.device)
        picked[torch.arange(count), torch.arange(start, start + count)] = 1
        decoded[:, start : start + count] = torch.nn.functional.linear(picked, weight).t()
    return decoded


def _is_plain_int4(weight: Any) -> bool:
    """Whether a packed tensor is one of `torchao:int4` on the CPU, where torchao does not multiply with it."""
    if type(weight).__name__ != "Int4Tensor" or weight.device.type != "cpu" or weight.act_pre_scale is not None:
        return False
    # A transposed one is packed along its columns.
    rows, columns = weight.shape[0], weight.shape[-1]
    return bool(tuple(weight.qdata.shape) == (rows, columns // 2) and weight.block_size[0] == 1)


def packed_size(weight: Any) -> int:
    """Bytes of all arrays of a packed tensor."""
    return sum(array.numel() * array.element_size() for array in arrays_of(weight).values())


def arrays_of(weight: Any) -> dict[str, Any]:
    """The arrays of a packed tensor by the names that files give them."""
    names = [*weight.tensor_data_names, *getattr(weight, "optional_tensor_data_names", ())]
    return {name: getattr(weight, name) for name in names if getattr(weight, name) is not None}


def flatten(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors by name as torchao's `flatten_tensor_state_dict` gives them for a safetensors file, and the
    metadata of that file. Arrays are those of the packed tensors themselves, where torchao copies them.

    The metadata tells the class and attributes of each tensor, also of those that are not packed, and
    under `tensor_names` all names. Raises `FormatError` for a class that torchao does not write.
    """
    torch = require("torch", _PURPOSE)
    encoder = require("torchao.prototype.safetensors.safetensors_utils", _PURPOSE).TensorSubclassAttributeJSONEncoder
    flat: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for name, tensor in state.items():
        if is_saved_class(tensor):
            path, dot, leaf = name.rpartition(".")
            flat |= {f"{path}{dot}_{leaf}_{one}": array.detach() for one, array in arrays_of(tensor).items()}
            metadata[name] = json.dumps(tensor, cls=encoder)
        elif is_packed(tensor):
            raise FormatError(f'torchao does not write a {type(tensor).__name__} to files (tensor "{name}")')
        else:
            flat[name] = tensor
            metadata[name] = json.dumps({"_type": torch.Tensor.__name__})
    metadata["tensor_names"] = json.dumps(list(state))
    return flat, metadata


def trial(config: Any, shape: tuple[int, ...], dtype: Any, device: Any, *, embedding: bool = False) -> Any:
    """What torchao makes of a weight of zeros: the packed tensor, or the error that says why it cannot.

    On the meta device this costs no memory and tells the size of the result. An embedding is looked
    up as well: not all of torchao's tensors can be.
    """
    torch = require("torch", _PURPOSE)
    module = torch.nn.Embedding(1, 1, device="meta") if embedding else torch.nn.Linear(1, 1, device="meta")
    module.weight = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)
    try:
        quantize(module, "weight", config)
        if embedding:
            module(torch.zeros(1, dtype=torch.int64, device=device))
    except Exception as error:  # Libraries below torchao refuse in many ways; the caller tells which.
        return error
    if not is_packed(module.weight):
        return FormatError(f"{type(config).__name__} leaves a weight of shape {list(shape)} as it is")
    return module.weight


class FileWeights:
    """The packed weights of a checkpoint, as the metadata of its files describes them.

    `metadata` is the `__metadata__` of all files together: for each packed tensor its class, its
    attributes, and the names of its arrays. `a.weight` is stored as `a._weight_qdata` and so on.
    """

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._described: dict[str, str] = {}
        self._components: dict[str, tuple[str, str]] = {}
        self._leaves: dict[str, tuple[str, str]] = {}
        self._plain = frozenset(metadata)
        for name, text in metadata.items():
            described = _object(text)
            names = described.get("_tensor_data_names")
            if not isinstance(described.get("_type"), str) or not isinstance(names, list):
                continue
            self._described[name] = text
            path, dot, leaf = name.rpartition(".")
            for one in names:
                self._components[f"{path}{dot}_{leaf}_{one}"] = (name, str(one))
                self._leaves[f"_{leaf}_{one}"] = (leaf, str(one))

    def __bool__(self) -> bool:
        return bool(self._described)

    def component_of(self, key: str) -> tuple[str, str] | None:
        """The packed tensor that a stored array belongs to, and which of its arrays it is.

        transformers writes some keys under names of old, and describes them by those in the model; then the
        path is that of the key.
        """
        known = self._components.get(key)
        path, dot, last = key.rpartition(".")
        if known is not None or last not in self._leaves or key in self._plain:
            return known
        leaf, component = self._leaves[last]
        return f"{path}{dot}{leaf}", component

    def rebuild(self, name: str, arrays: Mapping[str, Any], *, dtype: Any = None) -> Any:
        """The packed tensor `name` from its arrays, in any order. `dtype` is what its layer computes in.

        Raises `CheckpointError` where an array is missing or does not fit its description.
        """
        text = self._described[self._stored_name(name)]
        described = _object(text)
        missing = [one for one in described["_tensor_data_names"] if one not in arrays]
        if missing:
            raise CheckpointError(f'the checkpoint lacks {", ".join(missing)} of the packed tensor "{name}"')
        data = described.get("_data")
        if dtype is not None and isinstance(data, dict) and described["_type"] != "MXTensor":
            for field in ("dtype", "orig_dtype"):
                if field in data:
                    data[field] = {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}
        # torchao looks each name up among all arrays; one weight at a time this stays linear.
        flat = {f"one._weight_{key}": arrays[key] for key in described["_tensor_data_names"]}
        metadata = {"tensor_names": '["one.weight"]', "one.weight": json.dumps(described)}
        support = require("torchao.prototype.safetensors.safetensors_support", _PURPOSE)
        try:
            rebuilt, _ = support.unflatten_tensor_state_dict(flat, metadata)
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
            raise CheckpointError(f'the packed tensor "{name}" does not fit its description: {error}') from error
        return rebuilt["one.weight"]

    def _stored_name(self, name: str) -> str:
        """The name in the files of parameter `name`, which the model may hold under another prefix."""
        if name in self._described:
            return name
        close = [one for one in self._described if name.endswith(f".{one}") or one.endswith(f".{name}")]
        if len(close) != 1:
            raise CheckpointError(f'the metadata of the checkpoint does not describe the packed tensor "{name}"')
        return close[0]


def _object(text: Any) -> dict[str, Any]:
    """A JSON object, or an empty one where the text is something else."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
