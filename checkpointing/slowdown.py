"""How much longer the steps take while a save is under way: the stall of the guide's definition, as training goes on.

Call and fence are what a save blocks outright; copies and files also slow the steps that they run beside. So the time
from `step` to `step` is compared with the median of the steps in which nothing was under way. A run that saves at every
step has no such steps, and then there is nothing to compare with; `undertow bench checkpoint_stall` has.
"""

from __future__ import annotations

import statistics
import time
from collections import deque

LEAST = 3  # quiet steps that make a median


class StepClock:
    """For one training thread. `tick` at every step, `began` and `ended` around each save."""

    def __init__(self) -> None:
        self._quiet: deque[float] = deque(maxlen=64)
        self._last: tuple[int, float] | None = None
        self._open: dict[int, tuple[int, float | None]] = {}  # step → (tiers still to end, seconds more than quiet)

    def tick(self, step: int, now_s: float | None = None) -> None:
        """`step` begins; the step before it has ended."""
        now_s = time.monotonic() if now_s is None else now_s
        if self._last is not None and step == self._last[0] + 1:
            self._account(now_s - self._last[1])
        self._last = (step, now_s)

    def _account(self, seconds: float) -> None:
        if not self._open:
            self._quiet.append(seconds)
            return
        known = len(self._quiet) >= LEAST
        more_s = seconds - statistics.median(self._quiet) if known else None
        for step, (tiers, total_s) in self._open.items():
            self._open[step] = tiers, None if more_s is None or total_s is None else total_s + more_s

    def began(self, step: int, tiers: int) -> None:
        """A save of `step` into that many tiers has begun, in the step that has just begun."""
        self._open[step] = tiers, 0.0

    def ended(self, step: int) -> float | None:
        """One tier of the save has ended: by how many seconds the steps beside it were longer in all; None: unknown."""
        tiers, total_s = self._open.pop(step, (0, None))
        if tiers > 1:
            self._open[step] = tiers - 1, total_s
        return total_s
