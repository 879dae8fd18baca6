"""The run of a case with scripted clocks: who is checked, who is timed, in which order, and what the rows say."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from undertow.benchmarks.case import Arm, Case, Measured, Trial
from undertow.benchmarks.harness import LATE, STOPPED, run_case
from undertow.benchmarks.intervals import Interval
from undertow.benchmarks.timing import Peers, Sample, SlowestRank

PLAIN, OURS, RIVAL = "plain", "ours", "rival"


class Clock:
    """A timer whose samples come from a script by arm and call; `log` keeps who was timed, in order."""

    def __init__(self, seconds):
        self.seconds, self.log, self.inner = seconds, [], {}

    def sample(self, arm, inner):
        self.log.append(arm.name)
        self.inner[arm.name] = inner
        return Sample(self.seconds[arm.name](self.log.count(arm.name)))


def arm(name, answer=7, **keywords):
    return Arm(name, run=lambda: answer, **keywords)


def case(*arms, **keywords):
    trial = Trial(arms or (arm(PLAIN), arm(OURS), arm(RIVAL)), reference=lambda: 7)
    defaults = dict(name="cell", build=lambda: trial, plain=PLAIN, ours=OURS, nbytes=3000)
    return Case(**{**defaults, **keywords})


def constant(**seconds):
    return Clock({name: (lambda call, s=s: s) for name, s in seconds.items()})


def run(a_case, clock, rounds=7, seed=0, **keywords):
    return run_case(a_case, rounds=rounds, seed=seed, timer_for=lambda arm: clock, **keywords)


def rounds_of(clock, arms, rounds):
    """The timed part of the log, cut into rounds."""
    timed, width = clock.log[-rounds * (arms + 1) :], arms + 1
    return [timed[i : i + width] for i in range(0, len(timed), width)]


def test_every_round_runs_every_arm_once_and_plain_twice():
    clock = constant(plain=0.3, ours=0.1, rival=0.2)
    run(case(), clock, rounds=9)
    for one in rounds_of(clock, arms=3, rounds=9):
        assert Counter(one) == {PLAIN: 2, OURS: 1, RIVAL: 1}


def test_the_order_changes_between_rounds_and_comes_from_the_seed():
    def order(seed):
        clock = constant(plain=0.3, ours=0.1, rival=0.2)
        run(case(), clock, rounds=12, seed=seed)
        return rounds_of(clock, arms=3, rounds=12)

    assert order(1) == order(1) != order(2)
    assert len({tuple(one) for one in order(1)}) > 3
    assert len({one[0] for one in order(1)}) == 3  # each arm is first in some round


def test_the_order_leaves_other_generators_alone():
    random.seed(5)
    before = random.getstate()
    run(case(), constant(plain=0.3, ours=0.1, rival=0.2))
    assert random.getstate() == before


def test_rows_by_hand():
    seconds = {
        PLAIN: lambda call: 0.4,
        OURS: lambda call: 0.1 if call % 2 else 0.2,  # two warm-ups, then 0.1 0.2 0.1 0.2 0.1 0.2 0.1
        RIVAL: lambda call: 0.8,
    }
    arms = (arm(PLAIN, predicted_s=0.5), arm(OURS), arm(RIVAL))
    rows = {row.arm: row for row in run(case(*arms, hardware=RIVAL), Clock(seconds))}
    assert list(rows) == [PLAIN, "plain (A/A)", OURS, RIVAL]
    assert [row.role for row in rows.values()] == ["plain", "again", "ours", "hardware"]
    assert rows[PLAIN].ratio is None and rows["plain (A/A)"].ratio == Interval(1.0, 1.0, 1.0)
    assert rows[OURS].seconds == Interval(0.1, 0.1, 0.2) and rows[OURS].ratio == Interval(2.0, 4.0, 4.0)
    assert rows[RIVAL].ratio == Interval(0.5, 0.5, 0.5)
    assert rows[OURS].bytes_per_s == pytest.approx(30_000) and rows[OURS].of_hardware == pytest.approx(8)
    assert rows[PLAIN].predicted_s == 0.5
    assert rows[OURS].samples_s == (0.1, 0.2, 0.1, 0.2, 0.1, 0.2, 0.1)


def test_a_wrong_arm_is_flagged_and_never_timed():
    clock = constant(plain=0.3, ours=0.1, rival=0.2)
    rows = {row.arm: row for row in run(case(arm(PLAIN), arm(OURS, answer=8), arm(RIVAL)), clock)}
    assert rows[OURS].wrong == 1 and rows[OURS].seconds is None and rows[OURS].ratio is None
    assert OURS not in clock.log
    assert rows[RIVAL].wrong == 0 and rows[RIVAL].seconds is not None


def test_a_wrong_plain_arm_leaves_no_ratio():
    clock = constant(plain=0.3, ours=0.1, rival=0.2)
    rows = {row.arm: row for row in run(case(arm(PLAIN, answer=8), arm(OURS), arm(RIVAL)), clock)}
    assert rows[PLAIN].wrong == 1 and rows[OURS].seconds is not None and rows[OURS].ratio is None
    assert "plain (A/A)" not in rows


def test_an_arm_that_raises_does_not_end_the_others():
    def explode():
        raise OSError("no such rival")

    clock = constant(plain=0.3, ours=0.1)
    rows = {row.arm: row for row in run(case(arm(PLAIN), arm(OURS), Arm(RIVAL, run=explode)), clock)}
    assert rows[RIVAL].note == "failed: OSError: no such rival" and rows[RIVAL].wrong is None
    assert rows[OURS].seconds is not None


@pytest.mark.parametrize("call", [1, 2, 5, 9])
@pytest.mark.parametrize("who", [PLAIN, RIVAL])
def test_an_arm_that_fails_while_it_is_timed_drops_out_alone(who, call):
    """In a warm-up or in any round: the others keep all their rounds, and no ratio is formed with half a plain arm."""

    def seconds(now):
        if now == call:
            raise RuntimeError("left work on other streams")
        return 0.1

    clock = Clock({PLAIN: lambda now: 0.3, OURS: lambda now: 0.1, RIVAL: lambda now: 0.2, who: seconds})
    rows = {row.arm: row for row in run(case(), clock)}
    assert rows[who].note == "failed: RuntimeError: left work on other streams" and rows[who].seconds is None
    assert clock.log.count(who) == call
    assert len(rows[OURS].samples_s) == 7 and (rows[OURS].ratio is None) == (who == PLAIN)
    assert ("plain (A/A)" in rows) == (who != PLAIN)


def test_running_out_of_memory_is_a_reason_not_a_failure():
    def greedy():
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows = run(case(arm(PLAIN), arm(OURS), Arm(RIVAL, run=greedy)), constant(plain=0.3, ours=0.1))
    assert [row.note for row in rows if row.arm == RIVAL] == ["out of memory"]


def test_the_device_finishes_before_an_answer_is_read(monkeypatch):
    """A copy into host memory that was only queued has brought nothing yet."""
    host: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: host.append(7))
    ours = Arm(OURS, run=lambda: host, prepare=host.clear, reference=lambda: [7], device="cuda")
    rows = {row.arm: row for row in run(case(arm(PLAIN), ours), constant(plain=1.0, ours=1.0))}
    assert rows[OURS].wrong == 0


def test_an_unavailable_arm_is_listed_with_its_reason():
    clock = constant(plain=0.3, ours=0.1)
    rows = {row.arm: row for row in run(case(arm(PLAIN), arm(OURS), Arm.missing(RIVAL, "not installed")), clock)}
    assert rows[RIVAL].note == "not installed" and rows[RIVAL].wrong is None and RIVAL not in clock.log


def test_a_row_keeps_what_its_arm_says():
    rows = run(case(arm(PLAIN, said="plainly"), arm(OURS, said="measured")), constant(plain=0.3, ours=0.1))
    assert [(row.arm, row.said) for row in rows] == [(PLAIN, "plainly"), (f"{PLAIN} (A/A)", ""), (OURS, "measured")]


def test_an_arm_may_have_a_reference_of_its_own():
    rows = run(case(arm(PLAIN), arm(OURS, answer=8, reference=lambda: 8)), constant(plain=0.3, ours=0.1))
    assert [row.wrong for row in rows] == [0, 0, 0]


def test_short_arms_run_several_times_per_sample():
    clock = constant(plain=5e-6, ours=1.0, rival=1e-12)
    rows = {row.arm: row for row in run(case(), clock, least_sample_s=1e-3)}
    assert clock.inner == {PLAIN: 201, OURS: 1, RIVAL: 100_000}
    assert rows[PLAIN].inner == 201


def test_prepared_arms_run_once_per_sample():
    clock = constant(plain=1e-6, ours=1e-6)
    run(case(arm(PLAIN), arm(OURS, prepare=lambda: None)), clock)
    assert clock.inner[OURS] == 1 and clock.inner[PLAIN] > 1


def test_prepare_comes_before_the_check_too():
    state = []
    ours = Arm(OURS, run=lambda: state.pop(), prepare=lambda: state.append(7))
    rows = {row.arm: row for row in run(case(arm(PLAIN), ours), constant(plain=1.0, ours=1.0))}
    assert rows[OURS].wrong == 0


def test_answers_are_taken_out_of_measured():
    ours = Arm(OURS, run=lambda: Measured(7, seconds=0.1, extras={"peak_bytes": 5.0}))
    rows = {row.arm: row for row in run_case(case(arm(PLAIN), ours), rounds=6, seed=0)}
    assert rows[OURS].wrong == 0 and rows[OURS].seconds == Interval(0.1, 0.1, 0.1)
    assert rows[OURS].extras == {"peak_bytes": 5.0} and rows[OURS].inner == 1


def test_one_tick_per_round():
    ticks = []
    run(case(), constant(plain=0.3, ours=0.1, rival=0.2), rounds=8, tick=lambda: ticks.append(1))
    assert len(ticks) == 8


@pytest.mark.parametrize("change", [{"plain": "absent"}, {"ours": "absent"}])
def test_a_case_must_hold_its_arms(change):
    with pytest.raises(ValueError, match="cell"):
        run(replace(case(), **change), constant(plain=0.3, ours=0.1, rival=0.2))


def test_arm_names_must_differ():
    with pytest.raises(ValueError, match="distinct"):
        run(case(arm(PLAIN), arm(OURS), arm(OURS)), constant(plain=0.3, ours=0.1))


def on_ranks(rank, world):
    import torch.distributed as dist

    peers = Peers(dist.group.WORLD)
    clock = Clock({PLAIN: lambda call: 1.0 + rank, OURS: lambda call: 2.0 - rank / 2, RIVAL: lambda call: 1.0})
    arms = (arm(PLAIN), arm(OURS), arm(RIVAL, answer=7 if rank == 0 else 8), Arm.missing("here", "x" * (1 - rank)))
    rows = run_case(case(*arms), rounds=6, seed=3, peers=peers, timer_for=lambda a: SlowestRank(clock, peers))
    return [(r.arm, r.wrong, r.seconds and r.seconds.median, r.ratio and r.ratio.median) for r in rows], clock.log


@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_ranks_agree_and_the_slowest_counts(ranks, world):
    results = ranks(world, on_ranks)
    assert all(result == results[0] for result in results)
    rows = {name: rest for name, *rest in results[0][0]}
    assert rows[PLAIN] == [0, float(world), None]
    assert rows[OURS] == [0, 2.0, world / 2]
    assert rows[RIVAL][0] == (0 if world == 1 else 1)  # wrong on one rank is wrong on all
    assert rows["here"] == [None, None, None]  # missing on one rank is missing on all


def test_a_stop_ends_after_the_round_at_hand_and_keeps_its_samples():
    clock, urgent = constant(plain=0.3, ours=0.1, rival=0.2), iter([0, LATE, STOPPED])
    rows = run(case(), clock, rounds=9, hurry=lambda: next(urgent))
    assert {row.arm: row.samples_s for row in rows}[OURS] == (0.1, 0.1)
    assert all(row.wrong == 0 and row.seconds is None and row.ratio is None for row in rows)
    assert all("stopped after 2 rounds" in row.said for row in rows)
    assert "median 0.1 s" in {row.arm: row.said for row in rows}[OURS]
