"""What 'auto' means: the planner proposes, and the first calls of each shape decide.

A model of the machine can be wrong about the machine; a measurement of the calls themselves cannot. For each problem
and phase the plain ring, the plain all-gather (where its buffers are not much larger), the planner's choice and its
best of each kind of movement take turns; then the slowest rank's times decide, alike on all ranks. Another must beat
the ring by 3 % in the median and in all rounds but one, so that noise does not switch it on; where calls are long,
after three rounds, in all of them. All arms are exact, but
they add in different orders: where a resumed run must repeat every bit, name a schedule, or take 'predicted', which
measures nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

from ...comms.cost import buffer_bytes
from .executors import Home
from .planner import DEFAULT, Rates, choose
from .problem import Problem

MORE_BUFFERS = 2.0  # the all-gather is tried unless it needs more than so much of the ring's buffers
HOPELESS = 2.0  # no turn for what is predicted to take more than so much of the ring's time
MOVES = {
    **dict.fromkeys(("token_ring", "token_ring_bookended", "need_only_q"), "q"),
    **dict.fromkeys(("ulysses", "ulysses_ring", "ulysses_token"), "heads"),
}
ROUNDS = 5  # timed calls of each arm; one more before them plans it
FEW_ROUNDS, LONG_S = 3, 0.3  # of calls that take longer than that in the median
WIN = 1.03  # least median speed-up over the ring
Result = TypeVar("Result")
_lean = ContextVar("lean", default=False)


@contextmanager
def lean() -> Iterator[None]:
    """Calls that are made in here try no schedule that allocates more than the ring: for who has planned its bytes."""
    token = _lean.set(True)
    try:
        yield
    finally:
        _lean.reset(token)


def is_lean() -> bool:
    return _lean.get()


def arms(problem: Problem, rates: Rates, *, backward: bool, lean: bool = False) -> tuple[str, ...]:
    """The schedules that are worth a measurement, the plain ring first; `lean`: none with more buffers. Pure."""
    choice = choose(problem, rates, backward=backward)
    seconds = next(e.seconds for e in choice.estimates if e.name == DEFAULT)
    buffers = {e.name: e.buffer_bytes for e in choice.estimates if not e.reason}
    few_more = 0 < buffers["all_gather_kv"] <= MORE_BUFFERS * buffers[DEFAULT]
    plain = ["all_gather_kv"] if few_more else []
    likely = sorted((e for e in choice.estimates if e.seconds <= HOPELESS * seconds), key=lambda e: e.seconds)
    best = {MOVES.get(e.name, "kv"): e.name for e in reversed(likely) if e.name not in (DEFAULT, *plain)}
    names = dict.fromkeys((DEFAULT, *plain, choice.name, *best.values()))
    if not lean:
        return tuple(names)
    needs = {name: _buffer_bytes(problem, name, backward) for name in names}  # some estimates are without
    return tuple(name for name in names if needs[name] <= needs[DEFAULT])


def _buffer_bytes(problem: Problem, name: str, backward: bool) -> int:
    schedule = problem.schedule(name, backward=backward)
    return max(buffer_bytes(schedule, rank) for rank in range(problem.world))


class ScheduleGate:
    """The measured choice for one problem and phase on one group; every rank makes the same calls."""

    def __init__(self, home: Home, problem: Problem, rates: Rates, *, backward: bool, lean: bool = False) -> None:
        assert home.executor is not None
        self.problem, self.backward, self._gather = problem, backward, home.executor.gather
        self.predicted = choose(problem, rates, backward=backward).name
        self.arms = arms(problem, rates, backward=backward, lean=lean)
        self.chosen = ""  # until it has been measured
        self.speed: dict[str, float] = {}  # of each arm: how many times as fast as the ring
        self._seconds: list[list[float]] = [[] for _ in self.arms]
        self._calls = 0

    def run(self, execute: Callable[[str], Result], device: torch.device) -> Result:
        """`execute(name)` for the schedule whose turn it is, timed until the choice has been made."""
        if not self.chosen and self._calls in [(rounds + 1) * len(self.arms) for rounds in (FEW_ROUNDS, ROUNDS)]:
            self._decide()
        if self.chosen:
            return execute(self.chosen)
        arm = self._calls % len(self.arms)
        self._calls += 1
        if device.type != "cuda":
            began_s = time.perf_counter()
            result = execute(self.arms[arm])
            self._seconds[arm].append(time.perf_counter() - began_s)
            return result
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = execute(self.arms[arm])
        end.record()
        end.synchronize()  # this call alone, and only while it is being measured
        self._seconds[arm].append(begin.elapsed_time(end) / 1e3)
        return result

    def _decide(self) -> None:
        """Collective: the slowest rank's time of each call counts; each arm's first call, which plans it, does not.
        After few rounds of short calls nothing is decided."""
        mine = torch.tensor([seconds[1:] for seconds in self._seconds], dtype=torch.float64)
        slowest = torch.stack(self._gather(mine)).max(0).values
        few = slowest.shape[1] < ROUNDS
        if few and slowest.median() < LONG_S:
            return
        ratios = slowest[0] / slowest
        self.speed = dict(zip(self.arms, ratios.median(1).values.tolist()))
        best = max(self.arms, key=self.speed.__getitem__)
        often = int((ratios[self.arms.index(best)] > 1).sum()) >= slowest.shape[1] - (not few)
        self.chosen = best if self.speed[best] >= WIN and often else DEFAULT

    def __str__(self) -> str:
        p = self.problem
        what = f"{'backward' if self.backward else 'forward'} of {p.lq}×{p.lk}, {p.heads.q_heads}:{p.heads.kv_heads}"
        if self.chosen:
            others = ", ".join(f"{name} {speed:.2f}×" for name, speed in self.speed.items() if name != DEFAULT)
            found = f"{self.chosen} (measured: {others} as fast as {DEFAULT})"
        else:
            found = f"still measuring {', '.join(self.arms)}; {self._calls} calls so far"
        return f"{what} heads on {p.world} ranks: {found}; predicted {self.predicted}"


def gate_of(home: Home, problem: Problem, rates: Rates, *, backward: bool, lean: bool) -> ScheduleGate | None:
    """The gate of this problem and phase, remembered with the group; None where there is nothing to choose."""
    if home.executor is None:
        return None
    key = problem, backward, lean
    if key not in home.gates:
        home.gates[key] = ScheduleGate(home, problem, rates, backward=backward, lean=lean)
    return home.gates[key]
