"""When to save, and where to: the intervals of disk and host memory, and what has been saved already.

Both are asked at every step and told of every save, on all ranks alike (`due`).
"""

from __future__ import annotations

from collections.abc import Sequence

from .coordinate import Coordinator
from .due import Due
from .frequency import Frequency
from .save import SaveReport


class Rhythm:
    """The intervals `every` to disk and `host_every` to the memory tier of that name ('' where there is none).
    `last`: the step that was saved or restored last; `last_on_disk`: that was saved there."""

    def __init__(
        self,
        every: int | Frequency,
        host_every: int | Frequency,
        host_tier: str,
        coordinator: Coordinator,
        *,
        timeout_s: float,
    ) -> None:
        self._disk = Due(every, "disk", coordinator, timeout_s=timeout_s)
        self._host = Due(host_every, host_tier, coordinator, timeout_s=timeout_s)
        self.last: int | None = None
        self.last_on_disk: int | None = None

    def due(self, step: int) -> tuple[bool, bool]:
        """Whether `step` is to be saved to disk, and to host memory. Called once a step."""
        if step == self.last:
            return False, False
        return self._disk.is_due(step), self._host.is_due(step)

    def saved(self, step: int, reports: Sequence[SaveReport], *, disk: bool, host: bool) -> None:
        """A save of `step` to these has begun, or was tried. `reports`: of all that have ended."""
        self.last = step
        if disk:
            self.last_on_disk = step
            self._disk.saved(step, reports)
        if host:
            self._host.saved(step, reports)

    def restored(self, step: int | None) -> None:
        """Training goes on from `step`, or from a state that has no number."""
        self.last, self.last_on_disk = step, None
        for due in (self._disk, self._host):
            due.restored()

    @property
    def intervals(self) -> tuple[int | None, int | None]:
        """In steps, to disk and to host memory; 0: never, None: not known yet."""
        return self._disk.interval, self._host.interval

    @property
    def reasons(self) -> list[str]:
        """Why the intervals that were chosen are what they are, on rank 0."""
        return [due.reason for due in (self._host, self._disk) if due.reason]
