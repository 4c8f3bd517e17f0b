"""What a conversion, an inspection or a comparison found, as plain data.

Every report turns into JSON by `to_dict` and `to_json_string`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar


class Report:
    """Adds the JSON forms to a dataclass. `_derived` names the properties that are shown as well,
    `_keys` the fields that go by another name in JSON."""

    __slots__ = ()
    _derived: ClassVar[tuple[str, ...]] = ()
    _keys: ClassVar[Mapping[str, str]] = {}

    def to_dict(self) -> dict[str, Any]:
        """This report as JSON-able values. Numbers that JSON does not have (infinite SNR) are null."""
        names = [item.name for item in fields(self)]  # type: ignore[arg-type]
        return {self._keys.get(name, name): _plain(getattr(self, name)) for name in (*names, *self._derived)}

    def to_json_string(self, *, indent: int | None = 2) -> str:
        """This report as one JSON object."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Report):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True, slots=True)
class ErrorStatistics(Report):
    """How far one set of weights is from another.

    `relative_rms` is the root mean square error over the root mean square weight, `snr_db` the same
    as a signal-to-noise ratio in decibels (infinite for equal weights), `max_error` the largest
    absolute difference, `cosine` the cosine of the angle between both. `signal`, `noise`, `cross`
    and `power` are the sums behind them: of a², (a - b)², a·b and b², over `weights` weights.
    """

    _derived: ClassVar[tuple[str, ...]] = ("relative_rms", "snr_db", "cosine")

    weights: int
    signal: float
    noise: float
    cross: float
    power: float
    max_error: float

    @property
    def relative_rms(self) -> float:
        """Root mean square error over root mean square weight."""
        if self.noise == 0:
            return 0.0
        return math.sqrt(self.noise / self.signal) if self.signal else math.inf

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio in decibels."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both; 1 for two zeros."""
        product = self.signal * self.power
        if product == 0:
            return 1.0 if self.signal == self.power else 0.0
        return self.cross / math.sqrt(product)

    def __add__(self, other: ErrorStatistics) -> ErrorStatistics:
        return ErrorStatistics(
            self.weights + other.weights,
            self.signal + other.signal,
            self.noise + other.noise,
            self.cross + other.cross,
            self.power + other.power,
            max(self.max_error, other.max_error),
        )

    @classmethod
    def from_dict(cls, value: Mapping[str, Any] | None) -> ErrorStatistics | None:
        """The statistics of a native report; `None` where nothing was measured."""
        if value is None:
            return None
        # JSON has no NaN: a sum over weights that are not finite comes as null.
        sums: dict[str, Any] = {key: math.nan if found is None else found for key, found in value.items()}
        return cls(**{item.name: sums[item.name] for item in fields(cls)})


NO_ERROR = ErrorStatistics(0, 0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class TensorReport(Report):
    """One tensor of a conversion: from which format, to which, why, and at what price.

    `name` is its name in the source, `stored_as` ("as" in JSON) in the result; `source_format`
    ("from") and `format` ("to") are what it was and is stored as. `error` is measured against the
    source; `None` where the bytes were copied, or nothing was measured.
    """

    _keys: ClassVar[Mapping[str, str]] = {"stored_as": "as", "source_format": "from", "format": "to"}

    name: str
    stored_as: str
    shape: tuple[int, ...]
    source_format: str
    format: str
    why: str
    source_bytes: int
    output_bytes: int
    file: str
    copied: bool
    bits_per_weight: float
    error: ErrorStatistics | None = None


@dataclass(frozen=True, slots=True)
class FileReport(Report):
    """One file and its path. `bytes` is `None` where the size is not known yet (the index of a plan)."""

    path: str
    bytes: int | None


@dataclass(frozen=True)
class ConvertReport(Report):
    """A conversion, or with `dry_run` the plan of one.

    `layers` says for each model how its linear layers were told. `memory_bytes` is the bound on the
    memory the conversion takes, `output_bytes` what it writes (at most, before it has run).
    `left_out` are files of the source that are no part of the result. Rates are in bytes of source.
    """

    _derived: ClassVar[tuple[str, ...]] = ("weights", "bits_per_weight", "error")

    source: str
    destination: str
    to: str
    dry_run: bool
    plan_id: str
    tensors: tuple[TensorReport, ...]
    files: tuple[FileReport, ...]
    source_bytes: int
    output_bytes: int
    memory_bytes: int
    disk_free_bytes: int | None
    threads: int
    layers: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    read_bytes: int = 0
    written_bytes: int = 0
    resumed_bytes: int = 0

    @property
    def weights(self) -> int:
        """Weights of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over the whole result, statistics included."""
        weights = self.weights
        return 8 * sum(tensor.output_bytes for tensor in self.tensors) / weights if weights else 0.0

    @property
    def error(self) -> ErrorStatistics | None:
        """The error over all tensors that were measured together."""
        measured = [tensor.error for tensor in self.tensors if tensor.error is not None]
        return sum(measured, NO_ERROR) if measured else None

    @property
    def read_rate(self) -> float:
        """Bytes of source per second."""
        return self.read_bytes / self.seconds if self.seconds else 0.0

    @property
    def write_rate(self) -> float:
        """Bytes of result per second."""
        return self.written_bytes / self.seconds if self.seconds else 0.0

    def worst(self) -> list[TensorReport]:
        """The tensors whose error was measured, those with the lowest signal-to-noise ratio first."""
        measured = [tensor for tensor in self.tensors if tensor.error is not None]
        return sorted(measured, key=lambda tensor: tensor.error.snr_db if tensor.error else math.inf)


@dataclass(frozen=True, slots=True)
class TensorInfo(Report):
    """One tensor of a checkpoint: shape, stored type, format, size."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: str | None
    bytes: int
    bits_per_weight: float
    file: str


@dataclass(frozen=True)
class CheckpointInfo(Report):
    """What the headers of a checkpoint say, without its weights.

    `formats` counts tensors and bytes by format, `problems` are sentences about what a loader would
    stumble on, `method` the quantization method that the config names, `architecture` what a GGUF file
    says the model is.
    """

    _derived: ClassVar[tuple[str, ...]] = ("architecture",)

    path: str
    container: str
    files: tuple[FileReport, ...]
    tensors: tuple[TensorInfo, ...]
    weights: int
    bytes: int
    bits_per_weight: float
    formats: Mapping[str, Mapping[str, int]]
    metadata: Mapping[str, Any]
    method: str | None
    problems: tuple[str, ...]

    @property
    def architecture(self) -> str | None:
        """What the model is, in the words of GGUF (`llama`, `flux`); `None` where nothing says so."""
        found = self.metadata.get("general.architecture") if self.container == "gguf" else None
        return found if isinstance(found, str) else None


@dataclass(frozen=True, slots=True)
class PairReport(Report):
    """One tensor of two checkpoints: the format in each, and how far they are apart."""

    name: str
    other: str
    shape: tuple[int, ...]
    format_a: str
    format_b: str
    error: ErrorStatistics


@dataclass(frozen=True)
class DiffReport(Report):
    """Two checkpoints, tensor by tensor.

    `only_in_a` and `only_in_b` are names without a partner, `mismatched` tensors of different
    shape, `skipped` those that are not floating point in either (each with its reason); of the
    latter, `unequal` names the ones whose bytes differ.
    """

    _derived: ClassVar[tuple[str, ...]] = ("error", "is_complete")

    a: str
    b: str
    tensors: tuple[PairReport, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    mismatched: Mapping[str, str]
    skipped: Mapping[str, str]
    unequal: tuple[str, ...]
    seconds: float = 0.0

    @property
    def error(self) -> ErrorStatistics | None:
        """The error over all pairs together."""
        return sum((pair.error for pair in self.tensors), NO_ERROR) if self.tensors else None

    @property
    def is_complete(self) -> bool:
        """Whether every tensor of either has a partner of the same shape."""
        return not (self.only_in_a or self.only_in_b or self.mismatched)

    def worst(self) -> list[PairReport]:
        """The pairs, those with the lowest signal-to-noise ratio first."""
        return sorted(self.tensors, key=lambda pair: pair.error.snr_db)


def planned_report(described: Mapping[str, Any], src: str, dst: str, to: str, dry_run: bool) -> ConvertReport:
    """What is to be done, from the engine's description of its plan."""
    tensors = []
    for row in described["tensors"]:
        weights = math.prod(row["shape"])
        folder = row["file"].rpartition("/")[0]
        tensors.append(
            TensorReport(
                f"{folder}/{row['name']}" if folder else row["name"],
                row["as"],
                tuple(row["shape"]),
                row["from"],
                row["to"],
                row["why"],
                row["source_bytes"],
                row["output_bytes"],
                row["file"],
                row["copied"],
                8 * row["output_bytes"] / weights if weights else 0.0,
            )
        )
    return ConvertReport(
        src,
        dst,
        to,
        dry_run,
        described["plan_id"],
        tuple(tensors),
        tuple(FileReport(row["path"], row["bytes"]) for row in described["files"]),
        described["source_bytes"],
        described["output_bytes"],
        described["memory_bytes"],
        described["disk_free_bytes"],
        described["threads"],
    )


def finished_report(planned: ConvertReport, run: Mapping[str, Any]) -> ConvertReport:
    """What was done, from the plan and the engine's account of its run."""
    tensors = tuple(
        replace(
            tensor,
            output_bytes=row["output_bytes"],
            bits_per_weight=row["bits_per_weight"] or 0.0,
            error=ErrorStatistics.from_dict(row["error"]),
        )
        for tensor, row in zip(planned.tensors, run["tensors"], strict=True)
    )
    sizes = {row["path"]: row["bytes"] for row in run["files"]}
    folder = Path(planned.destination)
    files = tuple(
        replace(file, bytes=sizes.get(file.path, file.bytes) or (folder / file.path).stat().st_size)
        for file in planned.files
    )
    return replace(
        planned,
        tensors=tensors,
        files=files,
        output_bytes=sum(file.bytes or 0 for file in files),
        seconds=run["seconds"],
        read_bytes=run["read_bytes"],
        written_bytes=run["written_bytes"],
        resumed_bytes=run["resumed_bytes"],
    )
