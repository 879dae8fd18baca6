"""Medians with 95 % intervals from order statistics.

The interval of the median of n samples is the pair of sorted samples (l, n + 1 - l) for the largest l whose coverage,
1 - 2·P(Binomial(n, 1/2) < l), is at least 0.95. It assumes nothing of the distribution but independent samples, needs
no resampling and no seed, and can be checked by hand. Timings have long right tails, so means and their normal
intervals would mislead. With fewer than 6 samples no such pair exists: 6 is the least number of rounds.

A ratio is formed in each round from times taken beside each other, and the median is of these ratios: drift that is
slower than a round (another job, a clock that ramps) hits both sides and cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_SAMPLES = 6
NEVER_SLOWER = 0.97  # the promise: the lower bound of plain/ours is at least this


@dataclass(frozen=True)
class Interval:
    """A median and the ends of its interval, in the samples' unit."""

    low: float
    median: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        return self.low <= other.high and other.low <= self.high


def interval_rank(n: int, coverage: float = 0.95) -> int:
    """The largest l (from 1) so that the sorted samples l and n + 1 - l enclose the median with `coverage`."""
    tail, rank = 0.0, 0
    for below in range(n // 2 + 1):
        tail += math.comb(n, below) / 2**n  # P(at most `below` samples lie below the median)
        if 1 - 2 * tail < coverage:
            break
        rank = below + 1
    if rank == 0:
        raise ValueError(f"{n} samples cannot give an interval of coverage {coverage}; at least {LEAST_SAMPLES} needed")
    return rank


def median_interval(samples: Sequence[float]) -> Interval:
    """Median and 95 % interval of at least 6 samples."""
    ordered, n = sorted(samples), len(samples)
    rank = interval_rank(n)
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return Interval(ordered[rank - 1], middle, ordered[n - rank])


def ratio_interval(plain: Sequence[float], arm: Sequence[float]) -> Interval:
    """Median and interval of plain/arm, round by round; above 1 means that the arm is faster than the plain way."""
    return median_interval([p / a for p, a in zip(plain, arm, strict=True)])


def promise(ratio: Interval) -> str:
    """'yes' when never slower holds, 'no' when it is broken, 'open' when the interval spans the limit."""
    if ratio.low >= NEVER_SLOWER:
        return "yes"
    return "no" if ratio.high < NEVER_SLOWER else "open"
