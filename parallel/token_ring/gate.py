"""What 'auto' means: the planner proposes, and the first calls of each shape decide.

A model of the machine can be wrong about the machine; a measurement of the calls themselves cannot. For each problem
and phase the plain ring, the plain all-gather (where its buffers are not much larger), the planner's choice and its
best of each kind of movement take turns; then the slowest rank's medians decide, alike on all ranks, and the ring wins
ties within 3 %. All arms are exact, but they add in different orders: where a resumed run must repeat every bit, name a
schedule, or take 'predicted', which measures nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from ..overlap_gate import Gate
from .executors import Home
from .planner import DEFAULT, Rates, choose
from .problem import Problem

MORE_BUFFERS = 2.0  # the all-gather is tried unless it needs more than so much of the ring's buffers
HOPELESS = 2.0  # no turn for what is predicted to take more than so much of the ring's time
MOVES = {
    **dict.fromkeys(("token_ring", "token_ring_bookended", "need_only_q"), "q"),
    **dict.fromkeys(("ulysses", "ulysses_ring", "ulysses_token"), "heads"),
}
_KEY = "seconds"
Result = TypeVar("Result")


def arms(problem: Problem, rates: Rates, *, backward: bool) -> tuple[str, ...]:
    """The schedules that are worth a measurement, the plain ring first. Pure."""
    choice = choose(problem, rates, backward=backward)
    seconds = next(e.seconds for e in choice.estimates if e.name == DEFAULT)
    buffers = {e.name: e.buffer_bytes for e in choice.estimates if not e.reason}
    plain = [n for n in ("all_gather_kv",) if buffers[n] <= MORE_BUFFERS * buffers[DEFAULT]]
    likely = sorted((e for e in choice.estimates if e.seconds <= HOPELESS * seconds), key=lambda e: e.seconds)
    best = {MOVES.get(e.name, "kv"): e.name for e in reversed(likely) if e.name not in (DEFAULT, *plain)}
    return tuple(dict.fromkeys((DEFAULT, *plain, choice.name, *best.values())))


class ScheduleGate:
    """The measured choice for one problem and phase on one group; every rank makes the same calls."""

    def __init__(self, home: Home, problem: Problem, rates: Rates, *, backward: bool) -> None:
        assert home.executor is not None
        self.home, self.problem, self.backward = home, problem, backward
        self.predicted = choose(problem, rates, backward=backward).name
        self.gate = Gate(arms(problem, rates, backward=backward), home.executor.gather)

    def run(self, execute: Callable[[str], Result], device: torch.device) -> Result:
        """`execute(name)` for the schedule whose turn it is, timed until the choice has been made."""
        arm = self.gate.choose(_KEY)
        name = self.gate.arms[arm]
        if self.chosen:
            return execute(name)
        if device.type != "cuda":
            began_s = time.perf_counter()
            result = execute(name)
            self.gate.took(_KEY, arm, time.perf_counter() - began_s)
            return result
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = execute(name)
        end.record()
        end.synchronize()  # this call alone, and only while it is being measured
        self.gate.took(_KEY, arm, begin.elapsed_time(end) / 1e3)
        return result

    @property
    def chosen(self) -> str:
        """The schedule that was chosen; '' while it is being measured."""
        arm = self.gate.chosen(_KEY)
        return "" if arm is None else self.gate.arms[arm]

    def __str__(self) -> str:
        p = self.problem
        what = f"{'backward' if self.backward else 'forward'} of {p.lq}×{p.lk}, {p.heads.q_heads}:{p.heads.kv_heads}"
        found = self.gate.explain().removeprefix(f"{_KEY}: ")
        return f"{what} heads on {p.world} ranks: {found}; predicted {self.predicted}"


def gate_of(home: Home, problem: Problem, rates: Rates, *, backward: bool) -> ScheduleGate | None:
    """The gate of this problem and phase, remembered with the group; None where there is nothing to choose."""
    if home.executor is None:
        return None
    key = problem, backward
    if key not in home.gates:
        home.gates[key] = ScheduleGate(home, problem, rates, backward=backward)
    return home.gates[key]
