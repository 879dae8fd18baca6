"""Simulated time: events in order of time, and of their making where times are equal, so that every run is the same."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Clock:
    """`now_s` moves only in `run`, from one event to the next."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._made = 0

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Call `action` in `delay_s` ≥ 0 seconds of simulated time."""
        self._made += 1
        heapq.heappush(self._events, (self.now_s + delay_s, self._made, action))

    def run(self) -> None:
        """Until no event is left."""
        while self._events:
            self.now_s, _, action = heapq.heappop(self._events)
            action()
