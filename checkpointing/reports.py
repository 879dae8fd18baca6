"""What becomes of every save that has ended: kept, counted, logged, and told to whoever watches.

Only the training thread calls this, between two steps. An observer that raises is dropped: watching must never cost a
training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from ..dist.log import get_logger
from .observe import Observer
from .save import SaveReport
from .slowdown import StepClock

log = get_logger(__name__)


def dropped(step: int, tier: str, error: Exception, *, call_s: float) -> SaveReport:
    """The report of a save that ended before it began to copy anything."""
    return SaveReport(step, tier, False, str(error), 0, call_s, 0.0, 0.0, call_s)


class Reports:
    """The `ended` saves, oldest first, and how many of them were `failures`. `peak_bytes` asks the arena."""

    def __init__(self, observers: Sequence[Observer], clock: StepClock, peak_bytes: Callable[[], int]) -> None:
        self.ended: list[SaveReport] = []
        self.failures = 0
        self._observers, self._clock, self._peak_bytes = list(observers), clock, peak_bytes

    def take(self, ended: Iterable[SaveReport]) -> None:
        """Add those that have ended since."""
        for bare in ended:
            report = replace(bare, slowdown_s=self._clock.ended(bare.step))
            self.ended.append(report)
            self._tell(report)
            if report.ok:
                log.debug("%s", report)
            else:
                self.failures += 1
                log.warning("checkpoint of step %d failed and was dropped: %s", report.step, report.reason)

    def _tell(self, report: SaveReport) -> None:
        for observer in list(self._observers):
            try:
                observer(report, self._peak_bytes())
            except Exception as error:
                log.warning("%s failed and watches no more (%s: %s)", observer, type(error).__name__, error)
                self._observers.remove(observer)
