"""Products whose pieces leave or arrive while a GPU makes others: cuBLAS on row chunks, events, and a messenger.

The same plans and patterns as `comms.overlap_engine`, without its threads: the host only queues work. A piece's event
is its tracker: a stream that waits for it sends what is finished, and the product never waits. Pieces alternate between
two streams, so that the last wave of one, which leaves processors idle, is filled by the first of the next (torch's
async tensor parallelism does the same). Events are used again and no stream's context is entered, because a GPU with
short pieces waits for the host (`cuda_events`). What a caller gets is ordered behind its current stream. Nothing spins
on a processor, and no stream waits for an event that is not queued before it, so one hardware queue
(CUDA_DEVICE_MAX_CONNECTIONS=1) costs overlap, but cannot deadlock; nor can CUDA_LAUNCH_BLOCKING.

Without overlap, NCCL's own collective follows the product: what a script does, at its speed, rounded as NCCL rounds.

A reduce-scatter or all-reduce may instead get a `tracked` product: one kernel, queued before all that waits for it,
which counts its finished tiles, and streams that wait for the counts (`stream_wait`). While a CUDA graph is captured
the events are used: a captured count would be true at every replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from . import cuda_driver
from .chunk_plan import Block, ChunkPlan, Piece
from .cuda_collectives import all_gather_into, reduce_scatter_into, spread
from .cuda_columns import all_reduce_columns
from .cuda_counts import Counts, Tracked
from .cuda_events import Call, Events, Run
from .cuda_messengers import CudaMessenger, NcclMessenger
from .cuda_recorder import Recorder
from .cuda_watch import Exchange, Watch
from .overlap_engine import add_pieces
from .placement import Panel, Placement, Product, by_rows, messages
from .spans import Memory, Span, Spans
from .stream_wait import Counted

END = 1.5  # of the time-out: when a rank that waits for a lost one ends
_KEPT = 64  # plans
Fill = Callable[[Any], None]  # queue the product of a block, or of a piece


class CudaOverlapEngine:
    """The ranks of `group` that multiply together, over NCCL, or over `messenger`. Use from one thread.

    All tensors are on `device`. Calls are queued, not waited for; a piece that has not come after `timeout_s` is named
    in the log, and by `PeerLost` from the next call; half as long again after that the process ends, as by NCCL. `add`
    stands in for `add_pieces`, with the same result.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device,
        timeout_s: float = 300.0,
        messenger: CudaMessenger | None = None,
        add: Callable[[Placement, list[torch.Tensor], Sequence[Piece], torch.Tensor], None] = add_pieces,
    ) -> None:
        self.messenger = messenger or NcclMessenger(group, device, END * timeout_s)
        self.rank, self.world, self.device = self.messenger.rank, self.messenger.world, device
        self.streams, self.sums = [torch.cuda.Stream(device) for _ in range(2)], torch.cuda.Stream(device, priority=-1)
        self._watch = Watch(
            timeout_s,
            end_s=None if self.messenger.capturable else END * timeout_s,
            enter=cuda_driver.let_capture if device.type == "cuda" else lambda: None,
        )
        self._events = Events(torch.cuda.Event)
        self._plans: dict[tuple[tuple[int, ...], int, int, bool], ChunkPlan] = {}
        self.processors = 0 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
        self._counts, self.add = Counts(device), add
        self.recorder = Recorder(self)

    def plan(self, sizes: tuple[int, ...], subchunks: int = 1, columns: int = 0, *, whole: bool = False) -> ChunkPlan:
        """`whole`: as `ChunkPlan` has it, for these `processors`, of which all ranks must have as many."""
        key = sizes, subchunks, columns, whole
        found = self._plans.get(key)
        if found is None:
            more = {"columns": columns, "whole": whole, "processors": self.processors if whole else 0}
            found = self._plans[key] = ChunkPlan(self.rank, sizes, subchunks, **more)
            if len(self._plans) > _KEPT:
                del self._plans[next(iter(self._plans))]
        return found

    def reduce_scatter(
        self,
        plan: ChunkPlan,
        product: Product,
        y_MN: torch.Tensor,
        *,
        overlap: bool = True,
        tracked: Tracked | None = None,
        panel: Panel | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `OverlapEngine.reduce_scatter`; by `tracked`, which must make the same `y`, where it is given, and into
        `out`, [own rows, columns], where that is."""
        out = y_MN.new_empty(plan.own[1] - plan.own[0], y_MN.shape[1]) if out is None else out
        plan.expect(self.rank, self.world)
        if self._collectively(plan, overlap, y_MN):
            product(0, plan.rows)
            return reduce_scatter_into(out, y_MN, plan.sizes, self.messenger.group)
        run, place = self._begin(), Placement(plan, y_MN)
        self._scatter(run, plan, place.fill(product, panel), place, out, overlap, tracked)
        self._end(run)
        return out

    def all_reduce(
        self,
        plan: ChunkPlan,
        product: Product,
        y_MN: torch.Tensor,
        *,
        overlap: bool = True,
        tracked: Tracked | None = None,
        panel: Panel | None = None,
    ) -> torch.Tensor:
        """As `OverlapEngine.all_reduce`; by `tracked`, which must make the same `y`, where it is given, or by `panel`
        with a plan of columns."""
        plan.expect(self.rank, self.world)
        if self._collectively(plan, overlap, y_MN):
            product(0, plan.rows)
            dist.all_reduce(y_MN, group=self.messenger.group)
            return y_MN
        run = self._begin()
        if plan.columns:
            whole = all_reduce_columns(self, run, plan.among, panel, y_MN)
            self._end(run)
            return whole
        whole, place = torch.empty_like(y_MN), Placement(plan, y_MN)
        self._scatter(run, plan, by_rows(product), place, whole[slice(*plan.own)], overlap, tracked)
        summed = run.call.event(run.current)
        left = came = None
        memory = Memory(whole)
        for part in range(plan.subchunks):
            for step in range(1, self.world):
                ends = self.exchange(run, "sum", summed, *spread(plan, memory, step, part), part, pull=True)
                left, came = ends[0] or left, ends[1] or came
        _wait(run.current, left, came)
        self._end(run)
        return whole

    def all_gather(
        self, plan: ChunkPlan, shard: torch.Tensor, whole: torch.Tensor, use: Product, *, overlap: bool = True
    ) -> None:
        """As `OverlapEngine.all_gather`."""
        plan.expect(self.rank, self.world, rows=True)
        if self._collectively(plan, overlap, whole):
            all_gather_into(whole, shard, plan.sizes, self.messenger.group)
            use(0, plan.rows)
            return
        run = self._begin()
        whole[slice(*plan.own)].copy_(shard)
        start, arrived = run.call.event(run.current), dict[Piece, Any]()
        order, own = plan.gather_order, len(plan.chunk(self.rank))
        left = came = None
        fill, memory = by_rows(use), Memory(whole)
        for step in range(1, self.world):
            source = (self.rank + step) % self.world
            for part in range(plan.subchunks):
                ends = self.exchange(run, "rows", start, *spread(plan, memory, step, part), part, pull=True)
                left, came = ends[0] or left, ends[1] or came
                for piece in plan.chunk(source)[part : part + 1]:
                    arrived[piece] = ends[1]
            if step == 1 and overlap:  # the own rows have left
                for at, piece in enumerate(order[:own]):
                    self.make(run, at, start, fill, (piece,))
        if not overlap or self.world == 1:
            _wait(run.current, came)
            use(0, plan.rows)
        else:
            for at, piece in enumerate(order[own:], own):
                self.make(run, at, start, fill, (piece,), arrived[piece])
            self.join(run, len(order))
        _wait(run.current, left, came)
        self._end(run)

    def watched(self, stream: Any) -> None:
        """What was queued on `stream` without `exchange` is named when it does not come."""
        call = self._events.begin()
        self._watch.expect(f"rank {self.rank}: a replayed product's partial sums", [call.event(stream)], call)
        self._events.end(call, stream)

    def close(self) -> None:
        """Collective."""
        self._watch.close()
        self.recorder.close()
        self.messenger.close()

    def _begin(self) -> Run:
        capturing = self.capturing()  # events of a graph are not asked for, and must not be recorded elsewhere
        call = Call(torch.cuda.Event) if capturing else self._events.begin()
        return Run(call, torch.cuda.current_stream(self.device), capturing)

    def _end(self, run: Run) -> None:
        """The current stream waits for all that was queued."""
        if not run.capturing:
            self._events.end(run.call, run.current)

    def _scatter(
        self,
        run: Run,
        plan: ChunkPlan,
        fill: Fill,
        place: Placement,
        out: torch.Tensor,
        overlap: bool,
        tracked: Tracked | None,
    ) -> None:
        """This rank's rows of the sum into `out`."""
        own = plan.chunk(self.rank)
        if not overlap:
            for block in plan.blocks:
                fill(block)
        start = run.call.event(run.current)
        counted: dict[Piece, Counted] = {}
        if overlap and tracked is not None and not run.capturing:
            counted = self._counts.queue(run, plan, tracked, start)
        arrived = list[Any]([None] * plan.parts)
        left, at = None, 0
        y, landings, landed = Memory(place.y), list[torch.Tensor](), list[Memory]()  # of the other ranks
        for hop, to_send, to_come in messages(plan, place.y.shape[1]):
            made: Any = start
            if counted and hop.sends:
                made = counted[hop.sends[0]]
            elif overlap and hop.blocks and not counted:
                made, at = self.make(run, at, start, fill, hop.blocks), at + 1
            if not landings:  # when the device has something to do
                landings = self.messenger.landings(out)
                landed = [Memory(landing) for landing in landings]
            sends = [(Span(y, first, count), to) for first, count, to in to_send]
            receives = [(Span(landed[which], first, count), source) for which, first, count, source in to_come]
            gone, came = self.exchange(run, "partial sums", made, sends, receives, hop.part)
            left = gone or left
            arrived[hop.part] = came or arrived[hop.part]  # the last rank's comes last
        for block in plan.kept if overlap and not counted else ():
            self.make(run, at, start, fill, (block,))
            at += 1
        self.join(run, at)
        for pieces in filter(None, (own[:-1], own[-1:])):  # while the last one is on its way
            _wait(run.current, arrived[pieces[-1].part])
            self.add(place, landings, pieces, out)
        self.messenger.finish(run.current)
        _wait(run.current, left)  # before the caller may free or change y

    def exchange(
        self, run: Run, what: str, after: Any, sends: Spans, receives: Spans, part: int, *, pull: bool = False
    ) -> tuple[Any | None, Any | None]:
        ends = self.messenger.exchange(run.call, after, sends, receives, pull=pull)
        events = [event for event in ends if event is not None]
        if events and not run.capturing:
            to, source = (rows[-1][1] if rows else None for rows in (sends, receives))
            self._watch.expect(Exchange(self.rank, what, part, to, source), events, run.call)
        return ends

    def capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def make(
        self, run: Run, at: int, start: Any, fill: Fill, blocks: Sequence[Block | Piece], needed: Any | None = None
    ) -> Any:
        """Queue the products of the `at`-th piece; the event behind which they are made."""
        stream = self.streams[at % len(self.streams)]
        torch.cuda.set_stream(stream)
        try:
            if at < len(self.streams):  # what is queued later is behind it too
                start.wait(stream)
            if needed is not None:
                needed.wait(stream)
            for block in blocks:
                fill(block)
            return run.call.event(stream)
        finally:
            torch.cuda.set_stream(run.current)

    def join(self, run: Run, made: int) -> None:
        """The current stream waits for `made` pieces."""
        for stream in self.streams[:made]:
            run.call.event(stream).wait(run.current)

    def _collectively(self, plan: ChunkPlan, overlap: bool, whole: torch.Tensor) -> bool:
        """Whether one collective of the group does it; `UserError` for a plan of other ranks."""
        foreign = self.capturing() and not self.recorder.recording  # a capture of the caller's
        unwanted = not overlap or (foreign and not self.messenger.capturable)
        if unwanted and self.world > 1 and self.messenger.group is not None:
            return True
        return not self.messenger.begin(max(plan.sizes) * whole.shape[1] * whole.element_size())


def _wait(stream: Any, *events: Any) -> None:
    for event in events:
        if event is not None:
            event.wait(stream)
