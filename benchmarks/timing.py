"""Takes one sample of one arm: the host's clock for CPU work, events for CUDA work, the slowest rank for a job.

A sample runs an arm `inner` times so that it lasts long enough for the clock, with the garbage collector held off. On
several ranks every rank calls the same arms in the same order (the order comes from the seed), all start a sample
together and all get the slowest rank's time, because a job waits for its slowest rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from undertow.benchmarks.case import Arm, Measured
from undertow.dist.collector import no_collection


@dataclass(frozen=True)
class Sample:
    """Seconds per run, and what the arm measured beside the time."""

    seconds: float
    times_itself: bool = False
    extras: tuple[tuple[str, float], ...] = ()


class Timer(Protocol):
    def sample(self, arm: Arm, inner: int) -> Sample: ...


class Peers:
    """The ranks of a job as the harness sees them; alone unless `group` is a torch.distributed group."""

    def __init__(self, group: Any = None) -> None:
        self._group = group

    @property
    def alone(self) -> bool:
        return self._group is None

    def barrier(self) -> None:
        self.largest(0.0)

    def largest(self, value: float) -> float:
        """The largest of all ranks' values, on every rank."""
        if self._group is None:
            return value
        import torch
        import torch.distributed as dist

        cell = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(cell, op=dist.ReduceOp.MAX, group=self._group)
        return float(cell.item())


class HostTimer:
    """Times an arm by the host's clock."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def sample(self, arm: Arm, inner: int) -> Sample:
        if arm.prepare is not None:
            arm.prepare()
        answer = None
        with no_collection():
            start = self._clock()
            for _ in range(inner):
                answer = arm.run()
            seconds = (self._clock() - start) / inner
        return _sample(answer, seconds)


class CudaTimer:
    """Times an arm by events on the current stream. `cuda` is torch.cuda, or a stand-in in tests.

    Before an arm that is to be queued ahead, the stream sleeps until the host is done, twice as long where it was not.
    """

    SLEEP_CYCLES, LONGEST = 20_000_000, 1_000_000_000  # some 10 ms and half a second

    def __init__(self, cuda: Any = None, clock: Callable[[], float] = time.perf_counter) -> None:
        if cuda is None:
            from torch import cuda
        self._cuda, self._clock = cuda, clock
        self._left = 0  # samples in a row that left work behind
        self._cycles = self.SLEEP_CYCLES

    def sample(self, arm: Arm, inner: int) -> Sample:
        if arm.prepare is not None:
            arm.prepare()
        answer = None
        start, stop = self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)
        self._cuda.synchronize()  # the work of the arm before must not run into this arm's time
        with no_collection():
            if arm.ahead:
                self._cuda._sleep(self._cycles)
            start.record()
            for _ in range(inner):
                answer = arm.run()
            stop.record()
            late = arm.ahead and start.query()
            stop.synchronize()
        if late:
            if self._cycles > self.LONGEST:
                raise RuntimeError(f"arm '{arm.name}' waits for the device while it is queued: it is never ahead of it")
            self._cycles *= 2
            return self.sample(arm, inner)
        seconds = start.elapsed_time(stop) / 1e3
        before = self._clock()
        self._cuda.synchronize()  # finds work on other streams that the events did not see
        left_s = self._clock() - before
        self._left = self._left + 1 if left_s > max(0.05 * seconds, 200e-6) else 0
        if self._left == 3:  # once, the host may have been late
            raise RuntimeError(
                f"arm '{arm.name}' left {left_s * 1e3:.2f} ms of work on other streams, which its time of "
                f"{seconds * 1e3:.2f} ms misses; make the current stream wait for them"
            )
        return _sample(answer, seconds / inner)


class SlowestRank:
    """Starts a sample on all ranks together and gives each of them the slowest rank's time."""

    def __init__(self, timer: Timer, peers: Peers) -> None:
        self._timer, self._peers = timer, peers

    def sample(self, arm: Arm, inner: int) -> Sample:
        self._peers.barrier()
        sample = self._timer.sample(arm, inner)
        return Sample(self._peers.largest(sample.seconds), sample.times_itself, sample.extras)


def _sample(answer: Any, seconds: float) -> Sample:
    if not isinstance(answer, Measured):
        return Sample(seconds)
    extras = tuple(answer.extras.items())
    return Sample(seconds, False, extras) if answer.seconds is None else Sample(answer.seconds, True, extras)


def default_timer(arm: Arm, peers: Peers) -> Timer:
    timer = CudaTimer() if arm.device == "cuda" else HostTimer()
    return SlowestRank(timer, peers)
