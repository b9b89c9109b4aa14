"""`drpo diff`: the first step and metric where two runs part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from drpo_megatron.report.run_files import RunFiles, config_differences

MEASURED = ("time", "perf/", "memory/", "sync/seconds", "save/stall_s", "total/seconds", "rollout/groups_ready")
"""Seconds, rates and bytes of the machine, and how far the servers are at the moment of logging: never the same twice,
and no part of what was computed."""

_CAUSES = ("rollout/", "response/", "reward/", "staleness/", "router/", "mismatch/", "ratio/", "policy/", "drpo/")
_EFFECTS = ("loss/", "moe/", "fp8/", "grad_norm", "lr", "train/", "pack/", "sync/")
# In a step, what is sampled comes before what is computed from it: the first of these that differs is where to look.
_ORDER = _CAUSES + _EFFECTS


@dataclass(frozen=True)
class Difference:
    """A metric of one step in both runs; None where a run does not have it. NaN stands for a value that was not
    finite.
    """

    metric: str
    a: float | None
    b: float | None


@dataclass(frozen=True)
class Comparison:
    """step: the first whose metrics differ, None when no common step has such. differences: of that step, causes first.
    common: how many steps both have, compared up to the first that differs. only: (name of the run, how many steps it
    alone has), None when both have the same. config: setting → its value in A and in B.
    """

    names: tuple[str, str]
    common: int
    step: int | None
    differences: list[Difference]
    only: tuple[str, int] | None
    config: dict[str, list[str]]

    @property
    def equal(self) -> bool:
        """The metrics alone: two runs with other names or seeds may compute the same."""
        return self.step is None and self.only is None


def compare_runs(a: RunFiles, b: RunFiles, tolerance: float = 0.0) -> Comparison:
    """Two values are the same when |a − b| ≤ tolerance · max(1, |a|, |b|), and when both are not finite.

    Raises ValueError when the runs have no step in common, or the tolerance is no number from 0.
    """
    if not tolerance >= 0:
        raise ValueError(f"the tolerance is {tolerance}: give a number from 0")
    rows_a, rows_b = ({int(row["step"]): row for row in run.metrics} for run in (a, b))
    common = sorted(rows_a.keys() & rows_b.keys())
    if not common:
        raise ValueError(
            f"{a.directory} has steps {min(rows_a)} to {max(rows_a)}, {b.directory} has {min(rows_b)} to "
            f"{max(rows_b)}: none of them is in both"
        )
    step, differences = None, []
    for number in common:
        differences = row_differences(rows_a[number], rows_b[number], tolerance)
        if differences:
            step = number
            break
    # One run of the two may have gone on longer; when both have own steps, that of A is told.
    alone = [(run.name, len(own)) for run, own in ((a, rows_a.keys() - rows_b), (b, rows_b.keys() - rows_a)) if own]
    return Comparison(
        names=(a.name, b.name),
        common=len(common),
        step=step,
        differences=differences,
        only=alone[0] if alone else None,
        config=config_differences([a.config, b.config]),
    )


def row_differences(a: dict[str, float], b: dict[str, float], tolerance: float) -> list[Difference]:
    """The metrics of one step that are not the same: causes first, and those that one run does not have last."""
    names = [name for name in dict.fromkeys([*a, *b]) if not name.startswith(MEASURED)]
    found = [Difference(name, a.get(name), b.get(name)) for name in names]
    return sorted((d for d in found if not _same(d.a, d.b, tolerance)), key=_rank)


def _same(a: float | None, b: float | None, tolerance: float) -> bool:
    if a is None or b is None:
        return False
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return abs(a - b) <= tolerance * max(1.0, abs(a), abs(b))


def _rank(d: Difference) -> tuple[bool, int]:
    place = next((i for i, prefix in enumerate(_ORDER) if d.metric.startswith(prefix)), len(_ORDER))
    return d.a is None or d.b is None, place


def as_json(comparison: Comparison) -> dict[str, Any]:
    """A value that was not finite is null, as in metrics.jsonl; a metric that a run does not have is left out."""
    record = asdict(comparison) | {"equal": comparison.equal}
    record["differences"] = [
        {"metric": d.metric} | {key: _finite(value) for key, value in (("a", d.a), ("b", d.b)) if value is not None}
        for d in comparison.differences
    ]
    return record


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def as_text(comparison: Comparison) -> str:
    """For people: the verdict in the first line, then the metrics of that step and the settings."""
    a, b = comparison.names
    lines = []
    if comparison.step is not None:
        first = comparison.differences[0].metric
        lines.append(f"{a} and {b} part at step {comparison.step}: {first} is the first of what differs there")
        lines += _table(
            [("metric", a, b), *((d.metric, _value(d.a), _value(d.b)) for d in comparison.differences)],
        )
    elif comparison.equal:
        lines.append(f"{a} and {b} are the same in all {comparison.common} steps")
    if comparison.only is not None:
        name, count = comparison.only
        same = "" if comparison.step is not None else f"; the {comparison.common} that both have are the same"
        lines.append(f"{name} alone has {count} steps{same}")
    if comparison.config:
        lines += ["", "settings that differ:"]
        lines += _table([("setting", a, b), *((key, *values) for key, values in comparison.config.items())])
    return "\n".join(lines)


def _value(value: float | None) -> str:
    if value is None:
        return "(no such metric)"
    return "not finite" if math.isnan(value) else repr(value)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
