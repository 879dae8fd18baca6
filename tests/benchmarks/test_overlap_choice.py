"""The gate, replayed on recorded rounds, is judged by those it has not seen."""

from __future__ import annotations

import json

import pytest

from undertow.benchmarks.overlap_choice import (
    BOTH,
    MODEL,
    SEEN,
    gap_table,
    gaps,
    known,
    main,
    markdown,
    predictor,
    queued,
    replay,
    replay_all,
    told,
)
from undertow.parallel.overlap_arms import ARMS, CUDA_ARMS, SEQUENTIAL
from undertow.parallel.overlap_queueing import Queueing

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
    assert "no cell has" in markdown("x", {})


def test_the_report_counts_by_arm(tmp_path, capsys):
    def row(case, arm, samples):
        return {"case": case, "arm": arm, "seconds": {"median": samples[0]}, "samples_s": samples}

    rows = [row(case, "sequential", rounds(1.0)) for case in "ab"]
    rows += [row("a", "overlap, 2 pieces", rounds(0.5)), row("b", "overlap, 2 pieces", rounds(0.5, 2.0))]
    text = markdown("x", replay_all({"rows": rows}))
    assert "| measured | 1 of 2 | 50.0% | missed |" in text and "model" not in text
    assert "| sequential | 0% | 50% |" in text and "| overlap, 2 pieces | 100% | 50% |" in text
    assert "- measured: b: chose overlap, 2 pieces, sequential was best (+100.0%)" in text
    (tmp_path / "x.json").write_text(json.dumps({"rows": rows}))
    assert main([str(tmp_path / "x.json")]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_the_model_of_a_cell_is_fitted_on_the_others_alone():
    """1e12 flop/s and 1e9 bytes/s in the others: 1 s of product and 2 s of link; by hand for 2 ranks and 2 pieces."""
    others = [told(known(2, 1e12, 1e9, 1.0, 1.0)), told(known(2, 4e12, 1e9, 4.0, 1.0))]
    cell = told(known(2, 1e12, 2e9, 777.0, 777.0))
    assert cell is not None and all(others)
    predict = predictor(cell, [each for each in others if each])
    assert predict(SEQUENTIAL) == pytest.approx(3.0) and predict(ARMS[2]) == pytest.approx(0.25 + 2.0)
    slow = told(known(2, 1e12, 2e9, 777.0, 5.0, set_link=True))  # an emulated link's time is known beforehand
    assert slow is not None
    assert predictor(slow, [each for each in others if each])(SEQUENTIAL) == pytest.approx(6.0)
    assert told(known(2, 1e12, 2e9, 1.0, 0.0)) is None and told({"pieces": 1.0}) is None


def test_a_model_that_errs_on_the_cell_left_out_shows():
    """Four cells in which overlap wins 1.5 times, and a fifth like them by the model in which it loses."""
    rows = []
    for case, on in (*((name, 1 / 1.5) for name in "abcd"), ("e", 1.25)):
        facts = known(2, 1e12, 1e9, 0.5, 0.5)
        for arm, samples in (("sequential", rounds(1.0)), ("overlap, 4 pieces", rounds(on)), ("auto", rounds(1.0))):
            extras = facts if arm == "auto" else {}
            rows.append({"case": case, "arm": arm, "seconds": {}, "samples_s": samples, "extras": extras})
            rows[-1]["seconds"] = {"median": samples[0]}
    parts = replay_all({"rows": rows})
    assert [cell.chosen for cell in parts[MODEL]] == ["overlap, 4 pieces"] * 5
    assert [cell.right for cell in parts[MODEL]] == [True] * 4 + [False]
    assert [cell.chosen for cell in parts[BOTH]] == ["overlap, 4 pieces"] * 4 + ["sequential"]
    text = markdown("x", parts)
    assert "| modelled, then measured | 5 of 5 | 0.0% | reached |" in text
    assert "| model alone | 4 of 5 | 5.0% | missed |" in text


def test_what_pieces_cost_the_host_is_read_off_cells_that_nothing_else_can_have_held_up():
    """Two ranks: 2 and 8 pieces take 3 + 2 and 3 + 8 s, where product and collective take 4 s."""
    cell = told(known(2, 1e12, 1e9, 3.0, 1.0))
    assert cell is not None
    assert queued(cell, {"overlap, 1 piece": [5.0], "overlap, 4 pieces": [11.0]}) == Queueing(3.0, 1.0)
    assert queued(cell, {"overlap, 1 piece": [5.0], "overlap, 4 pieces": [7.9]}) is None
    assert queued(cell, {"overlap, 4 pieces": [11.0]}) is None
    set_link = told(known(2, 1e12, 1e9, 3.0, 1.0, set_link=True))
    assert set_link is not None
    assert queued(set_link, {"overlap, 1 piece": [5.0], "overlap, 4 pieces": [11.0]}) is None


def test_the_model_says_no_less_than_the_host_needs_for_the_pieces():
    """The others' host: what they measured, else what was read off them. 1 s of product, 1 s of collective, 2 ranks."""
    cell = told(known(2, 1e12, 1e9, 1.0, 1.0))
    measured = told(known(2, 1e12, 1e9, 1.0, 1.0, queueing=Queueing(1.0, 0.25)))
    assert cell is not None and measured is not None
    predict = predictor(cell, [cell, measured], [Queueing(9.0, 9.0)])
    assert [predict(arm) for arm in ARMS[:4]] == pytest.approx([2.0, 1.5, 2.0, 3.0])
    predict = predictor(cell, [cell], [Queueing(1.0, 0.25)] * 2 + [Queueing(9.0, 9.0)])
    assert [predict(arm) for arm in ARMS[:4]] == pytest.approx([2.0, 1.5, 2.0, 3.0])
    columns, replayed = (
        next(arm for arm in CUDA_ARMS if arm.name.startswith(x)) for x in ("columns, 8", "replayed, 2")
    )
    assert predict(columns) == pytest.approx(1.0 + 9 * 0.25) and predict(replayed) == pytest.approx(1.25)


def test_measured_times_stand_beside_those_of_the_model():
    facts = known(2, 1e12, 1e9, 1.0, 1.0)
    rows = [
        {"case": case, "arm": arm, "seconds": {}, "samples_s": samples, "extras": facts if arm == "auto" else {}}
        for case, slower in (("a", 1.0), ("b", 1.1), ("c", 1.2))
        for arm, samples in (("sequential", [2.0 * slower] * 3), ("overlap, 1 piece", [1.5] * 3), ("auto", [1.5]))
    ]
    for row in rows:
        row["seconds"] = {"median": row["samples_s"][0]}
    found = gaps({"rows": rows})
    assert found["sequential"] == pytest.approx([1.0, 1.1, 1.2]) and found["overlap, 1 piece"] == pytest.approx(
        [1.0] * 3
    )
    assert "| sequential | 1.10 | 1.00 | 1.20 | 2 of 3 |" in gap_table(found) and gap_table({}) == ""
