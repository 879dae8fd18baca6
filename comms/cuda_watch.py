"""Names the piece that does not come: on a GPU the host only queues work, so nobody waits who could say for what.

A thread looks at the oldest exchange that is not complete. When that has been the same one for `timeout_s`, it is
logged, by rank and piece, and the next call raises it; NCCL's own time-out, which names neither, ends the process then.
A transport without one gets the same end from here: the host may stand in a synchronization that never returns.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..dist.errors import PeerLost
from ..dist.log import get_logger
from .cuda_events import Call

log = get_logger(__name__)


class Exchange(NamedTuple):
    """Of one piece each way; it is named only when it does not come."""

    rank: int
    what: str
    part: int
    to: int | None
    source: int | None

    def __str__(self) -> str:
        ends = [f"to rank {self.to}"] if self.to is not None else []
        ends += [f"from rank {self.source}"] if self.source is not None else []
        return f"rank {self.rank}: {self.what}, part {self.part} of a chunk, {' and '.join(ends)}"


class _Expected(NamedTuple):
    what: object  # a name is made of it when it is needed
    events: Sequence[Any]
    call: Call | None
    turn: int

    def complete(self) -> bool:
        return self._over() or all(event.query() for event in self.events) or self._over()

    def _over(self) -> bool:
        """Asked before and after the events, which may be recorded again in between."""
        return self.call is not None and self.call.turn != self.turn


class Watch:
    """Exchanges of one engine in the order of their queueing.

    `end_s`: seconds after which an exchange that is missing still ends the process; None: the transport sees to that.
    `enter`: what its thread does first. `now`: a clock in seconds, `end`: the abort, for tests.
    """

    def __init__(
        self,
        timeout_s: float,
        now: Callable[[], float] = time.monotonic,
        *,
        end_s: float | None = None,
        end: Callable[[], None] = os.abort,
        enter: Callable[[], None] = lambda: None,
    ) -> None:
        self._timeout_s, self._now, self._end_s, self._end, self._enter = timeout_s, now, end_s, end, enter
        self._pending: deque[_Expected] = deque()
        self._since_s = now()
        self._error: PeerLost | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def expect(self, what: object, events: Sequence[Any], call: Call | None = None) -> None:
        """`events` complete the exchange that `str(what)` names. Raises `PeerLost` when an earlier one is overdue.

        `call`: whose events they are; they are over when that has its next turn.
        """
        if self._error is not None:
            raise self._error
        if not events:
            return
        if not self._pending:
            self._since_s = self._now()
        self._pending.append(_Expected(what, events, call, 0 if call is None else call.turn))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="undertow-overlap-watch", daemon=True)
            self._thread.start()

    def look(self) -> None:
        """Forget what is complete; report the oldest one when it is overdue."""
        while self._pending and self._pending[0].complete():
            self._pending.popleft()
            self._since_s = self._now()
        if self._pending and self._error is None and self._now() - self._since_s > self._timeout_s:
            self._error = PeerLost(f"{self._pending[0].what}: not complete after {self._timeout_s:g} s")
            log.error("%s", self._error)
        if self._pending and self._end_s is not None and self._now() - self._since_s > self._end_s:
            log.critical("%s: not complete after %g s; this process ends", self._pending[0].what, self._end_s)
            self._end()

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        self._enter()
        while not self._closed.wait(min(1.0, self._timeout_s / 4)):
            self.look()
