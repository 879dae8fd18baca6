"""Which steps are due: a fixed number of steps apart, or as often as `Frequency` says from what was measured.

All ranks must save the same steps, and only rank 0's clock counts: at each save, which all ranks begin in the same
step, it says when the next one is due, and the others read that; where one waits for it in vain, all keep the interval.
Where every step is due, that is asked at the first 16 saves and then at every 16th.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

from ..dist.errors import PeerLost
from ..dist.log import get_logger
from .coordinate import Coordinator
from .frequency import Frequency
from .save import SaveReport

log = get_logger(__name__)
ASKED = 16
RECENT = 8  # saves whose cost counts


class Due:
    """Answers `is_due` for every step, and is told of each save by `saved`. `every` 0: never. `tier`: whose reports
    tell what a save costs."""

    def __init__(self, every: int | Frequency, tier: str, coordinator: Coordinator, *, timeout_s: float) -> None:
        self._every = every if isinstance(every, Frequency) else int(every)
        self._tier, self._coordinator, self._timeout_s = tier, coordinator, timeout_s
        self._next: int | None = None
        self._saves = 0
        self._last: tuple[int, float] | None = None
        self._step_s: deque[float] = deque(maxlen=64)
        self.reason = ""  # why this interval, on rank 0
        self.interval: int | None = self._every if isinstance(self._every, int) else None

    def is_due(self, step: int) -> bool:
        """Called once a step, on every rank."""
        if isinstance(self._every, int):
            return self._every > 0 and step % self._every == 0
        now_s = time.monotonic()
        if self._last is not None and step == self._last[0] + 1:
            self._step_s.append(now_s - self._last[1])
        self._last = (step, now_s)
        if self._next is None:
            self._next = step + (self.interval or self._every.first)
        return step >= self._next

    def restored(self) -> None:
        """Training goes on elsewhere, on all ranks: when the next save is due is counted from the next step on."""
        self._next = self._last = None

    def saved(self, step: int, reports: Sequence[SaveReport]) -> None:
        """A save of `step` has begun; `reports` of those that have ended. Collective with `Frequency`."""
        if isinstance(self._every, int):
            return
        self._saves += 1
        if self.interval == 1 and self._saves > ASKED and self._saves % ASKED:
            self._next = step + 1
            return
        name = f"due/{self._tier}/{self._saves}"
        before = self.interval or self._every.first
        mine = before
        if self._coordinator.rank == 0:
            mine = self._choose(self._every, list(islice(self._fine(reports), RECENT)))
        try:
            self.interval = self._coordinator.lead(name, mine, otherwise=before, timeout_s=self._timeout_s)
        except PeerLost as error:  # the saves will fail, each reported; training ends when its own collectives do
            log.warning("saving every %d steps as before: %s", before, error)
            self.interval = before
        self._next = step + (self.interval or before)

    def _fine(self, reports: Sequence[SaveReport]) -> Iterator[SaveReport]:
        """Those of this tier that were committed, newest first: a long run has many."""
        return (report for report in reversed(reports) if report.ok and report.tier == self._tier)

    def _choose(self, policy: Frequency, ended: Sequence[SaveReport]) -> int:
        if not ended or not self._step_s:  # nothing measured yet
            return policy.first
        measured = {
            "stall_s": statistics.median(max(r.call_s + r.fence_s, r.slowdown_s or 0.0) for r in ended),
            "commit_s": statistics.median(r.commit_s for r in ended),
            "step_s": statistics.median(self._step_s),
        }
        self.reason = f"{self._tier}: {policy.explain(**measured)}"
        return policy.steps(**measured)
