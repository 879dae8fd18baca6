"""What changed between two runs: verdicts rest on ratios, know the noise, and call a new wrong answer by its name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from undertow.benchmarks.compare import apart, compare, comparison
from undertow.benchmarks.intervals import Interval
from undertow.benchmarks.report import Report, Row

PLAIN = Row("c", "plain", "plain", wrong=0, seconds=Interval(0.9, 1.0, 1.1))
AGAIN = Row("c", "plain (A/A)", "again", wrong=0, seconds=PLAIN.seconds, ratio=Interval(0.98, 1.0, 1.02))
OURS = Row("c", "ours", "ours", wrong=0, seconds=Interval(0.4, 0.5, 0.6), ratio=Interval(1.9, 2.0, 2.1))


def report(*rows, **facts) -> Report:
    return Report("demo", "claim", "command", 0, 7, {"hardware": "h", "date": "d", "undertow": "u", **facts}, "", rows)


def verdict(before, now):
    changes = {(c.now or c.before).arm: c for c in compare(report(*before), report(*now))}
    return changes["ours"].verdict


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (Interval(1.9, 2.0, 2.1), "within noise"),
        (Interval(2.05, 2.2, 2.3), "within noise"),  # the intervals touch
        (Interval(2.2, 2.3, 2.4), "faster"),
        (Interval(1.5, 1.6, 1.7), "slower"),
    ],
)
def test_verdicts_on_ratios(ratio, expected):
    assert verdict([PLAIN, AGAIN, OURS], [PLAIN, AGAIN, replace(OURS, ratio=ratio)]) == expected


def test_a_slower_machine_is_no_slower_arm():
    """Everything takes three times as long: the plain arm drifts, ours does not change."""
    slow = [
        replace(row, seconds=Interval(*(3 * t for t in vars(row.seconds).values()))) for row in (PLAIN, AGAIN, OURS)
    ]
    changes = compare(report(PLAIN, AGAIN, OURS), report(*slow))
    assert [change.verdict for change in changes] == ["drift", "noise", "within noise"]
    assert not any(change.worse for change in changes)


def test_a_shift_no_larger_than_the_aa_rows_is_noise():
    tight = replace(OURS, ratio=Interval(2.0, 2.0, 2.0))
    now = replace(OURS, ratio=Interval(2.1, 2.1, 2.1))
    stray = replace(AGAIN, ratio=Interval(1.04, 1.06, 1.08))
    assert verdict([PLAIN, AGAIN, tight], [PLAIN, AGAIN, now]) == "faster"
    assert verdict([PLAIN, AGAIN, tight], [PLAIN, stray, now]) == "within noise"
    assert verdict([PLAIN, stray, tight], [PLAIN, AGAIN, now]) == "within noise"


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({}, dict(wrong=3, seconds=None, ratio=None), "WRONG now"),
        (dict(wrong=3, seconds=None, ratio=None), dict(wrong=2, seconds=None, ratio=None), "still wrong"),
        (dict(wrong=3, seconds=None, ratio=None), {}, "right now"),
        ({}, dict(wrong=None, seconds=None, ratio=None), "no longer runs"),
        (dict(wrong=None, seconds=None, ratio=None), {}, "runs now"),
        (dict(wrong=None, seconds=None, ratio=None), dict(wrong=None, seconds=None, ratio=None), "not compared"),
        (dict(ratio=None), {}, "no plain arm to compare by"),
    ],
)
def test_verdicts_on_what_ran(before, now, expected):
    assert verdict([PLAIN, replace(OURS, **before)], [PLAIN, replace(OURS, **now)]) == expected


def test_new_and_gone_rows():
    changes = compare(report(PLAIN, OURS), report(PLAIN, replace(OURS, arm="other")))
    assert [(c.verdict, (c.now or c.before).arm) for c in changes] == [
        ("same", "plain"),
        ("new", "other"),
        ("gone", "ours"),
    ]


def test_apart():
    one = Interval(1.0, 1.1, 1.2)
    assert apart(one, Interval(1.3, 1.4, 1.5), 0.0) == 1
    assert apart(one, Interval(0.3, 0.4, 0.5), 0.0) == -1
    assert apart(one, Interval(1.2, 1.4, 1.5), 0.0) == 0
    assert apart(one, Interval(1.3, 1.4, 1.5), 0.5) == 0


def test_the_page_names_other_hardware_and_counts():
    now = report(PLAIN, AGAIN, replace(OURS, ratio=Interval(1, 1, 1)), hardware="other")
    page = comparison(report(PLAIN, AGAIN, OURS), now)
    assert "- hardware differs: h → other" in page
    assert "0 faster, 1 worse, 2 others" in page
    assert "| c | ours | 500 ms | 500 ms | 2.000 | 1.000 | slower |" in page
