"""Runs the cases of a benchmark: check, warm up, then interleave the arms round by round.

Each round runs every arm once in an order drawn from the seed, so that drift of the machine falls on all arms alike,
and no arm always profits from the caches that another one filled. The plain arm runs twice per round: the second one is
the A/A row, whose distance from ratio 1 is the noise that any claim has to beat. An arm whose answer is wrong is
reported and never timed; an arm that raises is reported, and the others go on.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

from undertow.benchmarks.case import Arm, Case, Measured, Trial
from undertow.benchmarks.intervals import LEAST_SAMPLES, median_interval, ratio_interval
from undertow.benchmarks.report import Row
from undertow.benchmarks.timing import Peers, Sample, Timer, default_timer

MAX_INNER = 100_000
AGAIN = " (A/A)"
LATE, STOPPED = 1, 2  # how much of a hurry

TimerFor = Callable[[Arm], Timer]


def run_case(
    case: Case,
    *,
    rounds: int,
    seed: int,
    peers: Peers | None = None,
    timer_for: TimerFor | None = None,
    least_sample_s: float = 2e-3,
    tick: Callable[[], None] = lambda: None,
    hurry: Callable[[], int] = lambda: 0,
) -> list[Row]:
    """Run one case and return one row per arm, in the case's order, the A/A row after the plain one.

    Every rank of `peers` must call it with equal arguments; all get equal rows. `least_sample_s`: an arm shorter than
    this is run several times per sample. `tick` is called after each round. Once any rank is in a `hurry`, no round
    is begun beyond the fewest that give an interval (`LATE`), or none at all (`STOPPED`).
    """
    peers = peers or Peers()
    timer_for = timer_for or (lambda arm: default_timer(arm, peers))
    trial, rows = _built(case, peers)
    good = [arm for arm in trial.arms if rows[arm.name].wrong == 0]
    timing = _Timing(case, good, timer_for, alone=peers.alone)
    timing.run(
        rounds,
        random.Random(f"{seed}/{case.name}"),
        least_sample_s,
        tick,
        lambda: int(peers.largest(float(hurry()))),
    )
    rows |= {name: replace(rows[name], wrong=None, note=note) for name, note in timing.failed.items()}
    return [row for arm in trial.arms for row in _rows(case, rows[arm.name], timing.samples, timing.inner)]


def check_case(case: Case, *, peers: Peers | None = None) -> list[Row]:
    """Every arm once, its answer against the reference's, nothing timed: a row per arm, `wrong` 0 where it is right."""
    return list(_built(case, peers or Peers())[1].values())


def _built(case: Case, peers: Peers) -> tuple[Trial, dict[str, Row]]:
    """The case's buffers and arms, and the checked row of each arm by its name."""
    trial = case.build()
    names = [arm.name for arm in trial.arms]
    if len(set(names)) != len(names) or not {case.plain, case.ours} <= set(names):
        raise ValueError(f"case '{case.name}': arms {names} must be distinct and hold '{case.plain}' and '{case.ours}'")
    return trial, {arm.name: _checked(case, arm, trial.reference, peers) for arm in trial.arms}


def _checked(case: Case, arm: Arm, reference: Callable[[], object], peers: Peers) -> Row:
    """The arm's row before timing: `wrong` 0 when it may be timed."""
    role = {case.ours: "ours", case.plain: "plain", case.hardware: "hardware"}.get(arm.name, "rival")
    x = case.nbytes if case.x is None else case.x
    row = Row(
        case.name, arm.name, role, case.nbytes, case.group, x, predicted_s=arm.predicted_s, said=arm.said,
        extras=dict(arm.facts),
    )  # fmt: skip
    if peers.largest(float(bool(arm.unavailable))):
        return replace(row, note=arm.unavailable or "another rank lacks it")
    note, wrong = "", 0
    try:
        if arm.prepare is not None:
            arm.prepare()
        answer = arm.run()
        answer = answer.answer if isinstance(answer, Measured) else answer
        if arm.device == "cuda":
            _finish_cuda()
        wrong = case.wrong(answer, (arm.reference or reference)())
    except Exception as error:  # a rival that fails is a finding, and must not end the run of the others
        note = _reason(error)
    if peers.largest(float(bool(note))):
        return replace(row, note=note or "failed on another rank")
    wrong = int(peers.largest(float(wrong)))
    return replace(row, wrong=wrong, note="the answer is wrong" if wrong else "")


def _reason(error: Exception) -> str:
    kind = type(error).__name__
    return "out of memory" if kind == "OutOfMemoryError" else f"failed: {kind}: {error}"


def _finish_cuda() -> None:
    import torch

    torch.cuda.synchronize()  # the answer may still be on its way into host memory


class _Timing:
    """The arms of one case while they are timed.

    `samples` by arm, the plain arm's second set under its name + AGAIN; `inner`: runs per sample; `failed`: why an arm
    dropped out. On several ranks an error ends the run instead, because the other ranks already wait for this one.
    """

    def __init__(self, case: Case, arms: Sequence[Arm], timer_for: TimerFor, *, alone: bool) -> None:
        self.case, self.arms, self.alone = case, arms, alone
        self.timers = {arm.name: timer_for(arm) for arm in arms}
        self.samples: dict[str, list[Sample]] = {}
        self.inner: dict[str, int] = {}
        self.failed: dict[str, str] = {}

    def run(
        self,
        rounds: int,
        order: random.Random,
        least_sample_s: float,
        tick: Callable[[], None],
        hurry: Callable[[], int],
    ) -> None:
        for arm in self.arms:
            self._guarded(arm, lambda arm=arm: self._warm_up(arm, least_sample_s))
        lineup = [(arm.name, arm) for arm in self.arms]
        lineup += [(arm.name + AGAIN, arm) for arm in self.arms if arm.name == self.case.plain]
        gc.collect()
        for done in range(rounds):
            if (urgent := hurry()) == STOPPED or (urgent == LATE and done >= LEAST_SAMPLES):
                break
            for name, arm in order.sample(lineup, len(lineup)):
                self._guarded(arm, lambda name=name, arm=arm: self._sample(name, arm))
            tick()
        for name in self.failed:
            self.samples.pop(name, None)
            self.samples.pop(name + AGAIN, None)

    def _warm_up(self, arm: Arm, least_sample_s: float) -> None:
        self.inner[arm.name] = _calibrate(arm, self.timers[arm.name], least_sample_s, self.case.warm_ups)

    def _sample(self, name: str, arm: Arm) -> None:
        sample = self.timers[arm.name].sample(arm, self.inner[arm.name])
        self.samples.setdefault(name, []).append(sample)

    def _guarded(self, arm: Arm, action: Callable[[], None]) -> None:
        if arm.name in self.failed:
            return
        try:
            action()
        except Exception as error:
            if not self.alone:
                raise
            self.failed[arm.name] = _reason(error)


def _calibrate(arm: Arm, timer: Timer, least_sample_s: float, warm_ups: int) -> int:
    """Warm the arm up; return the runs per sample: one if the arm is prepared, queued ahead, or times itself."""
    if warm_ups == 0:
        return 1
    for _ in range(warm_ups - 1):
        timer.sample(arm, 1)
    sample = timer.sample(arm, 1)
    if arm.prepare is not None or arm.ahead or sample.times_itself or sample.seconds >= least_sample_s:
        return 1
    return min(MAX_INNER, int(least_sample_s / max(sample.seconds, 1e-9)) + 1)


def _rows(case: Case, row: Row, samples: dict[str, list[Sample]], inner: dict[str, int]) -> list[Row]:
    """The finished row of one arm, and the A/A row after the plain one."""
    if row.arm not in samples:
        return [row]
    names = [row.arm] + ([row.arm + AGAIN] if row.role == "plain" else [])
    return [_row(case, row, name, samples, inner[row.arm]) for name in names]


def _row(case: Case, row: Row, name: str, samples: dict[str, list[Sample]], inner: int) -> Row:
    def seconds(arm: str) -> list[float]:
        return [sample.seconds for sample in samples[arm]]

    hardware = case.hardware_bytes_per_s
    if case.hardware in samples and case.nbytes:
        hardware = case.nbytes / median(seconds(case.hardware))
    timed = seconds(name)
    enough = len(timed) >= LEAST_SAMPLES
    few = "" if enough else f"stopped after {len(timed)} rounds, too few for an interval: median {median(timed):.4g} s"
    extras: dict[str, list[float]] = {}
    for sample in samples[name]:
        for key, value in sample.extras:
            extras.setdefault(key, []).append(value)
    return replace(
        row,
        arm=name,
        role=row.role if name == row.arm else "again",
        said="; ".join(filter(None, (row.said if name == row.arm else "", few))),
        seconds=median_interval(timed) if enough else None,
        ratio=ratio_interval(seconds(case.plain), timed)
        if enough and case.plain in samples and name != case.plain
        else None,
        hardware_bytes_per_s=hardware,
        inner=inner,
        extras=row.extras | {key: median(values) for key, values in extras.items()},
        samples_s=tuple(timed),
    )
