"""What loading and saving ask of the library that pipelines come from."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol


class PipelineHost(Protocol):
    """diffusers; its adapter is `weightpack.integrations.diffusers.pipelines.ADAPTER`."""

    def pipeline_class(self, class_name: Any) -> Any:
        """The pipeline class that an index names. Raises `ConfigError` where the library has none."""

    def expected(self, pipeline_class: Any) -> tuple[list[str], list[str], list[str]]:
        """Arguments of a pipeline class: parts that it needs, parts that it may do without, other options."""

    def component_class(self, library: str, class_name: str) -> Any:
        """The class of a part. Raises `ConfigError` where it is not there, `BackendError` for a missing
        library. Imports nothing that only a checkpoint asks for."""

    def is_left_plain(self, component: str, component_class: Any) -> bool:
        """Whether a model is left as it is unless someone asks for it by name."""

    def parts(self, pipeline: Any) -> Mapping[str, Any]:
        """The parts of a pipeline that are there, by name, as they are saved. Raises `ConfigError` for an
        object that is no pipeline."""

    def index_text(self, pipeline: Any) -> str:
        """The content of `model_index.json`, as the library writes it, without a path of this machine."""


def pipeline_host() -> PipelineHost:
    """The adapter."""
    found: PipelineHost = import_module("weightpack.integrations.diffusers.pipelines").ADAPTER
    return found
