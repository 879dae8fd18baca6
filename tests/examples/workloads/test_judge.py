"""Verdicts follow from numbers alone, and a diverged run counts against whoever diverged."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from undertow.dist.errors import UserError
from undertow.examples.workloads.contract import Claim, Config, Variant, Workload
from undertow.examples.workloads.judge import judge
from undertow.examples.workloads.loop import Outcome
from undertow.examples.workloads.report import claim_rows, markdown, variant_rows
from undertow.examples.workloads.switches import Switches

CLAIM = Claim("ours is better", "score", "ours", "theirs", 0.1)


def workload(*claims: Claim) -> Workload:
    def never(*unused):
        raise AssertionError("a verdict needs no run")

    variants = {"ours": Variant("ours"), "theirs": Variant("theirs", {"lr": 0.5})}
    presets = {"ci": Config(steps=3), "small": Config(steps=4), "gpu": Config(steps=5)}
    return Workload(
        "x", "X", "none", presets, never, never, never, never, variants, claims, frozenset({"checkpoint"}), "updates"
    )


def outcome(variant: str, seed: int, score: float) -> Outcome:
    diverged = math.isnan(score)
    return Outcome("x", variant, "ci", seed, {"score": score}, [1.0], 1, diverged, "", 0.0, 1, [])


@pytest.mark.parametrize(
    "ours, theirs, relation, holds",
    [
        ([0.5], [0.4], ">=", True),
        ([0.49], [0.4], ">=", False),
        ([0.9, 0.9, 0.1], [0.4, 0.4, 0.4], ">=", True),
        ([0.9, 0.45, 0.45], [0.4, 0.4, 0.4], ">=", False),  # on the mean, but in one seed of three
        ([0.5, 0.5, 0.0], [0.4, 0.4, 0.4], ">=", False),  # in two seeds of three, but not on the mean
        ([0.5], [0.4], "<=", True),
        ([0.51], [0.4], "<=", False),
        ([0.2], [math.nan], ">=", True),
        ([math.nan], [0.4], ">=", False),
        ([math.nan], [math.nan], ">=", False),
    ],
)
def test_a_claim_holds_on_the_mean_and_in_most_seeds(ours, theirs, relation, holds):
    runs = [outcome(name, s, v) for name, values in (("ours", ours), ("theirs", theirs)) for s, v in enumerate(values)]
    (verdict,) = judge(workload(replace(CLAIM, relation=relation)), "ci", runs)
    assert verdict.holds is holds
    assert ("holds" in verdict.word) is holds


def test_failed_claims_stand_in_the_table_as_failed():
    runs = [outcome("ours", 0, 0.1), outcome("theirs", 0, 0.4)]
    for expected, word in ((True, "FAILED"), (False, "FAILED (as measured before)")):
        (verdict,) = judge(workload(replace(CLAIM, expected=expected)), "ci", runs)
        assert claim_rows([verdict])[0][-1] == word
        assert word in markdown(("a",) * 6, claim_rows([verdict]))


def test_seeds_that_diverged_are_left_out_of_the_mean_and_counted():
    scores = {"ours": (0.2, 0.4, math.nan), "theirs": (math.nan, math.nan, math.nan)}
    runs = [outcome(name, seed, score) for name, three in scores.items() for seed, score in enumerate(three)]
    _, (ours, theirs) = variant_rows(workload(CLAIM), runs)
    assert ours[2] == "0.300 ± 0.141 (2 of 3)" and "(diverged 1/3)" in ours[1]
    assert theirs[2] == "nan" and "(diverged 3/3)" in theirs[1]


def test_a_claim_without_all_its_runs_is_open():
    """Whatever the runs say that there are: neither held nor failed, and what is missing has its name."""
    stopped = replace(outcome("theirs", 1, 0.0), ended=False, metrics={})
    runs = [outcome("ours", 0, 0.9), outcome("theirs", 0, 0.4), outcome("ours", 1, 0.9), stopped]
    (verdict,) = judge(workload(CLAIM), "ci", runs, range(3))
    assert verdict.open and not verdict.holds
    assert verdict.word == "open: waits for ours (seed 2), theirs (seed 1, 2)"
    assert verdict.seeds == (0,) and verdict.values == (0.9,) and verdict.each == (True,)
    ((_, _, measured, asked, seeds, word),) = claim_rows([verdict])
    assert "0.900" in measured and "0.500" in asked and seeds == "1/1" and word == verdict.word
    (nothing,) = judge(workload(CLAIM), "ci", [], [0])
    assert nothing.open and claim_rows([nothing])[0][4] == "0/0"
    head, rows = variant_rows(workload(CLAIM), runs)
    assert rows[1][head.index("score")] == "0.400" and "stopped before its end 1/2" in rows[1][1]


def test_a_claim_of_another_preset_is_not_judged():
    runs = [outcome("ours", 0, 0.1), outcome("theirs", 0, 0.4)]
    assert judge(workload(replace(CLAIM, presets=("gpu",))), "ci", runs) == []


@pytest.mark.parametrize("changes", [{"stepz": 1}, {"steps": "many"}, {"steps": 1.5}])
def test_options_that_do_not_exist_or_are_of_another_kind_are_refused(changes):
    with pytest.raises(UserError, match="expected"):
        workload().config("ci", "ours", **changes)
    assert workload().config("ci", "theirs").lr == 0.5
    assert workload().config("ci", "theirs", lr=1).lr == 1


def test_combinations_are_refused_by_name():
    with pytest.raises(UserError, match="x does not use streamed"):
        Switches(stream=True).check("x", {"checkpoint"}, 1)
    with pytest.raises(UserError, match="graphgps does not use overlapped.*: its products are too small"):
        Switches(overlap="on").check("graphgps", {"checkpoint"}, 2)
    with pytest.raises(UserError, match="--overlap auto on 1 rank"):
        Switches(overlap="auto").check("x", {"checkpoint", "overlap"}, 1)
    with pytest.raises(UserError, match="streamed .* and overlapped .* in one run"):
        Switches(stream=True, overlap="on").check("x", {"checkpoint", "overlap", "stream"}, 2)
    with pytest.raises(UserError, match="--context-parallel 3 on 2 ranks"):
        Switches(context=3).check("x", {"ring", "checkpoint"}, 2)
    for wrong in ({"checkpoint": "eager"}, {"halo": "tcp"}, {"context": 0}, {"stream_chunk": 4}):
        with pytest.raises(UserError, match="expected"):
            Switches(**wrong)
