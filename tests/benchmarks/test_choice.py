"""What a report says of an automatic arm's choices."""

from __future__ import annotations

from undertow.benchmarks.choice import summary, verdicts
from undertow.benchmarks.intervals import median_interval
from undertow.benchmarks.report import Row


def row(case, arm, seconds, role="rival"):
    samples = tuple(seconds * scale for scale in (0.99, 1.0, 1.0, 1.0, 1.0, 1.01))
    return Row(case, arm, role, wrong=0, seconds=median_interval(samples), samples_s=samples)


def cell(case, off, on, auto):
    return [
        row(case, "off", off, "plain"),
        row(case, "on", on),
        row(case, "auto", auto, "ours"),
        row(case, "else", 0.1),
    ]


def test_regret_is_measured_against_the_best_of_the_choices_only():
    rows = [*cell("a", 2.0, 1.0, 1.02), *cell("b", 1.0, 2.0, 1.0), *cell("c", 2.0, 1.0, 2.0)]
    found = verdicts(rows, ("off", "on"))
    assert [(each.case, each.best, each.right) for each in found] == [
        ("a", "on", True),
        ("b", "off", True),
        ("c", "on", False),
    ]
    assert [round(each.regret, 3) for each in found] == [0.02, 0.0, 1.0]
    text = "\n".join(summary(rows, ("off", "on")))
    assert "in 2 of 3 cells; mean regret 34.0%, worst 100.0% (c: on was best)" in text
    assert "Fastest arm, cells: off 1, on 2." in text


def test_a_cell_without_a_choice_is_not_judged():
    assert verdicts([row("a", "off", 1.0), row("a", "auto", 1.0, "ours")], ("off", "on")) == []
    assert verdicts([row("a", "off", 1.0), row("a", "on", 1.0)], ("off", "on")) == [] == summary([], ("off", "on"))
    assert summary(cell("a", 1.0, 1.0, 1.0), ()) == []
