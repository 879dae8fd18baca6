"""The ping-pong between two ranks, for any transport that can send and receive a message.

One message of n bytes there and back; half the round trip is the time of one way, the median over trips counts. The
number of trips is a function of the size alone, so that the two sides need not talk about it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

_FULL_SIZES = tuple(8 * 8**i for i in range(8)) + (64 << 20,)  # 8 B, 64 B, … 16 MiB, 64 MiB
_QUICK_SIZES = (8, 4096, 64 << 10, 1 << 20, 8 << 20)
_FAST_SIZE = 256 << 20  # between devices 8 MiB pass within the latency, and would tell nothing of the rate


class Wire(Protocol):
    """One side of a transport. All calls block until the data is usable; a message is of the wire's own kind."""

    def message(self, nbytes: int) -> Any: ...

    def send(self, message: Any) -> None: ...

    def receive(self, message: Any) -> None: ...

    def both(self, outgoing: Any, incoming: Any) -> None: ...


def sizes(quick: bool, fast: bool = False) -> tuple[int, ...]:
    """Bytes of the messages, ascending; `fast` for links of tens of GB/s and more."""
    return (_QUICK_SIZES if quick else _FULL_SIZES) + ((_FAST_SIZE,) if fast else ())


def trips(nbytes: int, quick: bool) -> int:
    full = 200 if nbytes <= 64 << 10 else 40 if nbytes <= 1 << 20 else 10
    return max(5, full // 4) if quick else full


def play(wire: Wire, first: bool, quick: bool, fast: bool = False) -> Iterator[tuple[int, float]]:
    """Yield (bytes, median seconds of one way) for each size; both sides iterate, `first` begins."""
    for nbytes in sizes(quick, fast):
        message = wire.message(nbytes)
        times = [_trip_s(wire, message, first) for _ in range(trips(nbytes, quick) + 2)]
        yield nbytes, statistics.median(times[2:]) / 2


def both_ways(wire: Wire, quick: bool, fast: bool = False) -> tuple[int, float]:
    """(bytes, median seconds) when the largest message travels in both directions at once."""
    nbytes = sizes(quick, fast)[-1]
    outgoing, incoming = wire.message(nbytes), wire.message(nbytes)
    times = [_s(lambda: wire.both(outgoing, incoming)) for _ in range(trips(nbytes, quick) + 2)]
    return nbytes, statistics.median(times[2:])


def is_duplex(one_way_s: float, both_s: float) -> bool:
    """Whether both directions ran at once: one after the other would take 2, and half-way to it is the border."""
    return both_s < 1.5 * one_way_s


def _trip_s(wire: Wire, message: Any, first: bool) -> float:
    def trip() -> None:
        if first:
            wire.send(message)
            wire.receive(message)
        else:
            wire.receive(message)
            wire.send(message)

    return _s(trip)


def _s(run: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s
