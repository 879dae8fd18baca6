"""Medians, order-statistic intervals and ratios, against numpy, exact counting and numbers worked by hand."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from undertow.benchmarks.intervals import Interval, interval_rank, median_interval, promise, ratio_interval


def coverage(n: int, rank: int) -> Fraction:
    """Exact probability that sorted samples rank and n + 1 - rank enclose the median."""
    return 1 - 2 * Fraction(sum(comb(n, k) for k in range(rank)), 2**n)


# From the published tables of the sign test's confidence interval for a median.
@pytest.mark.parametrize(
    ("n", "rank"), [(6, 1), (8, 1), (9, 2), (10, 2), (12, 3), (20, 6), (31, 10), (50, 18), (100, 40)]
)
def test_ranks_of_the_tables(n, rank):
    assert interval_rank(n) == rank


@pytest.mark.parametrize("n", range(6, 200))
def test_rank_is_the_largest_that_covers(n):
    rank = interval_rank(n)
    assert coverage(n, rank) >= Fraction(95, 100) > coverage(n, rank + 1)


@pytest.mark.parametrize("n", range(6))
def test_too_few_samples_have_no_interval(n):
    with pytest.raises(ValueError, match="at least 6"):
        median_interval([1.0] * n)


@pytest.mark.parametrize("n", [6, 7, 10, 31, 64])
def test_median_is_numpys(seed, n):
    samples = np.random.default_rng(seed).lognormal(size=n)
    found = median_interval(samples.tolist())
    assert found.median == np.median(samples)
    assert found.low in samples and found.high in samples and found.low <= found.median <= found.high


def test_interval_encloses_the_true_median_as_often_as_promised(seed):
    """2000 trials of skewed samples: at least 93.5 % (95 % less three standard errors of 0.5 %)."""
    rng, hits = np.random.default_rng(seed), 0
    for _ in range(2000):
        found = median_interval(rng.exponential(size=15).tolist())
        hits += found.low <= np.log(2) <= found.high
    assert hits / 2000 >= 0.935


def test_ratio_by_hand():
    plain, arm = [2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 70.0], [1.0, 4.0, 2.0, 2.0, 5.0, 3.0, 10.0]
    # ratios 2, 1, 3, 4, 2, 4, 7: sorted 1 2 2 3 4 4 7; with seven samples the interval is the whole range
    assert ratio_interval(plain, arm) == Interval(1.0, 3.0, 7.0)


def test_ratio_cancels_drift_that_both_sides_share(seed):
    rng = np.random.default_rng(seed)
    drift = np.exp(np.cumsum(rng.normal(scale=0.5, size=31)))  # the machine becomes many times slower and faster
    found = ratio_interval((3.0 * drift).tolist(), (2.0 * drift).tolist())
    assert found.low == pytest.approx(1.5) and found.high == pytest.approx(1.5)


def test_ratio_refuses_unequal_rounds():
    with pytest.raises(ValueError):
        ratio_interval([1.0] * 7, [1.0] * 8)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.97, 1.1, "yes"), (1.2, 1.3, "yes"), (0.96, 0.98, "open"), (0.5, 2.0, "open"), (0.8, 0.969, "no")],
)
def test_promise(low, high, verdict):
    assert promise(Interval(low, (low + high) / 2, high)) == verdict
