"""One run of a schedule on one rank of a device with streams: one thread queues the actions of all lanes in turn.

A lane is a stream, an edge between lanes an event, and the thread never waits for the device. It switches streams only
where the next action is of another lane, and events are the part's own, used again in every run: a wait stands for
what was recorded last, and one thread records before it waits. Memory: everything of a run is allocated on the
caller's stream before the lanes begin behind it, and given back after that stream has been ordered behind the lanes;
whoever gets it next, on that stream, comes later. So nothing has to be recorded for the allocator. What an operation
allocates for itself belongs to its lane's stream and stays there; of what is adopted (see `adoption`) that is the
caller's.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..dist.errors import PeerLost
from .actions import Compute, Send, Wait
from .adoption import perform
from .ops import Giving, Ops
from .p2p_run import Part, lost
from .queue_order import QueueOrder, Step
from .storage import Storage

if TYPE_CHECKING:
    from .p2p import P2P


_thread = threading.local()


def queueing() -> bool:
    """Is this thread putting a schedule on the device's streams, messages among it?

    An operation that is called then must not wait for the device: what it reads may not have come yet, and a peer may
    stand still until this rank has queued the rest. So nothing can be timed or compared, which a rehearsal is for.
    """
    return getattr(_thread, "queueing", False)


def _form(x: torch.Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype


class Streams(Protocol):
    """The streams of one device. An event has `record(stream)`, `wait(stream)` and `query()`, as torch.cuda.Event."""

    def current(self) -> Any:
        """The calling thread's stream."""
        ...

    def use(self, stream: Any) -> None:
        """Make it the calling thread's stream."""
        ...

    def lane(self, name: str) -> Any:
        """The stream of a lane, kept from run to run."""
        ...

    def event(self) -> Any: ...


class CudaStreams:
    """Those of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lanes: dict[str, torch.cuda.Stream] = {}

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def use(self, stream: torch.cuda.Stream) -> None:
        torch.cuda.set_stream(stream)

    def lane(self, name: str) -> torch.cuda.Stream:
        if name not in self._lanes:
            self._lanes[name] = torch.cuda.Stream(self.device)
        return self._lanes[name]

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()


class Queued:
    """A part's order with all that is the same in every run: streams, events, and the parameters of operations."""

    def __init__(self, order: QueueOrder, streams: Streams) -> None:
        self.order, self.streams = order, streams
        lanes = {step.node.lane for step in order.steps} - {order.own}
        self.lanes = {lane: streams.lane(lane) for lane in lanes}
        self.start = streams.event()
        self.events = [streams.event() for _ in order.steps]
        self.params = [
            dict(step.node.action.params) if isinstance(step.node.action, Compute) else {} for step in order.steps
        ]


class QueuedRun:
    """One execution on one rank."""

    def __init__(self, owner: P2P, part: Part, queued: Queued, storage: Storage, ops: Ops) -> None:
        self.owner, self.part, self.queued, self.storage, self.ops = owner, part, queued, storage, ops

    def rehearse(self) -> None:
        """Do each kind of operation once, its results thrown away, before any message is posted.

        The first use of a kernel loads it, and CUDA may wait for the whole device to do so; the order of queueing would
        outlive that, but the peers would stand still meanwhile. What has not come yet is a constant here, another for
        each operand: operations that compare their ways of computing must not see what the memory held before. What is
        adopted lies in memory as it will in the run.
        """
        storage, given = self.storage, dict[Any, list[torch.Tensor]]()  # by kind: how what is adopted lies in memory
        for step, params in zip(self.queued.order.steps, self.queued.params):
            action = step.node.action
            if not isinstance(action, Compute):
                continue
            op, adopted = self.ops[action.op], [part.value for part in action.writes if part.value in storage.former]
            for name in adopted:
                storage.let_go(storage.former[name])
            reads = storage.views(action.reads)
            kind = action.op, action.params, tuple(map(_form, reads)), tuple(map(storage.form, action.writes))
            if kind in given:
                storage.tensors.update(zip(adopted, (torch.empty_like(x, device=storage.device) for x in given[kind])))
                continue
            for place, (part, x) in enumerate(zip(action.reads, reads)):
                if part.value not in storage.inputs and x.is_floating_point():
                    x.fill_(1 / (place + 2))
            found, loose = None, frozenset[int]()
            if adopted and isinstance(op, Giving):
                found, loose = op.give(reads, **params), op.loose
            if found is None:
                found = [storage.blank(part) for part in action.writes]
                op(reads, found, **params)
            for at, (part, tensor) in enumerate(zip(action.writes, found)):
                if part.value in adopted:
                    storage.adopt(part.value, tensor, loose=at in loose)
            given[kind] = [torch.empty_like(storage.tensors[name], device="meta") for name in adopted]
        for name in storage.former:
            storage.let_go(name)

    def go(self, *, mark_all: bool = False) -> None:
        """Queue everything; the caller's stream is then behind it. `mark_all`: an event for each step, for `drain`."""
        queued, streams = self.queued, self.queued.streams
        own = now = streams.current()
        queued.start.record(own)
        stream_of = {queued.order.own: own, **queued.lanes}
        for stream in queued.lanes.values():
            queued.start.wait(stream)
        events, traced = queued.events, self.owner.trace.enabled
        _thread.queueing = True
        try:
            for index, step in enumerate(queued.order.steps):
                stream = stream_of[step.node.lane]
                for other in step.waits:
                    events[other].wait(stream)
                if not isinstance(step.node.action, Wait):
                    if stream is not now:
                        streams.use(stream)
                        now = stream
                    if traced:
                        with self.owner.trace.span(str(step.node.action), lane=step.node.lane):
                            self._do(index, step)
                    else:
                        self._do(index, step)
                if step.marked or mark_all:
                    events[index].record(stream)
        finally:
            _thread.queueing = False
            if now is not own:
                streams.use(own)
        for index in queued.order.ends:
            events[index].wait(own)

    def drain(self) -> None:
        """Until the device has done it all; one event after the other, so that it can name a late one. After
        `go(mark_all=True)`."""
        timeout_s = self.owner.timeout_s
        for step, event in zip(self.queued.order.steps, self.queued.events):
            deadline_s = time.monotonic() + timeout_s
            while not event.query():
                if time.monotonic() > deadline_s:
                    raise PeerLost(lost(step.node, "timed out on the device", timeout_s))
                time.sleep(20e-6)

    def _do(self, index: int, step: Step) -> None:
        node, action, storage = step.node, step.node.action, self.storage
        if isinstance(action, Compute):
            perform(self.ops[action.op], action, storage, self.queued.params[index])
            return
        transport, timeout_s = self.owner._transport, self.owner.timeout_s
        assert not isinstance(action, Wait)
        rows = storage.views(action.reads if isinstance(action, Send) else action.writes)
        try:
            transport.wait(transport.issue(self.part.addresses[node.id], action, rows), timeout_s)
        except RuntimeError as error:
            raise PeerLost(lost(node, str(error), timeout_s)) from error
