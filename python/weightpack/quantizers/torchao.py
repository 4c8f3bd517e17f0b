"""torchao: weights as tensor subclasses that bring their own kernels, inside ordinary layers.

No layer is replaced: `torch.nn.Linear` stays, and its weight becomes one of torchao's tensors. Weights are
packed one at a time while the model is read: on the CPU by the engine what `torchao_engine` lists, else by torchao,
on the device where the weight will live, or on an accelerator where only that has the kernel. What a config of
torchao means stands in `torchao_forms`, how one weight is packed and rebuilt in `torchao_weights`.

What hosts do differently (diffusers 0.42, transformers 5.23): in diffusers `device_map={"": "cpu"}` packs
nothing at all, and a packed checkpoint with a device map that names the cpu is refused; transformers
packs an embedding that it was asked to pack only if the config names modules. Here all of these work.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .._lazy import is_installed, require
from ..errors import CheckpointError, ConfigError, FormatError
from ..matcher import Matcher
from ..placement import Placement
from . import dtypes
from . import torchao_demands as demands
from . import torchao_forms as forms
from .base import Packing, Quantizer, Requirement
from .config import QuantizationConfig, flag, names_of
from .modules import owner, set_parameter
from .torchao_engine import assembled, packing_of
from .torchao_slabs import pack
from .torchao_weights import FileWeights, decode, flatten, is_packed, is_saved_class

_PURPOSE = "pack weights for torchao"


@dataclass(frozen=True, eq=False)
class TorchAoConfig(QuantizationConfig):
    """How torchao packs a model.

    `quant_type` is one of torchao's config objects, a short name (`int8`, `int8_dynamic`, `float8`,
    `float8_dynamic`, `int4`, `nvfp4`, `nvfp4_dynamic`, `mxfp8`, `mxfp4`), or what a `config.json` holds.
    `modules_to_not_convert` names layers that stay as they are (see `weightpack.matcher`). With
    `include_input_output_embeddings` the embedding and the output layer are packed too; with
    `untie_embedding_weights` an output layer that shares the embedding's weight keeps a copy in full
    precision. torchao is imported when the object is needed, not before.

    >>> TorchAoConfig("int8").to_dict()["quant_type"]
    {'default': {'_type': 'Int8WeightOnlyConfig', '_version': 2, '_data': {}}}
    """

    quant_method: ClassVar[str] = "torchao"
    quant_type: Any
    modules_to_not_convert: tuple[str, ...] | None = None
    include_input_output_embeddings: bool = False
    untie_embedding_weights: bool = False

    def __post_init__(self) -> None:
        given = self.quant_type
        if isinstance(given, str):
            forms.form_of_name(given)
        elif isinstance(given, Mapping):
            self._set("quant_type", forms.form_of_section(given))
        elif not forms.is_config(given):
            what = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
            raise ConfigError(
                f"quant_type is {what}, expected a config object of torchao or a name",
                hint=f"the names are {', '.join(forms.SHORT_NAMES)}",
            )
        self._set("modules_to_not_convert", names_of(self.modules_to_not_convert, "modules_to_not_convert"))
        flag(self.include_input_output_embeddings, "include_input_output_embeddings")
        flag(self.untie_embedding_weights, "untie_embedding_weights")

    @property
    def form(self) -> dict[str, Any]:
        """`quant_type` as JSON. Raises `ConfigError` for an object that JSON cannot hold."""
        if isinstance(self.quant_type, str):
            return forms.form_of_name(self.quant_type)
        return (
            forms.form_of_section(self.quant_type)
            if isinstance(self.quant_type, Mapping)
            else forms.form_of(self.quant_type)
        )

    def build(self) -> Any:
        """`quant_type` as a config object of torchao. Raises `BackendError` without torchao, and
        `ConfigError` for what the installed one does not know."""
        return self.quant_type if forms.is_config(self.quant_type) else forms.build(self.form)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as hosts write them."""
        return {**super().to_dict(), "quant_type": {"default": self.form}}

    def to_diff_dict(self) -> dict[str, Any]:
        """`quant_type`, and the other fields that differ from their default."""
        return {**super().to_diff_dict(), "quant_type": {"default": self.form}}

    @classmethod
    def _read(cls, config_dict: Mapping[str, Any]) -> dict[str, Any]:
        old = config_dict.get("quant_type")
        if isinstance(old, str) and ("quant_type_kwargs" in config_dict or old not in forms.SHORT_NAMES):
            raise ConfigError(
                f"quant_type {old!r} was written by a release of diffusers or transformers that no longer loads",
                hint="pack the original model anew",
            )
        return super()._read(config_dict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TorchAoConfig):
            return NotImplemented
        return self._others() == other._others() and self._packs_like(other)

    def __hash__(self) -> int:
        return hash((self.form["_type"], self._others()))

    def _others(self) -> tuple[Any, ...]:
        return (self.modules_to_not_convert, self.include_input_output_embeddings, self.untie_embedding_weights)

    def _packs_like(self, other: TorchAoConfig) -> bool:
        mine, theirs = self.form, other.form
        if mine == theirs or mine["_type"] != theirs["_type"] or not is_installed("torchao"):
            return mine == theirs
        # One of the two may leave out what is the default.
        return forms.form_of(self.build()) == forms.form_of(other.build())


class TorchAoQuantizer(Quantizer):
    """Packs the weights of linear layers, and of embeddings where asked, as tensors of torchao.

    `file_metadata` is the `__metadata__` of all files of a packed checkpoint together; it must be set
    before `component_of` is asked. After `preprocess_model`, `left` maps layers that torchao cannot pack to
    the reason.
    """

    name = "torchao"
    requirements = (Requirement("torchao", "0.16.0", _PURPOSE),)
    is_compileable = True

    config: TorchAoConfig
    file_metadata: Mapping[str, str]

    def __init__(self, config: QuantizationConfig, *, pre_quantized: bool = True) -> None:
        super().__init__(config, pre_quantized=pre_quantized)
        form = self.config.form
        self.is_serializable = forms.is_saved(form)
        self.is_trainable = forms.passes_gradients(form)
        self._named = frozenset(forms.named_exactly(form))
        self.file_metadata = {}
        self.left: dict[str, str] = {}
        self._built: Any = None
        self._weights: FileWeights | None = None
        self._loose: set[str] = set()
        self._embedding = _Embedding()
        self._places: dict[tuple[int, str], Any] = {}
        self._sizes: dict[tuple[Any, ...], int | str | None] = {}

    # Before the model is built.

    def validate_environment(self, *, torch_dtype: Any = None, device_map: Any = None) -> None:
        """Also tries each config on a small weight: `BackendError` names what the machine lacks.

        A packed checkpoint is taken on any machine: it can be moved, decoded or saved there.
        """
        super().validate_environment(torch_dtype=torch_dtype, device_map=device_map)
        if not self.pre_quantized:
            for config in forms.configs_in(self._config()):
                demands.check_machine(config, device_map)

    def update_torch_dtype(self, torch_dtype: Any) -> Any:
        """The caller's choice, or bfloat16. `ConfigError` where the config packs other types only."""
        dtype = torch_dtype if torch_dtype is not None else require("torch", _PURPOSE).bfloat16
        if not self.pre_quantized:
            for config in forms.configs_in(self._config()):
                demands.check_dtype(config, dtype)
        self.torch_dtype = dtype
        return dtype

    # The skeleton on the meta device.

    def preprocess_model(
        self,
        model: Any,
        *,
        skip: Iterable[str] = (),
        keep_in_fp32: Iterable[str] = (),
        packed: Collection[str] | None = None,
    ) -> None:
        """Chooses the layers. Those that torchao cannot pack stay as they are, with a warning.

        Modules that the config names in full are packed though the host protects them, and so are the
        embedding and the output layer if the config includes them.
        """
        # A device map that is worked out may call for a second skeleton.
        self.left, self._loose = {}, set()
        wanted = set(self._named)
        if self.config.include_input_output_embeddings:
            self._embedding = _Embedding.of(model, copied=self._embedding.copied)
            wanted |= {path for path in self._embedding.both if path != self._embedding.copied}
        if self.config.untie_embedding_weights:
            self._embedding.untie(model)
            wanted.discard(str(self._embedding.copied))
        skip = [path for path in skip if path not in wanted]
        super().preprocess_model(model, skip=skip, keep_in_fp32=keep_in_fp32, packed=packed)
        self._choose_loose(model, packed)
        self._refuse_disk(packed or ())
        if self.left:
            named = "; ".join(f"{path} ({reason})" for path, reason in self.left.items())
            warnings.warn(f"torchao cannot pack {len(self.left)} layers, they stay as they are: {named}", stacklevel=2)

    def takes(self, path: str, module: Any) -> bool:
        """Linear layers, except those that hand their weight to a kernel of torch; embeddings where asked."""
        nn = require("torch", _PURPOSE).nn
        if isinstance(module, nn.Linear):
            return not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        asked = path in self._embedding.both or {path, f"{path}.weight"} & self._named
        return isinstance(module, nn.Embedding) and (self.pre_quantized or bool(asked))

    def replace_layer(self, path: str, module: Any) -> Any:
        """`module` itself: only its weight changes."""
        if self.pre_quantized:
            return module
        config = forms.assigned(self._config(), f"{path}.weight")
        if config is None:
            return None
        nn = require("torch", _PURPOSE).nn
        size = self._size(config, tuple(module.weight.shape), embedding=isinstance(module, nn.Embedding))
        if isinstance(size, str):
            self.left[path] = size
            return None
        return module

    def packed_bytes(self, model: Any, name: str) -> int | None:
        """The real size, scales included: what the checkpoint holds, or what torchao makes of a weight of that
        shape on the meta device."""
        if name in self.stored_bytes:
            return super().packed_bytes(model, name)
        config = forms.assigned(self._config(), name) if self.check_if_quantized_param(model, name) else None
        if config is None:
            return None
        module, leaf = owner(model, name)
        size = self._size(config, tuple(module._parameters[leaf].shape))
        return size if isinstance(size, int) else None

    # The weights.

    def component_of(self, key: str) -> tuple[str, str] | None:
        """By the metadata of the files. `CheckpointError` for packed arrays that no metadata describes."""
        if not self.pre_quantized:
            return None
        weights = self._file_weights()
        if not weights and key.endswith("_qdata"):
            raise CheckpointError(f'no file of the checkpoint describes how torchao packed "{key}"')
        return weights.component_of(key)

    def check_if_quantized_param(self, model: Any, name: str) -> bool:
        """Whether it is the weight of a chosen layer, or a parameter that is packed by its own name."""
        return super().check_if_quantized_param(model, name) or name in self._loose

    def packing(self, model: Any, name: str) -> Packing | None:
        """By the engine what `torchao_engine` lists, for weights on the CPU: there torchao makes the same bytes."""
        module, leaf = owner(model, name)
        if self.pre_quantized or leaf != "weight" or self._embedding.copied is not None:
            return None
        if isinstance(self.device_map, Mapping) and str(Placement(self.device_map).of(name)) != "cpu":
            return None
        chosen = packing_of(forms.assigned(self._config(), name))
        if chosen is None or module.weight.dim() != 2 or self.torch_dtype is None or self.torch_dtype.itemsize > 4:
            return None
        return dataclasses.replace(chosen, through=dtypes.stored_name(self.torch_dtype))

    def create_quantized_param(self, model: Any, name: str, value: Any, *, device: Any, dtype: Any = None) -> None:
        """Packs a weight on `device`, or puts it together from its arrays in the checkpoint.

        Packing on the device of the weight is what the hosts do, and torchao's kernels round as that
        device does. Where the config has kernels on an accelerator only, a weight for the cpu is packed
        there and brought back. Raises `FormatError` and `CheckpointError`.
        """
        torch = require("torch", _PURPOSE)
        module, leaf = owner(model, name)
        device = torch.device("cpu" if device is None else device)
        if isinstance(value, Mapping) and not self.pre_quantized:
            config, shape = forms.assigned(self._config(), name), tuple(module._parameters[leaf].shape)
            weight = assembled(config, value, shape, dtype or self.torch_dtype).to(device)
            module._parameters[leaf] = torch.nn.Parameter(weight, requires_grad=False)
            return
        if isinstance(value, Mapping):
            weight = self._file_weights().rebuild(name, value, dtype=dtype)
            expected = tuple(module._parameters[leaf].shape)
            if tuple(weight.shape) != expected:
                raise FormatError(f'the packed tensor "{name}" has shape {list(weight.shape)}, not {list(expected)}')
            module._parameters[leaf] = torch.nn.Parameter(weight.to(device), requires_grad=False)
            return
        config = forms.assigned(self._config(), name)
        place = self._place(config, device)
        full = value.to(device=place, dtype=dtype or self.torch_dtype)
        self._embedding.give_copy(model, name, full, device)
        module._parameters[leaf] = torch.nn.Parameter(full, requires_grad=False)
        del full, value
        pack(module, leaf, config, name=name)
        if place.type != device.type:
            module._parameters[leaf] = torch.nn.Parameter(getattr(module, leaf).to(device), requires_grad=False)

    def update_missing_keys(self, model: Any, missing: Sequence[str]) -> list[str]:
        """All but the weight of an output layer that gets a copy of the embedding."""
        return [name for name in missing if name != f"{self._embedding.copied}.weight"]

    # The finished model.

    def postprocess_model(self, model: Any) -> None:
        """Finds out whether all packed tensors are of classes that torchao writes."""
        packed = [one for one in model.parameters() if is_packed(one)]
        self.is_serializable = all(is_saved_class(one) for one in packed)

    def stored_form(self, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, str]]:
        """torchao's tensors taken apart, and how they are put together again."""
        return flatten(state)

    def pickled_state(self, model: Any) -> Mapping[str, Any]:
        """torchao's tensors whole: their pickles say how they are packed."""
        found: Mapping[str, Any] = model.state_dict()
        return found

    def dequantize(self, model: Any, *, dtype: Any = None) -> Any:
        """Puts plain weights in place of the packed ones; shared weights stay shared."""
        torch = require("torch", _PURPOSE)
        dtype = None if dtype is None else dtypes.torch_dtype(dtype)
        places: dict[int, list[tuple[Any, str]]] = {}
        for module in model.modules():
            for leaf, one in module._parameters.items():
                if one is not None and is_packed(one):
                    places.setdefault(id(one), []).append((module, leaf))
        for shared in places.values():
            module, leaf = shared[0]
            plain = torch.nn.Parameter(decode(module._parameters[leaf].detach(), dtype), requires_grad=False)
            for module, leaf in shared:
                module._parameters[leaf] = plain
                # Where a host packed it, torchao described the layer by its packed weight.
                module.__dict__.pop("extra_repr", None)
        self.quantized.clear()
        self._loose.clear()
        return model

    def _config(self) -> Any:
        if self._built is None:
            self._built = self.config.build()
        return self._built

    def _file_weights(self) -> FileWeights:
        if self._weights is None:
            self._weights = FileWeights(self.file_metadata)
        return self._weights

    def _refuse_disk(self, packed: Collection[str]) -> None:
        """Raises `ConfigError` where a packed weight is to stay on disk; plain ones may."""
        for name in packed:
            if self.pre_quantized and self.is_offloaded(name):
                raise ConfigError(
                    f'"{name}" is packed for torchao, and such weights do not stay on disk',
                    hint="give its module another device",
                )

    def _choose_loose(self, model: Any, packed: Collection[str] | None) -> None:
        """Parameters other than weights of layers, such as the experts of one layer in one tensor."""
        matcher = Matcher(self.modules_to_not_convert)
        for name, parameter in model.named_parameters():
            if super().check_if_quantized_param(model, name):
                continue
            if self.pre_quantized:
                chosen = name in (packed or ())
            else:
                left = name.endswith(".weight") or matcher.matches(name) or self.is_offloaded(name)
                chosen = parameter.dim() > 1 and not left and forms.names_parameter(self._config(), name)
            if chosen:
                self._loose.add(name)

    def _place(self, config: Any, device: Any) -> Any:
        key = (id(config), device.type)
        if key not in self._places:
            self._places[key] = demands.place(config, device)
        found = self._places[key]
        return device if found.type == device.type else found

    def _size(self, config: Any, shape: tuple[int, ...], *, embedding: bool = False) -> int | str | None:
        """Bytes of a packed weight, or the reason why it cannot be packed; `None` where neither is known."""
        key = (id(config), shape, embedding)
        if key not in self._sizes:
            dtype = self.torch_dtype or require("torch", _PURPOSE).bfloat16
            self._sizes[key] = demands.size(config, shape, dtype, embedding=embedding)
        return self._sizes[key]


class _Embedding:
    """Paths of the embedding and of the output layer, and whether the latter gets a copy of its own."""

    def __init__(self, given: str | None = None, output: str | None = None, copied: str | None = None) -> None:
        self.given = given
        self.output = output
        self.copied = copied

    @property
    def both(self) -> list[str]:
        """Those of the two that there are."""
        return [path for path in (self.given, self.output) if path is not None]

    @classmethod
    def of(cls, model: Any, *, copied: str | None = None) -> _Embedding:
        """Asks the model. Raises `ConfigError` for one that does not tell."""
        if not callable(getattr(model, "get_input_embeddings", None)):
            raise ConfigError(
                f"include_input_output_embeddings: {type(model).__name__} does not tell which its embedding is"
            )
        paths = {id(module): path for path, module in model.named_modules(remove_duplicate=False)}
        output = getattr(model, "get_output_embeddings", lambda: None)()
        return cls(paths.get(id(model.get_input_embeddings())), paths.get(id(output)), copied)

    def untie(self, model: Any) -> None:
        """Ends the sharing of one weight by the two, in the model's own books."""
        config: Any = getattr(model, "config", None)
        text: Any = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        if self.given is None or self.output is None or not getattr(text, "tie_word_embeddings", False):
            return
        text.tie_word_embeddings = False
        getattr(model, "all_tied_weights_keys", {}).pop(f"{self.output}.weight", None)
        self.copied = self.output

    def give_copy(self, model: Any, name: str, full: Any, device: Any) -> None:
        """Gives the output layer its copy, when the embedding's weight passes by."""
        if self.copied is not None and name == f"{self.given}.weight":
            torch = require("torch", _PURPOSE)
            copied = torch.nn.Parameter(full.detach().to(device, copy=True), requires_grad=False)
            set_parameter(model, f"{self.copied}.weight", copied)
