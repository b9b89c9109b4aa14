"""What became of a run. The definitions were fixed before the grid was run.

A window is `WINDOW` consecutive updates, the same number of samples whatever the staleness; a run's last, shorter one
is left out. The reward of a window is the mean over its samples. A run has *learned* when a window's reward reached
`LEARNED`. It has *collapsed* by one of these:

* reward: it learned, and its last `STAYS` windows or more are all below half of its highest window;
* non-finite: it was ended by numbers that are not finite: `training.max_skipped_updates` updates in a row whose
  gradient norm was not, or a log-prob of the server's that was not;
* mismatch: in some window the mean of mismatch/k3, KL(μ ‖ π) at the first update of each batch, is above `MISMATCH`.

A run that never learned is counted as such and has not collapsed. From its end on, a run that ended non-finite has
reward 0: there is no policy left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from drpo_megatron.study.records import Record

WINDOW = 8
STAYS = 2
LEARNED = 0.3
"""Share of the four characters that are right; random ones have about 0.01, random digits 0.1."""
MISMATCH = 0.1
"""Nats a token. The probe of a weight sync stops a run in float32 at 0.001; bf16 has about 1e-5 in this task."""
LAST = 16
"""Updates at the end of a run whose mean reward is its final reward."""


@dataclass(frozen=True)
class Outcome:
    """final: mean reward of the last `LAST` updates. area: mean reward over all updates, which is the area under the
    curve over its length. k3: mean of mismatch/k3 over the steps, nats. collapse: why, or None.
    """

    final: float
    area: float
    peak: float
    k3: float
    collapse: str | None

    @property
    def learned(self) -> bool:
        return self.peak >= LEARNED


def outcome_of(record: Record, updates: int) -> Outcome:
    """updates: of a whole run. Raises ValueError for a failed run, which says nothing."""
    if record.status == "failed":
        raise ValueError(f"{record.job.key} failed ({record.reason}): it has no outcome")
    rewards = list(record.metrics["reward/mean"])
    windows = window_means(rewards, record.staleness)
    rewards += [0.0] * (updates // record.staleness - len(rewards))
    mismatch = [k for k in record.metrics["mismatch/k3"] if math.isfinite(k)]
    last = max(1, LAST // record.staleness)
    return Outcome(
        final=_mean(rewards[-last:]),
        area=_mean(rewards),
        peak=max(windows, default=0.0),
        k3=_mean(mismatch) if mismatch else math.nan,
        collapse=_collapse(record, windows),
    )


def window_means(values: Sequence[float], staleness: int) -> list[float]:
    """Means of whole windows of `WINDOW` updates, from one value a step of `staleness` updates."""
    size = max(1, WINDOW // staleness)
    return [_mean(values[i : i + size]) for i in range(0, len(values) - size + 1, size)]


def reward_collapsed(windows: Sequence[float]) -> bool:
    peak = max(windows, default=0.0)
    if peak < LEARNED:
        return False
    below = 0
    for reward in reversed(windows):
        if reward >= peak / 2:
            break
        below += 1
    return below >= STAYS


def _collapse(record: Record, windows: Sequence[float]) -> str | None:
    if record.status == "non_finite":
        return "non-finite"
    if reward_collapsed(windows):
        return "reward"
    if any(k3 > MISMATCH for k3 in window_means(record.metrics["mismatch/k3"], record.staleness)):
        return "mismatch"
    return None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
