"""Ctrl-C, or a time limit's SIGTERM, ends a benchmark after the round at hand: hours of samples are not to be lost."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """A context in which the first of `SIGNALS` only sets `signal`; the second one does what it did before."""

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python sets no handlers
            self._before = {each: signal.signal(each, self._came) for each in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)  # type: ignore[arg-type]
        self._before = {}

    def _came(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        name = signal.Signals(number).name
        print(f"undertow: {name}: ends after this round, and writes what was measured; again: at once", file=sys.stderr)
