"""Run a schedule over torch.distributed, gloo for CPU tensors and NCCL for CUDA tensors, or over MPI.

Each lane is a thread (the caller's own for the first lane of operations) with a loop of four lines: wait for what the
action reads, do it, say that it has finished. One communication thread issues all messages, because issuing costs time
and the compute thread has none; the lanes wait for them. On CUDA each lane is also a stream, threads only put work on
it, and edges become events. Whatever is not in the schedule is not waited for: no barrier, no device-wide synchronise.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..dist.errors import PeerLost, UndertowError, UserError
from ..dist.trace import Trace
from .actions import Compute, Recv, Send
from .board import Board, Stopped, Worker
from .check import check, out_of_order
from .graph import Graph, Node, need
from .link import EmulatedLink, LinkModel
from .mpi_group import MpiGroup, MpiTransport
from .ops import Ops, table
from .problems import ScheduleError
from .schedule import Schedule
from .storage import Storage
from .transport import Gloo, Nccl, Transport, private_store

_KEPT = 256  # schedules whose proofs are remembered


@dataclass(frozen=True)
class _Part:
    """One rank's part of a schedule that has been checked, ready to run again and again.

    `own`: the lane that the caller's thread takes. `early`: receives into memory that nobody has used before, which may
    be posted at once; the others wait for their turn.
    """

    graph: Graph
    addresses: Mapping[int, Any]
    lanes: list[list[Node]]
    own: list[Node]
    early: dict[int, Recv]


def _part(graph: Graph, rank: int, addresses: Mapping[int, Any], *, prepost: bool) -> _Part:
    lanes = [[graph.nodes[i] for i in ids] for lane_rank, _, ids in graph.lanes if lane_rank == rank and ids]
    own = next((lane for lane in lanes if any(isinstance(node.action, Compute) for node in lane)), [])
    first: dict[str, str] = {}
    for name, value in graph.schedule.by_rank[rank].items():
        first.setdefault(f"slot {value.slot}" if value.slot else name, name)
    fresh = set(first.values())
    early = {
        node.id: node.action
        for lane in lanes
        for node in lane
        if isinstance(node.action, Recv) and all(part.value in fresh for part in node.action.writes)
    }
    return _Part(graph, addresses, lanes, own, early if prepost else {})


class P2P:
    """Executes schedules on the ranks of `group` (default: all). Construct, `run` and `close` on every rank alike.

    A schedule's rank r is the group's r-th rank. `device`: CPU (gloo, or MPI) or a CUDA device (NCCL). `timeout_s`: the
    longest that a message may make its lane wait. After an error the executor refuses to run again, because messages
    of the broken run may still be on their way. `trace` records a span for each action. `link` makes gloo as slow as a
    given link (see `link`).
    """

    def __init__(
        self,
        group: dist.ProcessGroup | MpiGroup | None = None,
        *,
        device: torch.device | str = "cpu",
        timeout_s: float = 300.0,
        trace: Trace | None = None,
        link: LinkModel | None = None,
    ) -> None:
        self.device, self.timeout_s, self.trace = torch.device(device), timeout_s, trace or Trace(None)
        self._gloo: Gloo | MpiTransport  # also of small CPU tensors beside NCCL
        self._transport: Transport
        if isinstance(group, MpiGroup):
            if self.device.type != "cpu":
                raise UserError(f"tensors on {self.device} over MPI", expected="CPU tensors; NCCL moves those of GPUs")
            self.rank, self.world = group.rank, group.world
            self._gloo = self._transport = group.transport()
        else:
            ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
            self.rank, self.world = ranks.index(dist.get_rank()), len(ranks)
            store = private_store(group)
            self._gloo = self._transport = Gloo(store, self.rank, self.world, timeout_s)
            if self.device.type != "cpu":
                self._transport = Nccl(store, ranks, self.rank, self.device, timeout_s)
        if link is not None:
            if self.device.type != "cpu":
                raise UserError(
                    "an emulated link around NCCL", expected="device='cpu': the emulation holds host threads"
                )
            self._transport = EmulatedLink(self._transport, link)
        self._ready: dict[str, _Part] = {}  # by digest, the latest used last
        self._rehearsed: set[str] = set()  # digests
        self._workers: dict[str, Worker] = {}
        self._streams: dict[str, Any] = {}
        self._broken: list[Any] = []  # the failed run: its tensors must outlive messages on their way

    def prepare(self, schedule: Schedule) -> None:
        """Check the schedule and open its channels; collective. `run` does it when it sees a schedule first."""
        self._prepared(schedule)

    def _prepared(self, schedule: Schedule) -> _Part:
        found = self._ready.pop(schedule.digest, None) or self._prepare(schedule)
        self._ready[schedule.digest] = found
        if len(self._ready) > _KEPT:
            del self._ready[next(iter(self._ready))]
        return found

    def _prepare(self, schedule: Schedule) -> _Part:
        if schedule.world != self.world:
            raise UserError(f"schedule {schedule.name} is for {schedule.world} ranks, the group has {self.world}")
        check(schedule, rendezvous=True)
        graph = need(schedule)
        if not self._transport.prepost and (problems := out_of_order(graph)):
            raise ScheduleError(schedule, tuple(problems))
        self._agree(schedule)
        return _part(graph, self.rank, self._transport.prepare(graph), prepost=self._transport.prepost)

    def run(
        self,
        schedule: Schedule,
        inputs: Mapping[str, torch.Tensor],
        ops: Ops | None = None,
        *,
        outputs: Mapping[str, torch.Tensor] | None = None,
        blocking: bool = True,
    ) -> dict[str, torch.Tensor]:
        """This rank's part of the schedule: its inputs by name → its outputs by name, on `device`.

        All ranks of the group must call it with the same schedules in the same order. `outputs`: tensors to fill.
        `blocking=False` (CUDA only) returns when all work is queued; the current stream is then behind it. Raises
        `PeerLost`, naming rank, action and value, when a peer dies or gives nothing for `timeout_s`, and whatever an
        operation raises.
        """
        if self._broken:
            raise UndertowError(
                f"rank {self.rank}: this executor has failed before, and its messages may still be on their way; "
                "close it and make a new one"
            )
        part = self._prepared(schedule)
        with torch.no_grad():
            storage = Storage(schedule, self.rank, inputs, outputs=outputs, device=self.device)
            run = _Run(self, part, storage, table(schedule, ops))
            if self.device.type != "cpu" and schedule.digest not in self._rehearsed:
                run.rehearse()
                self._rehearsed.add(schedule.digest)
            try:
                run.go()
                if blocking:
                    run.drain()
            except BaseException:
                self._broken.append(run)
                raise
        return storage.outputs

    def gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's small CPU tensor of one shape, in rank order; collective, beside any schedule."""
        return self._gloo.gather(mine)

    @property
    def link(self) -> EmulatedLink | None:
        """The emulated link, which counts the bytes that it carries; None where there is none."""
        return self._transport if isinstance(self._transport, EmulatedLink) else None

    def worker(self, role: str) -> Worker:
        """The thread of this role, made when first asked for."""
        if role not in self._workers:
            self._workers[role] = Worker(f"undertow-{role}-{self.rank}")
        return self._workers[role]

    def stream(self, lane: str) -> torch.cuda.Stream | None:
        """The stream of a lane on CUDA; None on the CPU."""
        if self.device.type == "cpu":
            return None
        if lane not in self._streams:
            self._streams[lane] = torch.cuda.Stream(self.device)
        return self._streams[lane]

    def close(self) -> None:
        """End the threads and, unless a run has failed, the process groups; collective."""
        for worker in self._workers.values():
            worker.stop()
        self._workers.clear()
        if not self._broken:
            self._transport.close()
            if self._transport is not self._gloo:
                self._gloo.close()

    def __enter__(self) -> P2P:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _agree(self, schedule: Schedule) -> None:
        """Refuse a schedule that is not the same on all ranks: it would hang, or mix up messages."""
        mine = torch.frombuffer(bytearray.fromhex(schedule.digest), dtype=torch.uint8)
        try:
            found = self.gather(mine)
        except RuntimeError as error:
            raise PeerLost(f"rank {self.rank}: not all ranks came to schedule {schedule.name} ({error})") from error
        others = [rank for rank, digest in enumerate(found) if not torch.equal(digest, mine)]
        if others:
            raise UserError(
                f"rank {self.rank} runs schedule {schedule.name} ({schedule.digest[:12]}), rank(s) "
                f"{', '.join(map(str, others))} run another one",
                expected="the same schedule on all ranks",
                remedy="build it from values that all ranks share, and compare str(schedule)",
            )


class _Run:
    """One execution on one rank."""

    def __init__(self, owner: P2P, part: _Part, storage: Storage, ops: Ops) -> None:
        self.owner, self.part, self.storage, self.ops = owner, part, storage, ops
        self.board = Board()
        self.posted: dict[int, list[Any]] = {}
        self.cuda = owner.device.type == "cuda"

    def rehearse(self) -> None:
        """Do each kind of operation once, its results thrown away, before any message is posted.

        The first use of a kernel loads it, and CUDA may wait for the whole device to do so. A receive that stands on
        the device would then wait for a peer that waits likewise for this rank: neither would get to send.
        """
        seen = set[Any]()
        for node in (node for lane in self.part.lanes for node in lane if isinstance(node.action, Compute)):
            action: Any = node.action
            reads, writes = self.storage.views(action.reads), self.storage.views(action.writes)
            kind = action.op, action.params, tuple((x.shape, x.dtype) for x in (*reads, *writes))
            if kind not in seen:
                seen.add(kind)
                self.ops[action.op](reads, [torch.empty_like(x) for x in writes], **dict(action.params))

    def go(self) -> None:
        """Run all lanes: the caller's thread takes the first that computes."""
        self.posting = self.owner.worker("communication").submit(self._post_early)
        own = self.part.own
        start = torch.cuda.current_stream(self.owner.device).record_event() if self.cuda else None
        for lane in self.part.lanes:
            if lane is not own:
                stream = self.owner.stream(lane[0].lane)
                self.owner.worker(f"lane-{lane[0].lane}").submit(lambda lane=lane, s=stream: self._lane(lane, s, start))
        if own:
            self._lane(own, torch.cuda.current_stream(self.owner.device) if self.cuda else None, None)
        try:
            marks = self.board.wait([node.id for lane in self.part.lanes for node in lane])
        except BaseException as error:
            self.board.fail(error)
            assert self.board.error is not None
            raise self.board.error from None
        if self.board.error is not None:
            raise self.board.error
        if self.cuda:
            for mark in marks:
                torch.cuda.current_stream(self.owner.device).wait_event(mark)

    def drain(self) -> None:
        """On CUDA, until the device has done it all; one event after the other, so that it can name a late one."""
        for lane in self.part.lanes if self.cuda else ():
            for node in lane:
                (mark,) = self.board.wait([node.id])
                deadline_s = time.monotonic() + self.owner.timeout_s
                while not mark.query():
                    if time.monotonic() > deadline_s:
                        raise PeerLost(self._lost(node, "timed out on the device"))
                    time.sleep(20e-6)

    def _lane(self, lane: list[Node], stream: Any, start: Any) -> None:
        """The loop that every lane is."""
        try:
            with torch.no_grad(), torch.cuda.stream(stream):
                if start is not None:
                    stream.wait_event(start)
                for node in lane:
                    marks = self.board.wait(self.part.graph.writers[node.id])
                    for mark in marks if self.cuda else ():
                        stream.wait_event(mark)
                    if self.owner.trace.enabled:
                        with self.owner.trace.span(str(node.action), lane=node.lane):
                            self._do(node, stream)
                    else:
                        self._do(node, stream)
                    self.board.finish(node.id, stream.record_event() if self.cuda else None)
        except Stopped:
            return
        except BaseException as error:
            self.board.fail(error)

    def _do(self, node: Node, stream: Any) -> None:
        action = node.action
        if isinstance(action, Compute):
            reads, writes = self.storage.views(action.reads), self.storage.views(action.writes)
            self.ops[action.op](reads, writes, **dict(action.params))
        elif isinstance(action, (Send, Recv)):
            communication = self.owner.worker("communication")
            try:
                if self.cuda:
                    communication.submit(lambda: self._enqueue(node.id, action, stream)).get()
                elif node.id in self.part.early:
                    self.posting.get()
                    self.owner._transport.wait(self.posted.pop(node.id), self.owner.timeout_s)
                else:
                    works = communication.submit(lambda: self._issue(node.id, action)).get()
                    self.owner._transport.wait(works, self.owner.timeout_s)
            except RuntimeError as error:
                raise PeerLost(self._lost(node, str(error))) from error

    def _issue(self, node: int, action: Send | Recv) -> list[Any]:
        """Start the message. In the communication thread."""
        parts = action.reads if isinstance(action, Send) else action.writes
        return self.owner._transport.issue(self.part.addresses[node], action, self.storage.views(parts))

    def _enqueue(self, node: int, action: Send | Recv, stream: Any) -> None:
        with torch.cuda.stream(stream):
            self.owner._transport.wait(self._issue(node, action), self.owner.timeout_s)

    def _post_early(self) -> None:
        for node, action in self.part.early.items():
            self.posted[node] = self._issue(node, action)

    def _lost(self, node: Node, reason: str) -> str:
        """Names rank, lane, action, value and peer of what did not happen."""
        action, reason = node.action, re.sub(r"^\[[^\]]*\] ", "", reason).split(". ")[0]
        if "timed out" in reason.lower():
            why = f"within {self.owner.timeout_s:g} s"
        else:
            why = f"because the connection failed: that rank is probably dead ({reason})"
        if isinstance(action, Send):
            return f"{node}: value {action.reads[0].value} was not taken by rank {action.to} {why}"
        if isinstance(action, Recv):
            return f"{node}: value {action.writes[0].value} did not come from rank {action.source} {why}"
        return f"{node} did not end {why}"
