"""Events of calls that only queue work on a GPU: made once, and used again when their call is over.

To make an event, and to enter a stream's context, takes the host longer than to queue a copy, and a GPU waits for the
host where pieces are short. A stream that waits for an event waits for what was recorded when the wait was queued, so
recording it again is harmless for streams. It is not for who asks an event whether its work is done (`cuda_watch`):
that is why a call keeps its events until its last one has happened, and numbers its turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Call:
    """The events of one call after the other; `turn` counts the calls."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.turn = 0
        self._make, self._events, self._used = make, list[Any](), 0

    def event(self, stream: Any) -> Any:
        """The next event of this call, recorded on `stream`."""
        if self._used == len(self._events):
            self._events.append(self._make())
        event = self._events[self._used]
        self._used += 1
        event.record(stream)
        return event

    def over(self) -> bool:
        """Whether the event that was recorded last has happened."""
        return not self._used or self._events[self._used - 1].query()

    def again(self) -> None:
        """For the next call; nobody may ask for the events of the last one any more."""
        self.turn += 1
        self._used = 0


class Events:
    """Of the calls of one engine: as many sets as there are calls on their way at once."""

    def __init__(self, make: Callable[[], Any] = torch.cuda.Event) -> None:
        self._make = make
        self._calls: deque[Call] = deque()

    def begin(self) -> Call:
        """Events for a call."""
        if self._calls and self._calls[0].over():
            call = self._calls.popleft()
            call.again()
            return call
        return Call(self._make)

    def end(self, call: Call, stream: Any) -> None:
        """`stream` waits for all that the call has queued. A call that failed is not ended, and its events are left."""
        call.event(stream)
        self._calls.append(call)


class Run(NamedTuple):
    """One call: its events, the caller's stream, and whether a CUDA graph is being captured."""

    call: Call
    current: Any
    capturing: bool
