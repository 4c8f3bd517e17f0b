"""Adapters to the libraries that run the models, one module each."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any


def answer(describe: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]) -> None:
    """Describes each model asked about on standard input; one that cannot be built gets a refusal."""
    answers: list[dict[str, Any]] = []
    for request in json.load(sys.stdin):
        try:
            answers.append(describe(request["config"], request["tensors"]))
        except Exception as error:  # A class may fail to build in any way; the person is told which.
            answers.append({"refusal": f"{type(error).__name__}: {error}".splitlines()[0][:300]})
    print(json.dumps(answers))
