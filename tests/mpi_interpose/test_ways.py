"""Which way of a message a table takes when several runs must agree, and when a gain is clear; no MPI is started."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from undertow.mpi_interpose import policy, ways
from undertow.mpi_interpose.samples import Cell, mean_low


def cell(**arms: float) -> Cell:
    """A message of one datatype, 31 rounds with 1 % of seeded noise; arms by their ns, the library at 100 us."""
    noise = random.Random(str(arms))
    times = {"library": 1e5, "again": 1e5, "auto": 1e5, **arms}
    samples = {arm: tuple(ns * noise.uniform(0.99, 1.01) for _ in range(31)) for arm, ns in times.items()}
    return Cell("message", "strided", "made", 16, 32, 65536, False, 0, 1, samples, leaf=4)


ALONE = cell(send=4e4, recv=1.1e5, both=6e4)  # the send alone is best, and both sides gain
BOTH = cell(send=5e4, recv=1.1e5, both=2e4)  # both are best, and the send alone gains
ONLY_BOTH = cell(send=1.4e5, recv=1.4e5, both=2e4)  # the send alone loses
NEITHER = cell(send=1.2e5, recv=1.2e5, both=1.3e5)


def chosen(rows: list[policy.Row]) -> str:
    return policy.Policy(policy.text(rows, [])).way(ALONE)


@pytest.mark.parametrize(
    "runs, way",
    [
        ([ALONE], "send"),
        ([BOTH], "both"),
        ([ALONE, BOTH], "send"),  # its least gain is 2, that of both 1.7
        ([ALONE, ONLY_BOTH], "both"),
        ([BOTH, ONLY_BOTH], "both"),
        ([ALONE, BOTH, NEITHER], "library"),
    ],
)
def test_runs_agree_on_the_way_whose_least_gain_is_the_greatest(runs: list[Cell], way: str) -> None:
    for order in (runs, runs[::-1]):
        merged = policy.least_gains([policy.known([one]) for one in order])
        assert [row.use for row in merged] == ["send_local", "recv_local"]
        assert chosen(merged) == way
        gain = max(row.ratio for row in merged)
        least = min(one.library_ns() / one.median_ns(way) for one in runs)
        assert gain == pytest.approx(least) if way != "library" else gain <= 1


def test_a_written_table_knows_its_way_only() -> None:
    """Its rows do not hold what a run measured of other ways: a table and a run agree on the table's way or none."""
    for one, way in ((ALONE, "send"), (BOTH, "both"), (NEITHER, "library")):
        read, _ = policy.read_sections("for 5\n" + policy.text(policy.rows([one]), []))
        message = ways.written(*read["5"])
        assert message.clear == (frozenset() if way == "library" else {way})
        assert chosen(policy.least_gains([read["5"], policy.known([one])])) == way
        other = policy.least_gains([read["5"], policy.known([ONLY_BOTH])])
        assert chosen(other) == ("both" if one is BOTH else "library")
    send, recv = policy.rows([ALONE])
    mixed = ways.written(replace(send, share=0.5), recv)  # of two runs that took other sides
    assert mixed.clear == frozenset() and mixed.ns.keys() == {"library"}


def test_a_gain_is_clear_where_the_mean_is_though_the_library_works_at_two_speeds() -> None:
    """Every third round loses a tenth, the others gain 1.4: the median's interval reaches to 0.9, the mean's not."""
    slow = tuple(1e5 if k % 3 else 0.9 * 7.14e4 for k in range(31))
    two = replace(cell(both=7.14e4), arms={"library": slow, "again": slow, "both": (7.14e4,) * 31})
    assert two.ratio("both").low == pytest.approx(0.9) and two.clear_gain("both") > 1.04
    # Where most rounds gain nothing, a few that gain much are not enough.
    some = tuple(2e5 if k % 3 == 0 else 1e5 for k in range(31))
    rare = replace(cell(both=1e5), arms={"library": some, "again": some, "both": (1e5,) * 31})
    assert rare.clear_gain("both") == pytest.approx(1)


def test_the_interval_of_a_mean_is_students() -> None:
    # t(0.975) for 5, 15 and 30 degrees of freedom (tables): 2.571, 2.131, 2.042.
    for n, t in ((6, 2.571), (16, 2.131), (31, 2.042)):
        samples = [float(k % 2) for k in range(n)]
        middle = sum(samples) / n
        deviation = (sum((value - middle) ** 2 for value in samples) / (n - 1)) ** 0.5
        assert (middle - mean_low(samples)) * n**0.5 / deviation == pytest.approx(t, rel=1e-2)
    assert mean_low([3.0, 1.0, 2.0]) == 1.0


def test_a_small_gain_counts_where_it_was_measured_and_not_far_from_there() -> None:
    table = policy.Policy("pack strided 16 32 65536 1060 1000 1\n")
    gains = [table.ask("pack", "strided", 16, 32, size)[0] for size in (65536, 90000, 131072, 262144)]
    assert gains[0] == pytest.approx(1.06) and gains[0] > policy.GAIN > gains[2]
    assert gains == sorted(gains, reverse=True) and gains[2] == gains[3] == pytest.approx(1.06 * 0.9608, rel=1e-3)
