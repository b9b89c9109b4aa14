"""What is kept of a run: one JSON object a line, in one file a loss, small enough to be committed."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from drpo_megatron.config import ConfigError
from drpo_megatron.study.grid import Cell, Job

METRICS = (
    "reward/mean",
    "mismatch/k1",
    "mismatch/k3",
    "drpo/weight_q01",
    "drpo/weight_q50",
    "drpo/weight_q99",
    "policy/entropy",
    "grad_norm",
    "staleness/max",
)
"""Of every step, as docs/metrics.md defines them."""

DIGITS = 4
"""Significant digits that are kept of a value."""

Status = Literal["done", "non_finite", "failed"]
"""done: to the last step. non_finite: ended by numbers that are not finite. failed: ended by something else, which says
nothing about the loss."""


@dataclass(frozen=True)
class Record:
    """One run. metrics: name → one value a step, NaN for one that was not finite. digest: `Study.digest`. seconds: from
    its start to its end, without that of a server. settings: given to all runs of the study. reason: of its end.
    """

    loss: str
    parameters: dict[str, float]
    precision: str
    staleness: int
    seed: int
    status: Status
    reason: str
    seconds: float
    digest: str
    settings: tuple[str, ...]
    versions: dict[str, str]
    metrics: dict[str, list[float]]

    @property
    def cell(self) -> Cell:
        return Cell.of(self.loss, self.parameters, self.precision, self.staleness)

    @property
    def job(self) -> Job:
        return Job(self.cell, self.seed)

    def to_json(self) -> str:
        """One line. Values that are not finite are null."""
        content = asdict(self) | {"metrics": {n: [_rounded(v) for v in vs] for n, vs in self.metrics.items()}}
        return json.dumps(content, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Raises ValueError, KeyError or TypeError for anything but such a line."""
        raw: dict[str, Any] = json.loads(line)
        metrics = {n: [math.nan if v is None else float(v) for v in vs] for n, vs in raw.pop("metrics").items()}
        return cls(**raw | {"settings": tuple(raw["settings"]), "metrics": metrics})


def metrics_of(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """The kept columns of a run's metrics.jsonl, read."""
    return {name: [row.get(name, math.nan) for row in rows] for name in METRICS}


class Records:
    """The files `runs-LOSS.jsonl` of a directory. Raises ConfigError for a line that is none of ours, with its place.

    A file is replaced as a whole by each addition: whenever a study is killed, its files hold whole lines.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __iter__(self) -> Iterator[Record]:
        for path in sorted(self.directory.glob("runs-*.jsonl")):
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                try:
                    yield Record.from_json(line)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ConfigError([f"{path}:{number}: is no record of a run ({error}); remove it"]) from error

    def missing(self, jobs: Iterable[Job], digest: str, retry_failed: bool = False) -> list[Job]:
        """Those of `jobs` without a record, in their order. retry_failed: a failed run counts as missing.

        Raises ConfigError when there are records of another study.
        """
        done = set()
        for record in self:
            if record.digest != digest:
                raise ConfigError(
                    [
                        f"{self.directory}: holds runs with other settings ({record.job.key} has digest "
                        f"{record.digest}, this study {digest}); take another directory for one of them"
                    ]
                )
            if not (retry_failed and record.status == "failed"):
                done.add(record.job)
        return [job for job in jobs if job not in done]

    def add(self, record: Record) -> None:
        """Add it, in place of an earlier one of the same run."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"runs-{record.loss}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        lines = [line for line in lines if Record.from_json(line).job != record.job]
        partial = path.with_suffix(".partial")
        partial.write_text("\n".join([*lines, record.to_json()]) + "\n")
        os.replace(partial, path)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other studies out of the directory. Raises ConfigError when one is at work in it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise ConfigError([f"{self.directory}: another study is writing there; wait for it"]) from error
        finally:
            os.close(handle)


def _rounded(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e6 else rounded
