"""diffusers' model classes, for `weightpack.from_pretrained`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..._lazy import require
from ...errors import ConfigError
from ...loading.host import KeyPlan, Target
from ...mapping import MappedTensor
from ...stored import Stored
from .configs import fixed_entries, left_unpacked

_PURPOSE = "load its model classes"


class DiffusersHost:
    """Builds and names things as `ModelMixin.from_pretrained` does."""

    name = "diffusers"
    stem: str | None = "diffusion_pytorch_model"

    def load_config(self, model_class: Any, config: Mapping[str, Any], folder: Any) -> tuple[Any, Any]:
        """`AutoModel` gives way to the class that `_class_name` names, and an old class such as
        `Transformer2DModel` to the one that took its place.

        Keys that the class does not know are kept. Raises `ConfigError` for a class that diffusers
        does not have.
        """
        diffusers = require("diffusers", _PURPOSE)
        if model_class is diffusers.AutoModel:
            model_class = _named_class(diffusers, config)
        remapped = require("diffusers.models.model_loading_utils", _PURPOSE)
        if model_class.__name__ in remapped._CLASS_REMAPPING_DICT and "norm_type" in config:
            model_class = remapped._fetch_remapped_cls_from_config(config, model_class)
        kept = {key: value for key, value in config.items() if key != "quantization_config"}
        if is_local_path(kept.get("_name_or_path")):
            del kept["_name_or_path"]
        return model_class, kept

    def build(self, model_class: Any, config: Any, torch_dtype: Any) -> Any:
        """The model by `from_config`, with `torch_dtype` as torch's default type, as in diffusers.

        Position tables and the like are computed in float32 all the same, and say so. The few classes
        that leave the type open (a blur kernel in WanAnimate, a mask in PriorTransformer) only run
        where it is that of their weights.
        """
        torch = require("torch", "load models")
        before = torch.get_default_dtype()
        try:
            if torch_dtype in (torch.float16, torch.bfloat16, torch.float64):
                torch.set_default_dtype(torch_dtype)
            return model_class.from_config(config)
        finally:
            torch.set_default_dtype(before)

    def default_dtype(self, config: Any, stored: Any, quantized: bool) -> Any:
        """float32 whatever the files hold, as in diffusers; a quantizer chooses for itself."""
        return None if quantized else require("torch", "load models").float32

    def plan_keys(self, model: Any, entries: Mapping[str, tuple[int, ...]]) -> KeyPlan:
        """Keys are names in the model, but for those of old attention blocks, which the class renames.

        Left out without a word is what the class's `_keys_to_ignore_on_load_unexpected` finds.
        """
        renamed = _renamed(model, entries)
        expected = set(model.state_dict())
        patterns = model._keys_to_ignore_on_load_unexpected or ()
        ignored = {
            stored
            for name, stored in renamed.items()
            if name not in expected and any(re.search(pattern, name) for pattern in patterns)
        }
        targets = [Target(name, (stored,)) for name, stored in renamed.items() if stored not in ignored]
        return KeyPlan(targets, frozenset(ignored))

    def gguf_names(self, model: Any, shapes: Mapping[str, tuple[int, ...]]) -> list[MappedTensor] | None:
        """By diffusers' own functions for single files."""
        from .gguf_names import gguf_names

        return gguf_names(model, shapes)

    def protected(self, model: Any) -> Iterable[str]:
        """Nothing: diffusers packs every linear layer."""
        return ()

    def keep_in_fp32(self, model: Any, torch_dtype: Any) -> Iterable[str]:
        """The class's own list, whatever the type of the rest. An entry is one segment of a name, of a
        module or of a parameter."""
        return fixed_entries(model)

    def left_unpacked(self, model: Any, quantizer: Any, in_fp32: Sequence[str]) -> list[str]:
        """As diffusers' quantizer of that backend reads them."""
        return left_unpacked(model, quantizer, in_fp32)

    def no_split(self, model: Any) -> list[str]:
        """Those of the class and of the diffusers models in it.

        Raises `ConfigError` for a class that does not say what has to stay together.
        """
        try:
            return list(model._get_no_split_modules("auto"))
        except ValueError as error:
            raise ConfigError(
                f"{type(model).__name__} does not say which of its modules stay on one device",
                hint='give device_map as a dictionary from module to device, or as one device ("cuda")',
            ) from error

    def tie(self, model: Any, missing: Sequence[str]) -> None:
        """Nothing: diffusers ties no parameters."""

    def may_miss(self, model: Any, names: Sequence[str]) -> list[str]:
        """All of them matter."""
        return list(names)

    def initialise(self, model: Any, names: Sequence[str]) -> None:
        """As in a fresh layer; diffusers itself leaves them without any values."""
        from ...loading.missing import initialise

        initialise(model, names)

    def finish(self, model: Any, config: Any, quantizer: Any, folder: Any, torch_dtype: Any) -> None:
        """Leaves the model in evaluation, and a packed one with what diffusers' own methods look for.

        Unlike diffusers' loader it does not note the folder, which would end up in every `config.json`
        saved from here on.
        """
        if quantizer is not None:
            from .quantizer import attach

            attach(model, quantizer, torch_dtype)
        model.eval()

    def stored_tensors(self, model: Any, quantizer: Any, state: Mapping[str, Any]) -> list[Stored]:
        """See `saving.stored_tensors`."""
        from .saving import stored_tensors

        return stored_tensors(quantizer, state)

    def files(self, model: Any, quantizer: Any) -> Mapping[str, str]:
        """See `saving.files`."""
        from .saving import files

        return files(model, quantizer)


def _named_class(diffusers: Any, config: Mapping[str, Any]) -> Any:
    name = config.get("_class_name")
    if name is None and "model_type" in config:
        raise ConfigError(
            f'the config is one of transformers, of model_type "{config["model_type"]}"',
            hint="give a class of transformers, such as transformers.AutoModel",
        )
    found = getattr(diffusers, str(name), None)
    if name is None or found is None or not hasattr(found, "from_config"):
        raise ConfigError(
            "the config does not name its class: it has no _class_name"
            if name is None
            else f"diffusers {diffusers.__version__} has no model class {name}"
        )
    return found


def is_local_path(name: Any) -> bool:
    """Whether a name is a place on someone's disk rather than a repository (`owner/model`)."""
    if not isinstance(name, str):
        return name is not None
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    return absolute or name.startswith((".", "~")) or "\\" in name or name.count("/") > 1 or Path(name).exists()


def _renamed(model: Any, entries: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Name in the model for each name in the checkpoint, by the class's own renaming."""
    torch = require("torch", "load models")
    stand_ins = {name: torch.empty(shape, device="meta") for name, shape in entries.items()}
    stored = {id(tensor): name for name, tensor in stand_ins.items()}
    state = dict(stand_ins)
    model._fix_state_dict_keys_on_load(state)
    return {name: stored[id(tensor)] for name, tensor in state.items() if id(tensor) in stored}
