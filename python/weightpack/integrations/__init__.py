"""Adapters to the libraries that run the models, one package each: `diffusers` and `transformers`.

Each is imported when it is first used, and imports its library when something is asked of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import diffusers, transformers

__all__ = ["answer", "diffusers", "transformers"]


def __getattr__(name: str) -> Any:
    if name not in ("diffusers", "transformers"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def answer(describe: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]) -> None:
    """Describes each model asked about on standard input; one that cannot be built gets a refusal."""
    answers: list[dict[str, Any]] = []
    for request in json.load(sys.stdin):
        try:
            answers.append(describe(request["config"], request["tensors"]))
        except Exception as error:  # A class may fail to build in any way; the person is told which.
            answers.append({"refusal": f"{type(error).__name__}: {error}".splitlines()[0][:300]})
    print(json.dumps(answers))
