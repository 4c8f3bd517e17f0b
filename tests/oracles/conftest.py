"""Peers that several of these tests use."""

from __future__ import annotations

import pytest

from .ggml import Ggml, open_ggml


@pytest.fixture(scope="session")
def ggml() -> Ggml:
    """ggml's own C. Tests that use it carry the marker `llama`."""
    return open_ggml()
