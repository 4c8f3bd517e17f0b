"""What the loader asks of the library that a model class comes from.

A class of transformers or diffusers is known by the package of one of its bases; its adapter,
`weightpack.integrations.<host>.ADAPTER`, is looked up by that name. Everything else is a plain module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from ..mapping import Rows

if TYPE_CHECKING:
    from ..stored import Stored

HOSTS = ("transformers", "diffusers")
_BASES = {"PreTrainedModel": "transformers", "ModelMixin": "diffusers"}
"""The base classes of their models: diffusers defines some models of transformers (a safety checker)."""


@dataclass(frozen=True)
class Target:
    """One parameter or buffer of the model, and where it comes from.

    `name` is its path in the model, `sources` the logical names in the checkpoint. One source is read as
    it is; `rows`, `shape` and `add` say how the engine puts the tensor together from rows of stored ones
    (as in a conversion). Otherwise `merge` makes it from the sources' tensors, in their order.
    """

    name: str
    sources: tuple[str, ...]
    rows: tuple[Rows, ...] = ()
    shape: tuple[int, ...] | None = None
    add: float | None = None
    merge: Callable[[list[Any]], Any] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class KeyPlan:
    """What the keys of a checkpoint become: the targets, and the keys that the host passes over."""

    targets: Sequence[Target]
    ignored: frozenset[str] = frozenset()


class Host(Protocol):
    """One library of model classes.

    An adapter may have more methods, which are looked up by name: `dtype_of(name, own, torch_dtype)`, the
    type of a parameter that is not packed; `config_from_gguf(weights)` and `gguf_names(model, shapes)`
    for GGUF files; `left_unpacked(model, quantizer, in_fp32)`, those of the modules kept in float32 that
    are not packed either (all of them where there is no such method); `quantizer_for(model)`, what is known
    of a model that the host packed with a quantizer of its own, or `None`; `unread(quantizer)`, what becomes
    of a saved model in the host's own hands where the host has no reader for it, else `None`.
    """

    name: str
    """`transformers`, `diffusers` or `plain`."""
    stem: str | None
    """File name of weights, without extension: `model`, `diffusion_pytorch_model`; `None`: either."""

    def load_config(self, model_class: Any, config: Mapping[str, Any], folder: Any) -> tuple[Any, Any]:
        """The class that is really built (an Auto class gives way to it), and the config it is built from.

        `config` is the parsed `config.json`; `quantization_config` is not in it.
        """

    def build(self, model_class: Any, config: Any, torch_dtype: Any) -> Any:
        """The model, called inside a context in which parameters are made on the meta device."""

    def default_dtype(self, config: Any, stored: Any, quantized: bool) -> Any:
        """The `torch.dtype` where the caller asks for none, `None` for the quantizer's choice.
        `stored` is the type of most weights in the files, or `None`."""

    def plan_keys(self, model: Any, entries: Mapping[str, tuple[int, ...]]) -> KeyPlan:
        """What the tensors of a checkpoint (logical name to shape) become in `model`."""

    def protected(self, model: Any) -> Iterable[str]:
        """Modules that are not packed unless asked for by name: the output layer, tied layers."""

    def keep_in_fp32(self, model: Any, torch_dtype: Any) -> Iterable[str]:
        """Modules whose parameters stay in float32."""

    def no_split(self, model: Any) -> list[str]:
        """Names of classes whose modules stay on one device."""

    def tie(self, model: Any, missing: Sequence[str]) -> None:
        """Makes tied parameters one again. Called once everything that is in the checkpoint has been set; what
        it lacks is `missing`. Besides these, parameters that stay on disk are on the meta device."""

    def may_miss(self, model: Any, names: Sequence[str]) -> list[str]:
        """Those of the missing parameters that matter: tied ones and those made anew do not."""

    def initialise(self, model: Any, names: Sequence[str]) -> None:
        """Gives parameters that the checkpoint lacks their first values; they are real, of unknown content."""

    def finish(self, model: Any, config: Any, quantizer: Any, folder: Any, torch_dtype: Any) -> None:
        """What the host's own loader leaves on a model: config entries, `hf_quantizer`, generation config."""

    def stored_tensors(self, model: Any, quantizer: Any, state: Mapping[str, Any]) -> list[Stored]:
        """`state`, tensors by the names that they have in the model, as the host's checkpoints hold them: under
        their names there, in the order of files, and of tied ones those that the host expects."""

    def files(self, model: Any, quantizer: Any) -> Mapping[str, str]:
        """Text files beside the weights, by name: `config.json`, with a complete `quantization_config` where
        there is a quantizer, without paths of this machine and without what only counts in memory. Raises
        `ConfigError` for a config that is no JSON. Changes nothing about the model."""


def host_of(model_class: Any) -> Host:
    """The adapter of the library that `model_class` comes from."""
    named = [
        (base.__name__, str(getattr(base, "__module__", "")).partition(".")[0])
        for base in getattr(model_class, "__mro__", ())
    ]
    package = next((package for name, package in named if _BASES.get(name) == package), None)
    package = package or next((package for _, package in named if package in HOSTS), None)
    if package is not None:
        found: Host = import_module(f"weightpack.integrations.{package}").ADAPTER
        return found
    from .plain import PlainHost

    plain: Host = PlainHost()
    return plain
