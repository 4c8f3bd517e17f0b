"""Entries of a host's tables that were put in the place of others, and how it was before."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

_ABSENT = object()


class Swaps:
    """What was put into tables of a host, so that it can be taken out again. False where there is nothing."""

    def __init__(self) -> None:
        self._before: dict[tuple[int, str], tuple[MutableMapping[str, Any], Any]] = {}

    def __bool__(self) -> bool:
        return bool(self._before)

    def put(self, table: MutableMapping[str, Any], key: str, value: Any) -> None:
        """Sets an entry; what stood there before the first time is remembered."""
        self._before.setdefault((id(table), key), (table, table.get(key, _ABSENT)))
        table[key] = value

    def has(self, table: MutableMapping[str, Any], key: str) -> bool:
        """Whether the entry was put there."""
        return (id(table), key) in self._before

    def before(self, table: MutableMapping[str, Any], key: str) -> Any:
        """What stood there before, or stands there untouched. Raises `KeyError` for an entry that did not."""
        _, value = self._before.get((id(table), key), (table, table.get(key, _ABSENT)))
        if value is _ABSENT:
            raise KeyError(key)
        return value

    def restore(self) -> None:
        """Puts everything back."""
        for (_, key), (table, value) in self._before.items():
            if value is _ABSENT:
                table.pop(key, None)
            else:
                table[key] = value
        self._before.clear()
