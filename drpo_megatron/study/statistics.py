"""Intervals of 95 %, in closed form: a handful of seeds is too few for a bootstrap, whose intervals come out short."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate from `count` values. low and high are NaN where there are too few to say."""

    value: float
    low: float
    high: float
    count: int

    @property
    def sign(self) -> int:
        """1 or −1 where the whole interval is on one side of 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and Student's t interval of independent values, n − 1 degrees of freedom. ValueError without any."""
    if not values:
        raise ValueError("a mean needs at least one value")
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    from scipy.stats import t

    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def geometric_interval(values: Sequence[float]) -> Interval:
    """Geometric mean of positive values, with the interval of the mean of their logarithms."""
    of_logs = mean_interval([math.log(value) for value in values])
    return Interval(math.exp(of_logs.value), math.exp(of_logs.low), math.exp(of_logs.high), of_logs.count)


def paired_interval(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Mean of the differences of pairs, ours − theirs. ValueError for unequal lengths."""
    return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])


def wilson_interval(hits: int, count: int) -> Interval:
    """A share and Wilson's score interval: with p = hits/count and z the normal quantile, the p' for which
    |p − p'| = z·√(p'(1 − p')/count). ValueError without trials.
    """
    if not 0 <= hits <= count or not count:
        raise ValueError(f"{hits} of {count} is no share")
    z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
    share, weight = hits / count, z * z / count
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / count + weight / (4 * count)) / (1 + weight)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), count)
