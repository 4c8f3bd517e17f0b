"""The quantizer: one object that leads a backend through the loading of one model.

`weightpack.from_pretrained` calls the hooks in this order; the adapters to the hosts map the hosts'
own hooks onto them. A seventh backend overrides those marked *, and may override the others.

| step | hook | who calls it, and what it does |
|---|---|---|
| environment | `validate_environment` | before anything is built: packages, versions, device |
| dtype | `update_torch_dtype` | the type of everything that is not packed |
| devices | `update_device_map` | what the caller asked for, or the backend's own choice |
| skeleton | `preprocess_model` | model on meta: chooses the layers, sets `quantized`, then `replace_layer`* for each |
| sizes | `packed_bytes`, `adjust_max_memory` | for `device_map="auto"` |
| keys | `component_of`* | which stored arrays belong to one packed weight |
| | `update_missing_keys` | drops keys that need not be in the file |
| weights | `check_if_quantized_param` | for each parameter: is it the quantizer's? |
| | `packing` | how the engine packs it on its way from the file; `None`: the backend packs it itself |
| | `create_quantized_param`* | sets the parameter, from a full-precision tensor or packed components |
| end | `postprocess_model` | everything is in place |
| later | `dequantize` | back to ordinary layers |

`is_serializable`, `is_trainable` and `is_compileable` say what the result can do.
"""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from .._lazy import distribution, require
from ..errors import BackendError, ConfigError
from ..matcher import Matcher
from ..placement import DISK, Placement
from .config import QuantizationConfig
from .modules import replace_layers


@dataclass(frozen=True)
class Requirement:
    """A package that a backend needs: its import name, the oldest release that works, what it does."""

    package: str
    minimum: str
    purpose: str


@dataclass(frozen=True)
class Packing:
    """How the engine packs a weight: `format` is a full format name (`bitsandbytes:nf4`), `params` its
    choices. `through` is the element type (`BF16`) that weights are rounded to before they are
    encoded, `None` for the stored one. `transpose`: the file holds the matrix the other way round. `shape` is
    another shape in which the same weights, in the same order, are encoded."""

    format: str
    params: Mapping[str, Any] = field(default_factory=dict)
    through: str | None = None
    transpose: bool = False
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Exported:
    """A model in a form for other programs: its tensors, its `quantization_config`, text files by name, and
    objects that `torch.save` writes, by file name."""

    tensors: Mapping[str, Any]
    section: dict[str, Any]
    texts: Mapping[str, str] = field(default_factory=dict)
    objects: Mapping[str, Any] = field(default_factory=dict)


class Quantizer(ABC):
    """Base of all quantizers.

    `config` is the quantization config, `pre_quantized` whether the checkpoint is packed already.
    `torch_dtype` and `device_map` are what the hooks of these names settled on.
    After `preprocess_model`, `quantized` maps the path of each layer that the quantizer took over to
    the entry of the model before (its class), and `modules_to_not_convert` is the effective skip list.
    """

    name: ClassVar[str]
    """Name in the registry."""
    requirements: ClassVar[tuple[Requirement, ...]] = ()

    is_serializable: bool = False
    """Whether what it makes can be saved."""
    unserializable_reason: str = "the backend has no form for files"
    """Why not, where it cannot."""
    source_folder: Path | None = None
    """The folder that the model was loaded from, where it came from one."""
    is_trainable: bool = False
    """Whether adapters can be trained on top of it."""
    is_compileable: bool = False
    """Whether `torch.compile` takes the model."""

    def __init__(self, config: QuantizationConfig, *, pre_quantized: bool = True) -> None:
        self.config = config
        self.pre_quantized = pre_quantized
        self.modules_to_not_convert: list[str] = []
        self.quantized: dict[str, type] = {}
        self.torch_dtype: Any = None
        self.device_map: Any = None
        self.stored_bytes: dict[str, int] = {}
        """Bytes of each parameter that the checkpoint holds packed, all components together."""

    @property
    def is_saved_by_host(self) -> bool:
        """Whether the host's own `save_pretrained` writes something that can be loaded."""
        return self.is_serializable

    # Before the model is built.

    def validate_environment(self, *, torch_dtype: Any = None, device_map: Any = None) -> None:
        """Raises `BackendError` that names what is missing and how to get it."""
        for needed in self.requirements:
            module = require(needed.package, needed.purpose)
            check_version(needed, str(getattr(module, "__version__", "") or _metadata_version(needed.package)))

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """The `torch.dtype` of what is not packed; `torch_dtype` is the caller's choice or the
        checkpoint's own type, `None` where neither is known."""
        return torch_dtype if torch_dtype is not None else require("torch", "load models").float32

    def update_device_map(self, device_map: Any) -> Any:
        """The device map to load with; `None` leaves the model on the CPU."""
        return device_map

    # The skeleton on the meta device.

    def preprocess_model(
        self,
        model: Any,
        *,
        skip: Iterable[str] = (),
        keep_in_fp32: Iterable[str] = (),
        packed: Collection[str] | None = None,
    ) -> None:
        """Chooses the layers, and puts the backend's in their place.

        `skip` are entries for modules that the host protects, `keep_in_fp32` for those it keeps in
        float32; the config's own list comes on top, and all are read by the one matcher. `packed` are
        the parameters (`a.b.weight`) that the checkpoint holds in packed form: then these decide, and
        not the lists.
        """
        own = Matcher(self.config.skip_list)
        matcher = Matcher(dict.fromkeys([*self.config.skip_list, *skip, *keep_in_fp32]))
        self.modules_to_not_convert = list(matcher.entries)
        self.quantized = {}
        paths: list[str] = []

        def choose(path: str, module: Any) -> Any:
            if not self.takes(path, module):
                return None
            paths.append(path)
            if self.is_offloaded(path):
                return None
            if packed is not None and self.pre_quantized:
                if f"{path}.weight" not in packed:
                    return None
            elif matcher.matches(path):
                return None
            new = self.replace_layer(path, module)
            if new is not None:
                self.quantized[path] = type(module)
            return new

        replace_layers(model, choose)
        if packed is None:
            for entry in own.unused(paths):
                warnings.warn(f'the entry "{entry}" of the skip list names no layer of the model', stacklevel=3)

    def is_offloaded(self, path: str) -> bool:
        """Whether the device map keeps the module at `path` where its weights cannot be packed: on disk."""
        return isinstance(self.device_map, Mapping) and Placement(self.device_map).of(path) == DISK

    def takes(self, path: str, module: Any) -> bool:
        """Whether the backend has a layer for `module`: by default for `torch.nn.Linear` itself."""
        return type(module) is require("torch", "load models").nn.Linear

    @abstractmethod
    def replace_layer(self, path: str, module: Any) -> Any:
        """The backend's layer for `module` on the meta device, `module` itself where it stays as it is and
        only its weight is packed, or `None` where it is left alone."""

    def packed_bytes(self, model: Any, name: str) -> int | None:
        """Bytes that parameter `name` takes once it is packed, statistics included; `None` where it is
        not packed. By default what the checkpoint holds, or what `packing` says."""
        if not self.check_if_quantized_param(model, name):
            return None
        if name in self.stored_bytes:
            return self.stored_bytes[name]
        chosen = self.packing(model, name)
        shape = self.weight_shape(model, name)
        if chosen is None or shape is None:
            return None
        from .. import _rust

        encoded, params = list(chosen.shape or shape), json.dumps(dict(chosen.params))
        components = json.loads(_rust.layout(chosen.format, encoded, params))
        return sum(int(component["bytes"]) for component in components)

    def weight_shape(self, model: Any, name: str) -> tuple[int, ...] | None:
        """Shape of the full-precision weight that parameter `name` stands for, where it is known."""
        layer = model.get_submodule(name.rpartition(".")[0])
        if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
            return (int(layer.out_features), int(layer.in_features))
        return None

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """The budget of each device for `device_map="auto"`. Sizes are those of the packed weights."""
        return max_memory

    # The weights.

    def component_of(self, key: str) -> tuple[str, str] | None:
        """Which parameter a stored array belongs to, and as which component: `a.weight.absmax` gives
        `("a.weight", "absmax")`. `None`: it is a parameter or buffer of its own."""
        return None

    def check_if_quantized_param(self, model: Any, name: str) -> bool:
        """Whether parameter `name` (`a.b.weight`) is set by `create_quantized_param`."""
        path, _, leaf = name.rpartition(".")
        return leaf == "weight" and path in self.quantized

    def packing(self, model: Any, name: str) -> Packing | None:
        """How the engine packs parameter `name` from the file; `None` where the backend's library does."""
        return None

    @abstractmethod
    def create_quantized_param(self, model: Any, name: str, value: Any, *, device: Any, dtype: Any = None) -> None:
        """Sets parameter `name` of the model on `device`.

        `value` is a full-precision tensor on the CPU, or a mapping from component (`""`, `absmax`) to
        tensor: packed by the engine as `packing` said, or as the checkpoint holds them. `dtype` is the
        type that what is not packed is loaded in. A tensor is packed here, on the CPU.
        """

    def update_missing_keys(self, model: Any, missing: Sequence[str]) -> list[str]:
        """Those of the `missing` keys that really ought to be in the checkpoint."""
        return list(missing)

    # The finished model.

    def postprocess_model(self, model: Any) -> None:
        """Called once all weights are in place."""
        return None

    def stored_state(self, model: Any) -> tuple[Mapping[str, Any], dict[str, str]]:
        """The model's tensors as a checkpoint holds them, and the metadata that belongs to them."""
        return self.stored_form(model.state_dict())

    def stored_form(self, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, str]]:
        """`state`, a model's tensors by name, as `stored_state` gives it. Hosts that save by themselves ask for
        this: they have the tensors, and not always the model."""
        return state, {}

    def beside(self, model: Any) -> Mapping[str, str]:
        """Text files that stand beside the weights, by name."""
        return {}

    def exported(self, model: Any, form: str, skeleton: Callable[[], Any]) -> Exported:
        """The model in a form for other programs. `skeleton` gives a model of its kind with ordinary layers,
        on the meta device.

        Raises `ConfigError` for a form that the backend has not.
        """
        raise ConfigError(f"form={form!r}: {self.name} models are saved in one form, which is what form=None gives")

    def pickled_state(self, model: Any) -> Mapping[str, Any]:
        """The model's tensors as torch's own files hold them, which have no metadata."""
        return self.stored_state(model)[0]

    def written_form(self, tensors: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """The tensors of a checkpoint, by their names there, as they are written, and what its
        `quantization_config` says of them beside `config`."""
        return tensors, {}

    def dequantize(self, model: Any, *, dtype: Any = None) -> Any:
        """Puts ordinary layers with decoded weights in place; gives the model.

        Decodes where the weights are, rounds once to `dtype` (by default the type that the weights were
        packed from). Raises `BackendError` where the backend cannot.
        """
        raise BackendError(f"{self.name} weights are not turned back by this backend")


def quantizer_of(model: Any) -> Quantizer | None:
    """The quantizer of a model that weightpack loaded, also behind a host's own object; `None` for others."""
    found = getattr(model, "hf_quantizer", None)
    for candidate in (found, getattr(found, "quantizer", None)):
        if isinstance(candidate, Quantizer):
            return candidate
    return None


def check_version(needed: Requirement, installed: str) -> None:
    """Raises `BackendError` for a release that is older than needed."""
    if _numbers(installed) < _numbers(needed.minimum):
        package = distribution(needed.package)
        raise BackendError(
            f"{package} {installed} is too old to {needed.purpose}, expected {needed.minimum} or later",
            hint=f"pip install --upgrade '{package}>={needed.minimum}'",
        )


def _numbers(version: str) -> tuple[int, ...]:
    import re

    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _metadata_version(package: str) -> str:
    from importlib import metadata

    for name in metadata.packages_distributions().get(package.partition(".")[0], ()):
        return metadata.version(name)
    return ""
