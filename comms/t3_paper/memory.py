"""DRAM as a server of bandwidth for two streams, and how it arbitrates between them (paper section 4.5, figure 17).

The compute stream carries the GEMM's loads and stores, the communication stream the DMA's reads and the incoming
updates; each is served in order. Alone, a stream has the whole bandwidth. When both wait, the *shared* policy gives
each its share of DRAM time, while MCA serves compute first and leaves communication the small share of its starvation
limit. Mixing costs bandwidth too (row conflicts, turnarounds, op-and-store): a byte of communication served while GEMM
traffic waits takes `interference` times its DRAM time. The policy *free* gives both the whole bandwidth at once: no
hardware does, and it is there to be compared with the closed form.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from .clock import Clock
from .hardware import Hardware


class Policy(Enum):
    FREE = "free"
    SHARED = "shared"
    MCA = "mca"


class Stream(Enum):
    COMPUTE = "compute"
    COMMUNICATION = "communication"


@dataclass
class _Request:
    kind: str
    nbytes: float
    left: float  # DRAM work still to do, in bytes at full bandwidth
    done: Callable[[], None]
    begun_s: float | None = None


class Memory:
    """The DRAM of one GPU. `served_bytes` counts by kind; `trace` holds (kind, begin, end, bytes) when asked for."""

    def __init__(self, clock: Clock, hw: Hardware, policy: Policy, *, traced: bool = False) -> None:
        self.clock, self.policy = clock, policy
        self.served_bytes: defaultdict[str, float] = defaultdict(float)
        self.trace: list[tuple[str, float, float, float]] | None = [] if traced else None
        self._bandwidth = hw.dram_bytes_per_s
        share = hw.mca_share if policy is Policy.MCA else hw.unarbitrated_share
        self._contended = {
            Stream.COMPUTE: self._bandwidth * (1 - share),
            Stream.COMMUNICATION: self._bandwidth * share / hw.interference,
        }
        self._queues: dict[Stream, deque[_Request]] = {stream: deque() for stream in Stream}
        self._seen_s = 0.0
        self._plan = 0

    def submit(self, stream: Stream, kind: str, nbytes: float, done: Callable[[], None], *, cost: float = 1.0) -> None:
        """Queue `nbytes`, which take `cost` times their DRAM time; `done` is called when they have been served."""
        self._advance()
        self._queues[stream].append(_Request(kind, nbytes, nbytes * cost, done))
        self._schedule()

    def _rates(self) -> dict[Stream, float]:
        active = [stream for stream in Stream if self._queues[stream]]
        if len(active) < 2 or self.policy is Policy.FREE:
            return dict.fromkeys(active, self._bandwidth)
        return self._contended

    def _advance(self) -> None:
        """Serve the heads of the queues up to now, at the rates since the last change."""
        passed_s, self._seen_s = self.clock.now_s - self._seen_s, self.clock.now_s
        for stream, rate in self._rates().items():
            self._queues[stream][0].left -= rate * passed_s

    def _schedule(self) -> None:
        """Plan the next completion; an earlier plan is void."""
        self._plan += 1
        plan = self._plan
        rates = self._rates()
        for stream in rates:
            head = self._queues[stream][0]
            head.begun_s = self.clock.now_s if head.begun_s is None else head.begun_s
        if rates:
            due_s, first = min((max(self._queues[s][0].left, 0.0) / rate, s.value) for s, rate in rates.items())
            self.clock.after(due_s, lambda: self._complete(Stream(first)) if plan == self._plan else None)

    def _complete(self, due: Stream) -> None:
        """End the request that is due, and any that ends at this moment but for rounding."""
        self._advance()
        finished = []
        for stream, queue in self._queues.items():
            if queue and (stream is due or queue[0].left <= 1e-3):
                finished.append(queue.popleft())
        self._schedule()
        for request in finished:
            self.served_bytes[request.kind] += request.nbytes
            if self.trace is not None and request.begun_s is not None:
                self.trace.append((request.kind, request.begun_s, self.clock.now_s, request.nbytes))
            request.done()
