"""diffusers' pipelines: their classes, their parts and the index that describes them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from ..._lazy import require
from ...errors import ConfigError

_PURPOSE = "load pipelines"
_LIBRARIES = ("diffusers", "transformers")
_AUTOENCODERS = "diffusers.models.autoencoders"
_LEFT_PLAIN = ("vae", "vqvae", "vqgan", "movq", "safety_checker")
"""Parts whose classes are not among diffusers' autoencoders in every pipeline."""


class DiffusersPipelines:
    """See `weightpack.pipelines.host.PipelineHost`."""

    def pipeline_class(self, class_name: Any) -> Any:
        """By its name in diffusers; code that comes with a checkpoint is never run."""
        diffusers = require("diffusers", _PURPOSE)
        if not isinstance(class_name, str):
            raise ConfigError(
                "the pipeline comes with code of its own, which is not run",
                hint="import its class and give it as pipeline_class",
            )
        found = getattr(diffusers, class_name, None)
        if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
            raise ConfigError(f"diffusers {diffusers.__version__} has no pipeline class {class_name}")
        return found

    def expected(self, pipeline_class: Any) -> tuple[list[str], list[str], list[str]]:
        """By the arguments of its constructor and the class's own list of optional parts."""
        if not hasattr(pipeline_class, "_get_signature_keys"):
            raise ConfigError(f"pipeline_class {pipeline_class!r} is no pipeline class of diffusers")
        modules, options = pipeline_class._get_signature_keys(pipeline_class)
        optional = set(pipeline_class._optional_components)
        needed = [name for name in modules if name not in optional]
        return needed, [name for name in modules if name in optional], list(options)

    def component_class(self, library: str, class_name: str) -> Any:
        """From a library of models, from the module of a pipeline, or from what has been imported already."""
        pipelines = require("diffusers.pipelines", _PURPOSE)
        if library in _LIBRARIES:
            # Both are packages whose names are looked up when they are used.
            holder: Any = require(library, _PURPOSE)
            if library == "transformers":
                class_name = _present_name(class_name)
        elif hasattr(pipelines, library):
            holder = getattr(pipelines, library)
        else:
            holder = sys.modules.get(library)
            if holder is None:
                raise ConfigError(
                    f'{class_name} comes from "{library}", which is not imported because a checkpoint says so',
                    hint=f"import {library} before, if it is yours",
                )
        found = getattr(holder, class_name, None)
        if not isinstance(found, type):
            raise ConfigError(f"{library} has no class {class_name}")
        return found

    def is_left_plain(self, component: str, component_class: Any) -> bool:
        """Autoencoders, vocoders and safety checkers."""
        return component in _LEFT_PLAIN or str(component_class.__module__).startswith(_AUTOENCODERS)

    def parts(self, pipeline: Any) -> Mapping[str, Any]:
        """Those that the index of the pipeline names; of a compiled model, the model itself."""
        diffusers = require("diffusers", _PURPOSE)
        if not isinstance(pipeline, diffusers.DiffusionPipeline):
            raise ConfigError(
                f"{type(pipeline).__name__} is no pipeline of diffusers",
                hint="weightpack.save_pretrained saves a single model",
            )
        modules, _ = pipeline._get_signature_keys(pipeline)
        found = {}
        for name in modules:
            part = getattr(pipeline, name, None)
            if part is not None:
                found[name] = getattr(part, "_orig_mod", part)
        return found

    def index_text(self, pipeline: Any) -> str:
        """diffusers' own text without `_name_or_path`, which is a folder of this machine.

        A part that was set where the pipeline had none is in it too; diffusers leaves it out, and loses it.
        """
        fields = json.loads(pipeline.to_json_string())
        fields.pop("_name_or_path", None)
        described = require("diffusers.pipelines.pipeline_loading_utils", _PURPOSE)._fetch_class_library_tuple
        for name, part in self.parts(pipeline).items():
            if fields.get(name) in (None, [None, None]):
                fields[name] = list(described(part))
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def _present_name(class_name: str) -> str:
    """What transformers calls a class today, where diffusers knows that its name has changed."""
    remap = getattr(require("diffusers.utils", _PURPOSE), "_maybe_remap_transformers_class", None)
    found: str | None = remap(class_name) if remap is not None else None
    return found or class_name


ADAPTER = DiffusersPipelines()
