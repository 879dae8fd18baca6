"""How `undertow probe` takes one number: a `Measurement` names it, `median_s` times it.

A time is the median over repeats, each long enough for the clock. CUDA work is timed by events on its own stream; the
synchronisation before each repeat and after it belongs to measuring alone.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .machine import Link


class Skipped(Exception):
    """This number cannot be measured here; the message says why, and the probe goes on."""


@dataclass(frozen=True)
class Measurement:
    """One number to take: where it goes in the `Machine` (`table`, `key`) and how. `run` may raise `Skipped`."""

    table: str
    key: str
    run: Callable[[], float | Link]


@dataclass(frozen=True)
class Effort:
    """How hard to try: `repeats` per number, each at least `least_s` long."""

    repeats: int
    least_s: float

    @classmethod
    def of(cls, quick: bool) -> Effort:
        return cls(3, 0.02) if quick else cls(7, 0.1)


def median_s(run: Callable[[], object], effort: Effort, device: torch.device | None = None) -> float:
    """Median seconds of one `run()`. Runs once first to warm up, and once more to find how many make a repeat."""
    cuda = device is not None and device.type == "cuda"
    timed = _cuda_s if cuda else _host_s
    timed(run, 1)
    inner = max(1, math.ceil(effort.least_s / max(timed(run, 1), 1e-9)))
    return statistics.median(timed(run, inner) / inner for _ in range(effort.repeats))


def _host_s(run: Callable[[], object], inner: int) -> float:
    start_s = time.perf_counter()
    for _ in range(inner):
        run()
    return time.perf_counter() - start_s


def _cuda_s(run: Callable[[], object], inner: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()  # nothing else may be in flight
    start.record()
    for _ in range(inner):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
