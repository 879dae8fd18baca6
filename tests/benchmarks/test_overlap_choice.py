"""The gate, replayed on recorded rounds, is judged by those it has not seen."""

from __future__ import annotations

import json

import pytest

from undertow.benchmarks.overlap_choice import SEEN, main, markdown, replay, replay_all

UNSEEN = 9


def rounds(seen, later=None):
    return [seen] * SEEN + [seen if later is None else later] * UNSEEN


@pytest.mark.parametrize(
    "on, chosen, best, regret, right",
    [
        (rounds(0.8), "overlap, 1 piece", "overlap, 1 piece", 0.0, True),
        (rounds(0.98), "sequential", "overlap, 1 piece", 1 / 0.98 - 1, True),  # less than the gate wants to win
        (rounds(1.2), "sequential", "sequential", 0.0, True),
        (rounds(0.8, 1.1), "overlap, 1 piece", "sequential", 0.1, False),  # only in the rounds that the gate saw
        (rounds(1.1, 0.8), "sequential", "overlap, 1 piece", 0.25, False),
    ],
)
def test_the_choice_is_made_by_the_first_rounds_and_judged_by_the_others(on, chosen, best, regret, right):
    cell = replay("a", {"sequential": rounds(1.0), "overlap, 1 piece": on, "auto": rounds(0.1)})
    assert cell is not None
    assert (cell.chosen, cell.best, cell.right) == (chosen, best, right)
    assert cell.regret == pytest.approx(regret)


def test_a_cell_with_too_few_rounds_or_arms_is_not_judged():
    assert replay("a", {"sequential": rounds(1.0)}) is None
    assert replay("a", {"sequential": rounds(1.0), "overlap, 1 piece": [1.0] * SEEN}) is None
    assert replay("a", {"overlap, 1 piece": rounds(1.0), "overlap, 2 pieces": rounds(1.0)}) is None
    assert "no cell has" in markdown("x", [])


def test_the_report_counts_by_arm(tmp_path, capsys):
    def row(case, arm, samples):
        return {"case": case, "arm": arm, "seconds": {"median": samples[0]}, "samples_s": samples}

    rows = [row(case, "sequential", rounds(1.0)) for case in "ab"]
    rows += [row("a", "overlap, 2 pieces", rounds(0.5)), row("b", "overlap, 2 pieces", rounds(0.5, 2.0))]
    text = markdown("x", replay_all({"rows": rows}))
    assert "x: right in 1 of 2 cells, mean regret 50.0%" in text and "missed" in text
    assert "| sequential | 0% | 50% |" in text and "| overlap, 2 pieces | 100% | 50% |" in text
    assert "- b: chose overlap, 2 pieces, sequential was best (+100.0%)" in text
    (tmp_path / "x.json").write_text(json.dumps({"rows": rows}))
    assert main([str(tmp_path / "x.json")]) == 0
    assert capsys.readouterr().out == text + "\n"
