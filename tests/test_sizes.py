"""Sizes as people write them."""

from __future__ import annotations

import pytest

from weightpack.errors import ConfigError
from weightpack.sizes import parse_size, show_size


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5kb", 1500), ("2GiB", 2 << 30), ("7", 7), (7, 7), ("1 TB", 10**12)],
)
def test_sizes(text, count):
    assert parse_size(text, "max_shard_size") == count


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1GB", "0", 0, -3, True, "1e9", "5 G B"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="max_shard_size is not"):
        parse_size(text, "max_shard_size")


def test_decimal_units_are_those_of_huggingface_hub(peer):
    own = peer("huggingface_hub.serialization._base").parse_size_to_int
    for text in ("5GB", "1.5MB", "200kb", "3TB"):
        assert parse_size(text, "size") == own(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (999_999, "1.00 MB"), (12_345_678, "12.3 MB"), (5e14, "500 TB")],
)
def test_shown_sizes(count, text):
    assert show_size(count) == text
