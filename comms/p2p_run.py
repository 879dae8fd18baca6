"""One run of a schedule on one rank: lanes that wait for what they read, do it, and say that it has finished.

The executor (`p2p`) keeps threads, streams and channels from run to run; what is here lives for one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..dist.errors import PeerLost
from .actions import Compute, Recv, Send
from .board import Board, Stopped
from .graph import Graph, Node
from .ops import Ops
from .storage import Storage

if TYPE_CHECKING:
    from .p2p import P2P


@dataclass(frozen=True)
class Part:
    """One rank's part of a schedule that has been checked, ready to run again and again.

    `own`: the lane that the caller's thread takes. `early`: receives into memory that nobody has used before, which may
    be posted at once; the others wait for their turn.
    """

    graph: Graph
    addresses: Mapping[int, Any]
    lanes: list[list[Node]]
    own: list[Node]
    early: dict[int, Recv]


def part_of(graph: Graph, rank: int, addresses: Mapping[int, Any], *, prepost: bool) -> Part:
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
    return Part(graph, addresses, lanes, own, early if prepost else {})


class Run:
    """One execution on one rank."""

    def __init__(self, owner: P2P, part: Part, storage: Storage, ops: Ops) -> None:
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
