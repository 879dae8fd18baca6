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
from enum import Enum, IntEnum

from .clock import Clock
from .hardware import Hardware


class Policy(Enum):
    FREE = "free"
    SHARED = "shared"
    MCA = "mca"


class Stream(IntEnum):
    COMPUTE = 0
    COMMUNICATION = 1


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
        self._contended = (self._bandwidth * (1 - share), self._bandwidth * share / hw.interference)
        if policy is Policy.FREE:
            self._contended = (self._bandwidth, self._bandwidth)
        self._queues: tuple[deque[_Request], deque[_Request]] = (deque(), deque())  # indexed by Stream
        self._seen_s = 0.0
        self._plan = 0

    def submit(self, stream: Stream, kind: str, nbytes: float, done: Callable[[], None], *, cost: float = 1.0) -> None:
        """Queue `nbytes`, which take `cost` times their DRAM time; `done` is called when they have been served."""
        self._advance()
        self._queues[stream].append(_Request(kind, nbytes, nbytes * cost, done))
        self._schedule()

    def _rates(self) -> tuple[float, float]:
        compute, communication = self._queues
        if compute and communication:
            return self._contended
        return (self._bandwidth if compute else 0.0, self._bandwidth if communication else 0.0)

    def _advance(self) -> None:
        """Serve the heads of the queues up to now, at the rates since the last change."""
        passed_s, self._seen_s = self.clock.now_s - self._seen_s, self.clock.now_s
        for queue, rate in zip(self._queues, self._rates()):
            if queue:
                queue[0].left -= rate * passed_s

    def _schedule(self) -> None:
        """Plan the next completion; an earlier plan is void."""
        self._plan += 1
        plan, due_s, first = self._plan, float("inf"), Stream.COMPUTE
        for stream, queue, rate in zip(Stream, self._queues, self._rates()):
            if queue:
                head = queue[0]
                if head.begun_s is None:
                    head.begun_s = self.clock.now_s
                needed_s = max(head.left, 0.0) / rate
                if needed_s < due_s:
                    due_s, first = needed_s, stream
        if due_s < float("inf"):
            self.clock.after(due_s, lambda: self._complete(first) if plan == self._plan else None)

    def _complete(self, due: Stream) -> None:
        """End the request that is due, and any that ends at this moment but for rounding."""
        self._advance()
        finished = []
        for stream, queue in zip(Stream, self._queues):
            if queue and (stream is due or queue[0].left <= 1e-3):
                finished.append(queue.popleft())
        self._schedule()
        for request in finished:
            self.served_bytes[request.kind] += request.nbytes
            if self.trace is not None and request.begun_s is not None:
                self.trace.append((request.kind, request.begun_s, self.clock.now_s, request.nbytes))
            request.done()
