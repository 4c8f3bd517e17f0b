"""Entries of skip lists, and the modules they name."""

from __future__ import annotations

import pytest

from weightpack.errors import ConfigError
from weightpack.matcher import Matcher

PATHS = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.10.attn.to_q",
    "single_transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.ff_context.net.0.proj",
    "proj_out",
    "lm_head",
]


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ("transformer_blocks.0", [0, 3, 4]),
        ("attn.to_q", [0, 1, 2]),
        ("attn.", [0, 1, 2]),
        ("ff", [3]),
        ("ff*", [3, 4]),
        ("proj", [3, 4]),
        ("proj_out", [5]),
        ("lm_head.weight", [6]),
        ("*_blocks.0.attn", [0, 2]),
        ("transformer_blocks.?", [0, 3, 4]),
        ("transformer_blocks.??", [1]),
        ("re:^transformer_blocks\\.\\d+\\.attn", [0, 1]),
        ("to", []),
        ("blocks.0", []),
        ("a+b", []),
    ],
)
def test_an_entry_names_whole_segments(entry, named):
    matcher = Matcher([entry])
    assert [number for number, path in enumerate(PATHS) if matcher.matches(path)] == named
    assert matcher.unused(PATHS) == ([] if named else [entry])


def test_the_first_entry_that_fits_is_told():
    assert Matcher(["lm_head", "attn.to_q", "attn"]).find(PATHS[0]) == "attn.to_q"
    assert Matcher([]).find(PATHS[0]) is None


@pytest.mark.parametrize("entry", ["", ".", "re:(", 3])
def test_what_is_no_pattern_is_refused(entry):
    with pytest.raises(ConfigError):
        Matcher([entry])
