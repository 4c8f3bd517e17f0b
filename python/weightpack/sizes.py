"""Sizes as people write them."""

from __future__ import annotations

import re

from .errors import ConfigError

_DECIMAL = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_PATTERN = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<unit>[A-Za-z]*)\s*")


def parse_size(value: str | int, what: str) -> int:
    """Bytes of `value`: a number of bytes, or a number with a unit.

    KB, MB, GB and TB are decimal, as in huggingface_hub; KiB, MiB, GiB and TiB are powers of 1024.
    Case does not matter, fractions are allowed. `what` names the option in the error.

    >>> parse_size("5GB", "max_shard_size")
    5000000000
    >>> parse_size("1.5 MiB", "max_memory")
    1572864
    """
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ConfigError(f"{what} is not a size: {value!r}", hint='write a number of bytes, or "5GB"')
    if isinstance(value, int):
        size = value
    else:
        match = _PATTERN.fullmatch(value)
        unit = None if match is None else {**_DECIMAL, **_BINARY}.get(match["unit"].upper())
        if match is None or unit is None:
            raise ConfigError(f'{what} is not a size: "{value}"', hint='write for example "500MB", "5GB" or "2GiB"')
        size = int(float(match["number"]) * unit) if "." in match["number"] else int(match["number"]) * unit
    if size <= 0:
        raise ConfigError(f"{what} is not positive: {value}")
    return size


def show_size(count: float) -> str:
    """A number of bytes for people, in decimal units.

    >>> show_size(1234567)
    '1.23 MB'
    """
    size, units = float(count), ["B", "KB", "MB", "GB", "TB"]
    unit = units.pop(0)
    while abs(size) >= 999.5 and units:
        size, unit = size / 1000, units.pop(0)
    digits = 0 if unit == "B" or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:.{digits}f} {unit}"
