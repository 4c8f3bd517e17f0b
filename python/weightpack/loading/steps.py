"""The steps of loading one model, each after the one before it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .._lazy import require
from ..errors import ConfigError
from ..matcher import Matcher
from ..model_config import main_dtype
from ..placement import DISK, Placement
from ..quantizers.dtypes import torch_dtype as as_torch_dtype
from ..quantizers.modules import find_tensor, set_parameter
from . import devices, keys, missing
from .gguf_origin import origin_of
from .gguf_rows import StoredRows
from .gguf_source import HostNamed, host_named
from .host import Host
from .offload import Disk, dispatch
from .skeleton import build, shared_names, state_of
from .source import FileWeights, Location, Weights
from .weights import Loader


class Loading:
    """One model on its way. `model` is there from `build_skeleton` on, `info` from `plan_keys` on."""

    model: Any
    info: keys.LoadingInfo

    def __init__(self, host: Host, quantizer: Any, weights: Weights, location: Location) -> None:
        self._torch = require("torch", "load models")
        self._host = host
        self._quantizer = quantizer
        self._weights = weights
        self._gguf = weights.checkpoint if isinstance(weights, FileWeights) and weights.is_gguf else None
        self._location = location

    def read_config(self, model_class: Any, config: Mapping[str, Any]) -> None:
        """The class that is really built, and what it is built from; for a GGUF file without a config, from
        its metadata, where the host knows how."""
        from_gguf = getattr(self._host, "config_from_gguf", None)
        if not config and from_gguf is not None and self._gguf is not None:
            config = from_gguf(self._gguf) or {}
        self._model_class, self._config = self._host.load_config(model_class, config, self._location.folder)

    def settle_environment(self, torch_dtype: Any, device_map: Any) -> None:
        """The type of what is not packed, the device map, and whether the machine can do it."""
        device_map = devices.normalise(device_map)
        dtype = self._wanted_dtype(torch_dtype)
        quantizer = self._quantizer
        if quantizer is not None:
            quantizer.validate_environment(torch_dtype=dtype, device_map=device_map)
            dtype = quantizer.torch_dtype = quantizer.update_torch_dtype(dtype)
            device_map = devices.normalise(quantizer.update_device_map(device_map))
        self._dtype = dtype
        self._device_map = device_map

    def _wanted_dtype(self, torch_dtype: Any) -> Any:
        name = main_dtype(self._weights.entries.values())
        stored = as_torch_dtype(name) if name is not None else None
        if torch_dtype is None:
            return self._host.default_dtype(self._config, stored, self._quantizer is not None)
        if isinstance(torch_dtype, str) and torch_dtype == "auto":
            return stored
        dtype = as_torch_dtype(torch_dtype, "torch_dtype")
        if not dtype.is_floating_point:
            raise ConfigError(f"torch_dtype {torch_dtype!r} is not a floating point type")
        return dtype

    def build_skeleton(self, *, on_meta: bool) -> None:
        """The model without its weights; unless `on_meta`, with the first values of its constructor."""
        self.model = build(self._make) if on_meta else self._make().eval()
        self._state = state_of(self.model)
        self._shared = shared_names(self._state)

    def _make(self) -> Any:
        return self._host.build(self._model_class, self._config, self._dtype)

    def plan_keys(self, keep_in_fp32: Iterable[str], *, ignore_mismatched_sizes: bool) -> None:
        """Which stored tensor goes where, in which type, and what does not fit."""
        quantizer = self._quantizer
        if self._gguf is not None:
            self._weights = host_named(self._gguf, self._host, self.model, self._state, mmap=self._weights.is_lent)
        types = getattr(quantizer.config, "stored_types", None) if quantizer is not None else None
        if types:
            self._weights = StoredRows(self._weights, types, quantizer.config.stored_shapes or {})
        if quantizer is not None:
            quantizer.file_metadata = self._weights.metadata
            quantizer.source_folder = self._location.folder
        self._logical = keys.group(self._weights, quantizer)
        self._plan = keys.plan(
            self._host,
            self.model,
            self._logical,
            self._state,
            self._shared,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        )
        self.info = self._plan.info
        if quantizer is not None:
            targets = self._plan.targets
            logical = {target.name: self._logical[target.sources[0]] for target in targets}
            quantizer.entries = {name: tensor.entry for name, tensor in logical.items()}
            quantizer.stored_bytes = {name: tensor.stored_bytes for name, tensor in logical.items() if tensor.is_packed}
        self._in_fp32 = [*self._host.keep_in_fp32(self.model, self._dtype), *keep_in_fp32]
        self._matcher = Matcher(self._in_fp32)

    def dtype_of(self, name: str) -> Any:
        """The type of a floating tensor that is not packed; `None` for the stored one."""
        if self._in_fp32 and self._matcher.matches(name):
            return self._torch.float32
        choose = getattr(self._host, "dtype_of", None)
        own = self._state.get(name)
        if choose is not None and own is not None and own.is_floating_point():
            return choose(name, own.dtype, self._dtype)
        return self._dtype

    def place_layers(self, max_memory: Mapping[Any, Any] | None, offload_folder: str | os.PathLike[str] | None) -> None:
        """Puts the backend's layers in place, and settles the device of each module."""
        quantizer, host = self._quantizer, self._host
        self._prepare(self._device_map)
        if isinstance(self._device_map, str):
            self._device_map = devices.infer(
                self.model,
                self._device_map,
                max_memory,
                no_split=host.no_split(self.model),
                nbytes=self._nbytes,
                adjust=quantizer.adjust_max_memory if quantizer is not None else dict,
            )
            if quantizer is not None:
                quantizer.validate_environment(torch_dtype=self._dtype, device_map=self._device_map)
                quantizer.device_map = self._device_map
                if any(quantizer.is_offloaded(path) for path in quantizer.quantized):
                    # These layers turn out to be where they cannot be packed.
                    self.model = build(self._make)
                    self._prepare(self._device_map)
        self._placement = Placement(self._device_map)
        self._disk = Disk(offload_folder) if self._placement.has_disk else None

    def _prepare(self, device_map: Any) -> None:
        if self._quantizer is None:
            return
        self._quantizer.device_map = device_map
        narrow = getattr(self._host, "left_unpacked", None)
        spared = self._in_fp32 if narrow is None else narrow(self.model, self._quantizer, self._in_fp32)
        self._quantizer.preprocess_model(
            self.model,
            skip=[*self._host.protected(self.model), *self._tied_layers()],
            keep_in_fp32=spared,
            packed=self._plan.packed if self._quantizer.pre_quantized else None,
        )

    def _tied_layers(self) -> list[str]:
        """Paths of layers whose weight another module uses too: packing it would cut the tie."""
        found = []
        for name, others in self._shared.items():
            path = name.rpartition(".")[0]
            own = self.model.get_submodule(path)
            if path and any(self.model.get_submodule(other.rpartition(".")[0]) is not own for other in others):
                found.append(path)
        return found

    def _nbytes(self, name: str, tensor: Any) -> int:
        """Bytes that a tensor takes once it is loaded."""
        packed = self._quantizer.packed_bytes(self.model, name) if self._quantizer is not None else None
        if packed is not None:
            return int(packed)
        dtype = self.dtype_of(name) if tensor.is_floating_point() else None
        return int(tensor.numel() * (dtype.itemsize if dtype is not None else tensor.element_size()))

    def fill(self, threads: int | None, on_progress: Callable[[int, int, str], None] | None) -> None:
        """Reads the weights, packs them, sets them; gives first values to what is missing."""
        loader = Loader(
            self.model,
            self._weights,
            self._logical,
            self._quantizer,
            self._placement,
            dtype_of=self.dtype_of,
            torch_dtype=self._dtype,
            set_tensor=self._set,
            threads=threads,
            on_progress=on_progress,
        )
        loader.load(self._plan.targets)
        self._remember()
        for target in self._plan.targets:
            self._share(target.name)
        self._host.tie(self.model, self.info.missing)
        self._part_devices()
        missing.fill(
            self._host,
            self.model,
            self.info,
            self._state,
            self._quantizer,
            self._placement,
            dtype_of=self.dtype_of,
            torch_dtype=self._dtype,
            set_tensor=self._set,
            on_disk=self._disk.index if self._disk is not None else (),
        )

    def _remember(self) -> None:
        """Tells a quantizer that asks for it what of a GGUF file is not in the model."""
        quantizer = self._quantizer
        if self._gguf is None or not isinstance(self._weights, HostNamed) or not hasattr(quantizer, "origin"):
            return

        def found(name: str) -> Any:
            return find_tensor(self.model, name)

        quantizer.origin = origin_of(self._gguf, self._weights, self._plan.targets, found)

    def _set(self, name: str, tensor: Any, device: str) -> None:
        if device == DISK and self._disk is not None:
            self._disk.add(name, tensor)
            # What stays in the model tells accelerate in which type to bring the tensor back.
            device = "meta"
        old = self._state[name]
        tensor = tensor.to(device)
        if isinstance(old, self._torch.nn.Parameter):
            may_learn = old.requires_grad and tensor.is_floating_point()
            tensor = self._torch.nn.Parameter(tensor, requires_grad=may_learn)
        set_parameter(self.model, name, tensor)

    def _share(self, name: str) -> None:
        """Gives a tensor of several names to all of them."""
        for other in self._shared.get(name, ()):
            value = find_tensor(self.model, name)
            if value is not None and find_tensor(self.model, other) is not value:
                set_parameter(self.model, other, value)

    def _part_devices(self) -> None:
        """Sees to tensors of several names of which some stay on disk: each name has its weights where its
        module is placed, in a file or in memory."""
        disk = self._disk
        if disk is None:
            return
        state = state_of(self.model)
        for name, others in shared_names(state).items():
            device, value = self._placement.of(name), state[name]
            source = next((other for other in others if other in disk.index), None)
            if name in disk.index or (source is None and value.device.type == "meta"):
                continue
            if device == DISK:
                disk.add(name, value if source is None else disk.read(source))
            elif source is not None:
                self._set(name, disk.read(source), device)

    def finish(self) -> Any:
        """The finished model: the quantizer's last word, the host's registration, hooks for its devices."""
        model, quantizer = self.model, self._quantizer
        missing.refuse_meta(model, self._placement)
        if quantizer is not None:
            quantizer.postprocess_model(model)
            model.hf_quantizer = quantizer
            model.is_quantized = True
            model.quantization_method = quantizer.config.quant_method
        model.eval()
        self._host.finish(model, self._config, quantizer, self._location.folder, self._dtype)
        missing.tell(self.info, model)
        if self._device_map is not None:
            dispatch(model, self._device_map, self._disk)
        return model
