"""Counts the tiles of a product as they are finished; whoever waits for a piece is let go when its last tile is there.

Counts only grow: call e of a plan is finished with a piece when its count reaches e × tiles. Nothing is ever reset, so
there is no moment at which a late reader could see a counter of the wrong call (T3's tracker resets its table entries;
on a GPU, where the reader is a copy engine, a reset would be a race). An error poisons the tracker: nobody waits for
tiles that will never come.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from typing import Any

from ..dist.errors import UndertowError


class TrackerStopped(UndertowError):
    """The producer or the sender has failed; `__cause__` is the first error."""


class Tracker:
    """Counters by key, `need[key]` tiles per epoch. Every method may be called from any thread."""

    def __init__(self, need: Mapping[Any, int]) -> None:
        self._need = dict(need)
        self._count = dict.fromkeys(self._need, 0)
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self.epoch = 0

    def begin(self) -> int:
        """Start the next call; its epoch, from 1."""
        with self._changed:
            self.epoch += 1
            return self.epoch

    def bump(self, key: Hashable, tiles: int = 1) -> None:
        """`tiles` more tiles of the piece are finished."""
        with self._changed:
            self._count[key] += tiles
            self._changed.notify_all()

    def done(self, key: Hashable, epoch: int) -> bool:
        return self._count[key] >= epoch * self._need[key]

    def wait(self, key: Hashable, epoch: int, timeout_s: float | None = None) -> None:
        """Until the piece of call `epoch` is finished. Raises `TrackerStopped` after `fail`, or when time is up."""
        with self._changed:
            came = self._changed.wait_for(lambda: self._error is not None or self.done(key, epoch), timeout_s)
            if self._error is not None:
                raise TrackerStopped(f"{key} will not be finished: {self._error}") from self._error
            if not came:
                raise TrackerStopped(
                    f"{key}: {self._count[key] - (epoch - 1) * self._need[key]} of {self._need[key]} tiles "
                    f"after {timeout_s:g} s"
                )

    def fail(self, error: BaseException) -> None:
        """Let everyone who waits go with this error; the first one is kept."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
