"""What becomes of every save that has ended: kept, counted, logged, and told to whoever watches.

Only the training thread calls this, between two steps. An observer that raises is dropped: watching must never cost a
training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from ..dist.log import get_logger
from .attempt import Attempt
from .observe import Observer
from .save import SaveReport
from .slowdown import StepClock

log = get_logger(__name__)
LOGGED = 1000  # characters of a reason, in which every rank of a large job may have its say; the report has all
KEPT = 10_000  # reports at least, the newest: a run that saves every step would fill its memory with them


def dropped(attempt: Attempt, tiers: Sequence[str], reason: str) -> list[SaveReport]:
    """The reports of a save that ended, for these of its tiers, before it began to copy anything."""
    call_s = time.monotonic() - attempt.began_s
    return [SaveReport(attempt.step, tier, False, reason, 0, call_s, 0.0, 0.0, call_s) for tier in tiers]


class Reports:
    """The `ended` saves, oldest first, the last `KEPT` of them and more, and how many in all were `failures`.
    `peak_bytes` asks the arena."""

    def __init__(self, observers: Sequence[Observer], clock: StepClock, peak_bytes: Callable[[], int]) -> None:
        self.ended: list[SaveReport] = []
        self.failures = 0
        self._observers, self._clock, self._peak_bytes = list(observers), clock, peak_bytes

    def take(self, ended: Iterable[SaveReport]) -> None:
        """Add those that have ended since. Of one that failed its ranks hear once, if it failed alike in all tiers."""
        lost: dict[tuple[int, str], list[str]] = {}
        for bare in ended:
            report = replace(bare, slowdown_s=self._clock.ended(bare.step))
            self.ended.append(report)
            if len(self.ended) > 2 * KEPT:
                del self.ended[:KEPT]
            self._tell(report)
            if report.ok:
                log.debug("%s", report)
            else:
                self.failures += 1
                if not report.heard:
                    lost.setdefault((report.step, report.reason), []).append(report.tier)
        for (step, reason), tiers in lost.items():
            text = reason if len(reason) <= LOGGED else f"{reason[:LOGGED]} …"
            log.warning("step %d is not saved to %s: %s", step, " and ".join(tiers), text)

    def _tell(self, report: SaveReport) -> None:
        for observer in list(self._observers):
            try:
                observer(report, self._peak_bytes())
            except Exception as error:
                log.warning("%s failed and watches no more (%s: %s)", observer, type(error).__name__, error)
                self._observers.remove(observer)
