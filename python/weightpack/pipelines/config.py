"""Which components of a pipeline are packed, and how."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ..errors import ConfigError, WeightpackError
from ..quantizers.auto import AutoQuantizer, config_class, quantizer_names
from ..quantizers.config import QuantizationConfig

_GIVEN = {"bitsandbytes_4bit": {"load_in_4bit": True}, "bitsandbytes_8bit": {"load_in_8bit": True}}
"""What the name of a backend says already of its config."""


@dataclass(frozen=True)
class PipelineQuantizationConfig:
    """How the components of a pipeline are packed while `load_pipeline` loads it; in one of two ways.

    One backend for several components: `quant_backend` is `bitsandbytes_4bit`, `bitsandbytes_8bit`,
    `gguf`, `quanto`, `torchao`, `modelopt` or a name given to `register_quantizer`, `quant_kwargs` the
    fields of its config. `components_to_quantize` names the components. Where it is left out, these are
    all models but autoencoders and safety checkers, which lose most and weigh least, and but those whose
    weights are packed already. diffusers packs them too: name them to get the same.

    Or each component its own: `quant_mapping` from component to config, weightpack's, a dictionary, or a
    config object of any host, whichever library the component comes from.

    What the hosts disagree about is no matter here: the same config serves models of both. Raises
    `ConfigError` for a combination that says too much or too little, and for what a config refuses.

    >>> PipelineQuantizationConfig("quanto", {"weights_dtype": "int8"}, "transformer").components_to_quantize
    ('transformer',)
    """

    quant_backend: str | None = None
    quant_kwargs: Mapping[str, Any] | None = None
    components_to_quantize: str | Sequence[str] | None = None
    quant_mapping: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if (self.quant_backend is None) == (not self.quant_mapping):
            told = "both given" if self.quant_mapping else "neither given"
            raise ConfigError(
                f"quant_backend and quant_mapping are {told}, expected one of them",
                hint="one backend for several components, or a mapping from component to config",
            )
        if self.quant_mapping:
            self._settle_mapping(self.quant_mapping)
        else:
            self._settle_backend()

    def _settle_mapping(self, mapping: Mapping[str, Any]) -> None:
        for field in ("quant_kwargs", "components_to_quantize"):
            if getattr(self, field):
                raise ConfigError(f"{field} belongs to quant_backend, and quant_mapping says it for each component")
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"quant_mapping is a {type(mapping).__name__}, expected a dictionary")
        configs = {}
        for component, config in mapping.items():
            try:
                configs[str(component)] = AutoQuantizer.as_config(config)
            except WeightpackError as error:
                raise type(error)(f"{component}: {error.message}", hint=error.hint) from error
        object.__setattr__(self, "quant_mapping", configs)

    def _settle_backend(self) -> None:
        if not self.quant_kwargs:
            raise ConfigError(
                f'quant_backend "{self.quant_backend}" comes without quant_kwargs, the fields of its config'
            )
        named = self.components_to_quantize
        if named is not None:
            names = (named,) if isinstance(named, str) else tuple(named)
            if not names or not all(isinstance(name, str) for name in names):
                raise ConfigError(f"components_to_quantize {named!r} does not name components")
            object.__setattr__(self, "components_to_quantize", names)
        object.__setattr__(self, "quant_kwargs", dict(self.quant_kwargs))
        self._config_of_backend()

    def _config_of_backend(self) -> QuantizationConfig:
        backend, kwargs = str(self.quant_backend), dict(self.quant_kwargs or {})
        if backend not in quantizer_names():
            raise ConfigError(f'quant_backend "{backend}" is none of {", ".join(quantizer_names())}')
        config: QuantizationConfig = config_class(backend).from_dict({**_GIVEN.get(backend, {}), **kwargs})
        if config.quantizer_name != backend:
            raise ConfigError(f"quant_kwargs say {config.quantizer_name}, and quant_backend is {backend}")
        return config

    @property
    def named(self) -> tuple[str, ...] | None:
        """The components that are asked for by name; `None` where none is."""
        if self.quant_mapping:
            return tuple(self.quant_mapping)
        return None if self.components_to_quantize is None else tuple(self.components_to_quantize)

    def configs(self, models: Sequence[str], *, spared: Collection[str] = ()) -> dict[str, QuantizationConfig]:
        """The config of each component that is packed.

        `models` are those that could be, `spared` such as are only packed when they are named. Raises
        `ConfigError` for a name that is none of `models`.
        """
        for name in self.named or ():
            check_component(name, models, "the quantization config")
        if self.quant_mapping:
            return dict(self.quant_mapping)
        config = self._config_of_backend()
        chosen = self.named or [name for name in models if name not in spared]
        return dict.fromkeys(chosen, config)

    @classmethod
    def from_host(cls, config: Any) -> PipelineQuantizationConfig:
        """This class's own objects as they are, and diffusers' of the same name by their fields.

        Raises `ConfigError` for anything else.
        """
        if isinstance(config, cls):
            return config
        fields = ("quant_backend", "quant_kwargs", "components_to_quantize", "quant_mapping")
        if not all(hasattr(config, field) for field in fields):
            raise ConfigError(
                f"quantization_config is a {type(config).__name__}, expected a PipelineQuantizationConfig",
                hint='PipelineQuantizationConfig(quant_mapping={"transformer": config}) packs one component',
            )
        return cls(**{field: getattr(config, field) or None for field in fields})


def check_component(name: str, known: Iterable[str], where: str) -> None:
    """Raises `ConfigError` where `name` is none of `known`: says which there are. `where` names the option."""
    known = list(known)
    if name not in known:
        close = get_close_matches(name, known, n=1)
        listed = f"the models are {', '.join(known)}" if known else "there is none that could be meant"
        hint = f"did you mean {close[0]}? {listed}" if close else listed
        raise ConfigError(f'{where} names "{name}", which is no model that is loaded here', hint=hint)
