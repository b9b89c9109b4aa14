"""What all runs of a study say together: intervals over seeds, paired comparisons, the order of mismatch."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from drpo_megatron.study.grid import PRECISIONS, Cell
from drpo_megatron.study.outcome import Outcome, outcome_of
from drpo_megatron.study.records import Record
from drpo_megatron.study.statistics import (
    Interval,
    geometric_interval,
    mean_interval,
    paired_interval,
    wilson_interval,
)

_LEAST_KL = 1e-12
"""Nats: below it a KL is rounding, and its logarithm would say nothing."""


@dataclass(frozen=True)
class CellSummary:
    """Over the seeds of a cell. mismatch: geometric mean of the runs' mean mismatch/k3, nats."""

    cell: Cell
    final: Interval
    area: Interval
    mismatch: Interval
    collapsed: Interval
    reasons: tuple[str, ...]
    learned: int


class Results:
    """Outcomes by cell and seed. `failed`: records that say nothing about the loss, left out of all that follows."""

    def __init__(self, records: Iterable[Record], updates: int) -> None:
        self.by_cell: dict[Cell, dict[int, Outcome]] = defaultdict(dict)
        self.failed: list[Record] = []
        for record in records:
            if record.status == "failed":
                self.failed.append(record)
            else:
                self.by_cell[record.cell][record.seed] = outcome_of(record, updates)

    def summary(self, cell: Cell) -> CellSummary:
        outcomes = list(self.by_cell[cell].values())
        reasons = [o.collapse for o in outcomes if o.collapse]
        return CellSummary(
            cell,
            final=mean_interval([o.final for o in outcomes]),
            area=mean_interval([o.area for o in outcomes]),
            mismatch=_mismatch(outcomes),
            collapsed=wilson_interval(len(reasons), len(outcomes)),
            reasons=tuple(f"{reasons.count(reason)} {reason}" for reason in sorted(set(reasons))),
            learned=sum(o.learned for o in outcomes),
        )

    def paired(self, ours: Cell, theirs: Cell, of: Callable[[Outcome], float]) -> Interval | None:
        """Ours − theirs over the seeds that both have; None when there is none."""
        a, b = self.by_cell.get(ours, {}), self.by_cell.get(theirs, {})
        seeds = sorted(a.keys() & b.keys())
        return paired_interval([of(a[s]) for s in seeds], [of(b[s]) for s in seeds]) if seeds else None

    def minus_bf16(self, cells: Iterable[Cell], of: Callable[[Outcome], float]) -> Interval | None:
        """What the precision of `cells` changes: their runs minus those in bf16 that differ in nothing else, over all
        of these pairs. None without pairs.
        """
        pairs = [
            (of(seeds[seed]), of(twins[seed]))
            for cell in cells
            for seeds, twins in [(self.by_cell.get(cell, {}), self.by_cell.get(_in_bf16(cell), {}))]
            for seed in sorted(seeds.keys() & twins.keys())
        ]
        return paired_interval(*map(list, zip(*pairs, strict=True))) if pairs else None

    def collapse_share(self, cells: Iterable[Cell]) -> Interval | None:
        """Over all runs of `cells`; None when there is none."""
        outcomes = [o for cell in cells for o in self.by_cell.get(cell, {}).values()]
        return wilson_interval(sum(o.collapse is not None for o in outcomes), len(outcomes)) if outcomes else None

    def mismatch(self, precision: str) -> Interval | None:
        """Geometric mean of mismatch/k3 over the runs of all losses in this precision, of the main grid and δ study."""
        outcomes = [o for cell, seeds in self.by_cell.items() if cell.precision == precision for o in seeds.values()]
        outcomes = [o for o in outcomes if math.isfinite(o.k3)]
        return _mismatch(outcomes) if outcomes else None

    def beside(self, other: Results, precision: str) -> tuple[Interval, Interval] | None:
        """Against the same runs made another way, `other`: how many times the mismatch KL is theirs, and the area minus
        theirs. Over the pairs of runs that both have; None without pairs.
        """
        pairs = [
            (ours, other.by_cell[cell][seed])
            for cell, seeds in self.by_cell.items()
            if cell.precision == precision and cell in other.by_cell
            for seed, ours in seeds.items()
            if seed in other.by_cell[cell]
        ]
        ratios = [max(a.k3, _LEAST_KL) / max(b.k3, _LEAST_KL) for a, b in pairs if math.isfinite(a.k3 + b.k3)]
        if not ratios:
            return None
        return geometric_interval(ratios), paired_interval([a.area for a, _ in pairs], [b.area for _, b in pairs])

    def mismatch_ratio(self, higher: str, lower: str) -> Interval | None:
        """How many times the mismatch KL of precision `higher` is that of `lower`: geometric mean over the pairs of
        runs that differ in nothing else. None without pairs.
        """
        ratios = []
        for cell, seeds in list(self.by_cell.items()):
            if cell.precision == higher:
                twins = self.by_cell.get(dataclasses.replace(cell, precision=lower), {})
                pairs = [(seeds[s].k3, twins[s].k3) for s in sorted(seeds.keys() & twins.keys())]
                ratios += [max(a, _LEAST_KL) / max(b, _LEAST_KL) for a, b in pairs if math.isfinite(a + b)]
        return geometric_interval(ratios) if ratios else None


def end_to_end(precisions: Sequence[str]) -> list[str]:
    return [name for name in precisions if any(setting.startswith("fp8.recipe=") for setting in PRECISIONS[name])]


def _in_bf16(cell: Cell) -> Cell:
    return dataclasses.replace(cell, precision="bf16")


def _mismatch(outcomes: Sequence[Outcome]) -> Interval:
    values = [max(o.k3, _LEAST_KL) for o in outcomes if math.isfinite(o.k3)]
    return geometric_interval(values) if values else Interval(math.nan, math.nan, math.nan, 0)
