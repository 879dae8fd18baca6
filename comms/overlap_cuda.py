"""Products whose pieces leave or arrive while a GPU makes others: cuBLAS on row chunks, events, and a messenger.

The same plans and patterns as `comms.overlap_engine`, without its threads: the host only queues work. A piece's event
is its tracker: a stream that waits for it sends what is finished, and the product never waits. Pieces alternate between
two streams, so that the last wave of one, which leaves processors idle, is filled by the first of the next (torch's
async tensor parallelism does the same). What a caller gets is ordered behind its current stream. Nothing spins on a
processor, and no stream waits for an event that is not queued before it, so one hardware queue
(CUDA_DEVICE_MAX_CONNECTIONS=1) costs overlap, but cannot deadlock; nor can CUDA_LAUNCH_BLOCKING.

Without overlap, NCCL's own collective follows the product: what a script does, at its speed, rounded as NCCL rounds.

A reduce-scatter or all-reduce may instead get a `tracked` product: one kernel, queued before all that waits for it,
which counts its finished tiles, and streams that wait for the counts (`stream_wait`). While a CUDA graph is captured
the events are used: a captured count would be true at every replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..dist.errors import UserError
from .chunk_plan import ChunkPlan, Piece
from .cuda_messengers import CudaMessenger, NcclMessenger, Rows
from .cuda_watch import Watch
from .overlap_engine import Product, add_in_order
from .stream_wait import Counted

# Queue the whole product, the given rows first to last, on the current stream, and have it add 1 to counters[i] as each
# tile of the i-th is in memory; returns their numbers of tiles.
Tracked = Callable[[Sequence[tuple[int, int]], torch.Tensor], Sequence[int]]
END = 1.5  # of the time-out: when a rank that waits for a lost one ends
_KEPT = 64  # plans whose counters are kept


@dataclass
class _Counters:
    """Of one plan: how far every piece has come on the device, and how far it must come. They only grow."""

    counts: torch.Tensor
    need: list[int]


class CudaOverlapEngine:
    """The ranks of `group` that multiply together, over NCCL, or over `messenger`. Use from one thread.

    All tensors are on `device`. Calls are queued, not waited for; a piece that has not come after `timeout_s` is named
    in the log, and by `PeerLost` from the next call; half as long again after that the process ends, as by NCCL.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device,
        timeout_s: float = 300.0,
        messenger: CudaMessenger | None = None,
    ) -> None:
        self.messenger = messenger or NcclMessenger(group, device, END * timeout_s)
        self.rank, self.world, self.device = self.messenger.rank, self.messenger.world, device
        self._streams = [torch.cuda.Stream(device) for _ in range(2)]
        self._watch = Watch(timeout_s, end_s=None if self.messenger.capturable else END * timeout_s)
        self._counters: dict[ChunkPlan, _Counters] = {}

    def plan(self, sizes: tuple[int, ...], subchunks: int = 1) -> ChunkPlan:
        return ChunkPlan(self.rank, sizes, subchunks)

    def reduce_scatter(
        self,
        plan: ChunkPlan,
        product: Product,
        y_MN: torch.Tensor,
        *,
        overlap: bool = True,
        tracked: Tracked | None = None,
    ) -> torch.Tensor:
        """As `OverlapEngine.reduce_scatter`; by `tracked`, which must make the same `y`, where it is given."""
        out = y_MN.new_empty(plan.own[1] - plan.own[0], y_MN.shape[1])
        if self._collectively(plan, overlap, y_MN):
            product(0, plan.rows)
            if len(set(plan.sizes)) == 1:
                dist.reduce_scatter_tensor(out, y_MN, group=self.messenger.group)
            else:
                dist.reduce_scatter(out, list(y_MN.split(plan.sizes)), group=self.messenger.group)
            return out
        return self._scatter(plan, product, y_MN, out, overlap, tracked)

    def all_reduce(
        self,
        plan: ChunkPlan,
        product: Product,
        y_MN: torch.Tensor,
        *,
        overlap: bool = True,
        tracked: Tracked | None = None,
    ) -> torch.Tensor:
        """As `OverlapEngine.all_reduce`; by `tracked`, which must make the same `y`, where it is given."""
        if self._collectively(plan, overlap, y_MN):
            product(0, plan.rows)
            dist.all_reduce(y_MN, group=self.messenger.group)
            return y_MN
        whole = torch.empty_like(y_MN)
        self._scatter(plan, product, y_MN, whole[slice(*plan.own)], overlap, tracked)
        summed = self._current().record_event()
        events: list[Any] = []
        for part in range(plan.subchunks):
            for step in range(1, self.world):
                events += self._exchange("sum", summed, *self._spread(plan, whole, step, part), part, pull=True)
        self._wait(events)
        return whole

    def all_gather(
        self, plan: ChunkPlan, shard: torch.Tensor, whole: torch.Tensor, use: Product, *, overlap: bool = True
    ) -> None:
        """As `OverlapEngine.all_gather`."""
        if self._collectively(plan, overlap, whole):
            if len(set(plan.sizes)) == 1:
                dist.all_gather_into_tensor(whole, shard, group=self.messenger.group)
            else:
                dist.all_gather(list(whole.split(plan.sizes)), shard, group=self.messenger.group)
            use(0, plan.rows)
            return
        whole[slice(*plan.own)].copy_(shard)
        start, arrived = self._current().record_event(), dict[Piece, list[Any]]()
        order, own = plan.gather_order, len(plan.chunk(self.rank))
        for step in range(1, self.world):
            source = (self.rank + step) % self.world
            for part in range(plan.subchunks):
                events = self._exchange("rows", start, *self._spread(plan, whole, step, part), part, pull=True)
                arrived |= {piece: events for piece in plan.chunk(source)[part : part + 1]}
            if step == 1 and overlap:  # the own rows have left
                for at, piece in enumerate(order[:own]):
                    self._make(at, start, use, piece, [])
        if not overlap or self.world == 1:
            self._wait([event for events in arrived.values() for event in events])
            use(0, plan.rows)
            return
        for at, piece in enumerate(order[own:], own):
            self._make(at, start, use, piece, arrived[piece])
        self._join()
        self._wait([event for events in arrived.values() for event in events])

    def close(self) -> None:
        """Collective."""
        self._watch.close()
        self.messenger.close()

    def _scatter(
        self,
        plan: ChunkPlan,
        product: Product,
        y: torch.Tensor,
        out: torch.Tensor,
        overlap: bool,
        tracked: Tracked | None,
    ) -> torch.Tensor:
        current, base = self._current(), plan.own[0]
        peers = [peer for peer in range(self.world) if peer != self.rank]
        staged = {peer: self.messenger.landing(peer, out) for peer in peers}
        if not overlap:
            product(0, plan.rows)
        start = current.record_event()
        counted: dict[Piece, Counted] = {}
        if overlap and tracked is not None and not self._capturing():
            counted = self._count(plan, tracked, start)
        arrived: dict[Piece, list[Any]] = {piece: [] for piece in plan.chunk(self.rank)}
        leaving: list[Any] = []
        at = 0
        for step in range(1, self.world):
            owner, source = (self.rank + step) % self.world, (self.rank - step) % self.world
            for part in range(plan.subchunks):
                sends: Rows = []
                made: Any = start
                for piece in plan.chunk(owner)[part : part + 1]:
                    if counted:
                        made = counted[piece]
                    elif overlap:
                        made, at = self._make(at, start, product, piece, []), at + 1
                    sends = _numbers(y[piece.low : piece.high], owner)
                receives: Rows = []
                for piece in plan.chunk(self.rank)[part : part + 1]:
                    receives = _numbers(staged[source][piece.low - base : piece.high - base], source)
                events = self._exchange("partial sums", made, sends, receives, part)
                leaving += events
                for piece in plan.chunk(self.rank)[part : part + 1]:
                    arrived[piece] += events
        for piece in plan.chunk(self.rank) if overlap and not counted else ():
            self._make(at, start, product, piece, [])
            at += 1
        self._join()
        for piece, events in arrived.items():
            self._wait(events)
            here = slice(piece.low - base, piece.high - base)
            parts = [y[piece.low : piece.high] if p == self.rank else staged[p][here] for p in range(self.world)]
            add_in_order(parts, out[here])
        self.messenger.finish(current)
        self._wait(leaving)  # before the caller may free or change y
        return out

    def _spread(self, plan: ChunkPlan, whole: torch.Tensor, step: int, part: int) -> tuple[Rows, Rows]:
        """One part of the own chunk to the rank `step` before this one, one of the rank `step` after it from there."""
        to, source = (self.rank - step) % self.world, (self.rank + step) % self.world
        sends, receives = plan.chunk(self.rank)[part : part + 1], plan.chunk(source)[part : part + 1]
        return (
            [each for piece in sends for each in _numbers(whole[piece.low : piece.high], to)],
            [each for piece in receives for each in _numbers(whole[piece.low : piece.high], source)],
        )

    def _count(self, plan: ChunkPlan, tracked: Tracked, start: Any) -> dict[Piece, Counted]:
        """Queue the whole product; what each piece's reader must wait for."""
        order = plan.scatter_order
        held = self._counters.pop(plan, None)  # kept only if the product could be queued: else nobody knows its counts
        if held is None:
            held = _Counters(torch.zeros(len(order), dtype=torch.int32, device=self.device), [0] * len(order))
            start = self._current().record_event()
        tiles = tracked([(piece.low, piece.high) for piece in order], held.counts)
        held.need = [before + new for before, new in zip(held.need, tiles)]
        self._counters[plan] = held
        if len(self._counters) > _KEPT:
            del self._counters[next(iter(self._counters))]
        return {piece: Counted(start, held.counts, at, held.need[at]) for at, piece in enumerate(order)}

    def _exchange(
        self, what: str, after: Any, sends: Rows, receives: Rows, part: int, *, pull: bool = False
    ) -> list[Any]:
        events = self.messenger.exchange(after, sends, receives, pull=pull)
        if events and not self._capturing():
            ends = [f"to rank {to}" for _, to in sends] + [f"from rank {source}" for _, source in receives]
            self._watch.expect(f"rank {self.rank}: {what}, part {part} of a chunk, {' and '.join(ends)}", events)
        return events

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _make(self, at: int, start: Any, product: Product, piece: Piece, needed: list[Any]) -> Any:
        """Queue the `at`-th piece; the event behind which it is made."""
        stream = self._streams[at % len(self._streams)]
        with torch.cuda.stream(stream):
            for event in [start, *needed]:
                stream.wait_event(event)
            product(piece.low, piece.high)
            return stream.record_event()

    def _current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def _wait(self, events: list[Any]) -> None:
        for event in events:
            self._current().wait_event(event)

    def _join(self) -> None:
        for stream in self._streams:
            self._current().wait_stream(stream)

    def _collectively(self, plan: ChunkPlan, overlap: bool, whole: torch.Tensor) -> bool:
        """Whether one collective of the group does it; `UserError` for a plan of other ranks."""
        self._usable(plan)
        unwanted = not overlap or (self._capturing() and not self.messenger.capturable)
        if unwanted and self.world > 1 and self.messenger.group is not None:
            return True
        return not self.messenger.begin(self._most(plan, whole))

    def _most(self, plan: ChunkPlan, whole: torch.Tensor) -> int:
        return max(plan.sizes) * whole.shape[1] * whole.element_size()

    def _usable(self, plan: ChunkPlan) -> None:
        if (plan.rank, plan.world) != (self.rank, self.world) or plan.algorithm != "direct":
            raise UserError(
                f"a {plan.algorithm} plan of rank {plan.rank} of {plan.world}",
                expected=f"a direct one of rank {self.rank} of {self.world}",
            )


def _numbers(rows: torch.Tensor, peer: int) -> list[tuple[torch.Tensor, int]]:
    return [(rows, peer)] if rows.numel() else []
