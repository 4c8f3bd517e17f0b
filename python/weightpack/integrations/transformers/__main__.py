"""Describes models: a JSON list on standard input (for each model its `config`, and `tensors`: name to
shape), the list of descriptions on standard output."""

from __future__ import annotations

from weightpack.integrations import answer
from weightpack.integrations.transformers.describe import describe_layers

if __name__ == "__main__":
    answer(describe_layers)
