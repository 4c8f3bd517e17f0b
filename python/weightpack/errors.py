"""Everything weightpack raises on purpose.

One base class, so that a caller can catch all of it; each class is also the builtin that describes
it, so that code which knows nothing of weightpack still handles it. The native module raises these
same classes. `OSError` and `KeyboardInterrupt` pass through unchanged.

A message is one lower-case sentence: subject, fact, expected and got, then tensor and file. Advice
stands on its own line, after `hint: `.
"""

from __future__ import annotations

_HINT = "\nhint: "


class WeightpackError(Exception):
    """Base class of all errors of this package.

    `message` is the sentence, `hint` the advice that belongs to it or `None`; `str()` gives both,
    each on its own line.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}{_HINT}{hint}")

    @property
    def message(self) -> str:
        """The sentence without the advice."""
        return str(self).partition(_HINT)[0]

    @property
    def hint(self) -> str | None:
        """The advice, if there is any."""
        return str(self).partition(_HINT)[2] or None


class CheckpointError(WeightpackError, ValueError):
    """A file or folder that is malformed, cut short, ambiguous, or disagrees with itself."""


class FormatError(WeightpackError, ValueError):
    """A tensor or parameter that a format cannot take."""


class ConfigError(WeightpackError, ValueError):
    """Options that contradict each other or name things that do not exist."""


class UnsupportedError(WeightpackError, NotImplementedError):
    """A valid request that this version does not carry out."""


class BackendError(WeightpackError, ImportError):
    """An optional package is missing, or does not do what was asked of it."""
