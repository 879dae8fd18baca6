"""One run of a schedule on one rank: lanes that wait for what they read, do it, and say that it has finished.

For host tensors, where a lane is a thread; `queue_run` has the form for devices with streams. The executor (`p2p`)
keeps threads and channels from run to run; what is here lives for one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..dist.errors import PeerLost
from .actions import Compute, Recv, Send
from .adoption import NOTHING, Adopted, adoptable, perform
from .board import Board, Stopped
from .graph import Graph, Node
from .ops import Giving, Ops
from .storage import Layout, Storage, layout_of

if TYPE_CHECKING:
    from .p2p import P2P


@dataclass(frozen=True)
class Part:
    """One rank's part of a schedule that has been checked, ready to run again and again.

    `own`: the lane that the caller's thread takes. `early`: receives into memory that nobody has used before, which may
    be posted at once; the others wait for their turn.
    """

    graph: Graph
    layout: Layout
    addresses: Mapping[int, Any]
    lanes: list[list[Node]]
    own: list[Node]
    early: dict[int, Recv]
    _adopted: dict[frozenset[str], Adopted] = field(default_factory=dict)

    def adopted(self, ops: Ops) -> Adopted:
        """The values that live in what operations of this table give."""
        giving = frozenset(name for name in self.graph.schedule.operations if isinstance(ops[name], Giving))
        if not giving or not self.own:
            return NOTHING
        if giving not in self._adopted:
            self._adopted[giving] = adoptable(self.graph, self.layout.rank, self.own[0].lane, giving)
        return self._adopted[giving]


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
    return Part(graph, layout_of(graph.schedule, rank), addresses, lanes, own, early if prepost else {})


class Run:
    """One execution on one rank."""

    def __init__(self, owner: P2P, part: Part, storage: Storage, ops: Ops) -> None:
        self.owner, self.part, self.storage, self.ops = owner, part, storage, ops
        self.board = Board()
        self.posted: dict[int, list[Any]] = {}

    def go(self) -> None:
        """Run all lanes to their end: the caller's thread takes the first that computes."""
        self.posting = self.owner.worker("communication").submit(self._post_early)
        own = self.part.own
        for lane in self.part.lanes:
            if lane is not own:
                self.owner.worker(f"lane-{lane[0].lane}").submit(lambda lane=lane: self._lane(lane))
        if own:
            self._lane(own)
        try:
            self.board.wait([node.id for lane in self.part.lanes for node in lane])
        except BaseException as error:
            self.board.fail(error)
            assert self.board.error is not None
            raise self.board.error from None
        if self.board.error is not None:
            raise self.board.error

    def _lane(self, lane: list[Node]) -> None:
        """The loop that every lane is."""
        try:
            with torch.no_grad():
                for node in lane:
                    self.board.wait(self.part.graph.writers[node.id])
                    if self.owner.trace.enabled:
                        with self.owner.trace.span(str(node.action), lane=node.lane):
                            self._do(node)
                    else:
                        self._do(node)
                    self.board.finish(node.id)
        except Stopped:
            return
        except BaseException as error:
            self.board.fail(error)

    def _do(self, node: Node) -> None:
        action = node.action
        if isinstance(action, Compute):
            perform(self.ops[action.op], action, self.storage, dict(action.params))
        elif isinstance(action, (Send, Recv)):
            try:
                if node.id in self.part.early:
                    self.posting.get()
                    works = self.posted.pop(node.id)
                else:
                    works = self.owner.worker("communication").submit(lambda: self._issue(node.id, action)).get()
                self.owner._transport.wait(works, self.owner.timeout_s)
            except RuntimeError as error:
                raise PeerLost(lost(node, str(error), self.owner.timeout_s)) from error

    def _issue(self, node: int, action: Send | Recv) -> list[Any]:
        """Start the message. In the communication thread."""
        parts = action.reads if isinstance(action, Send) else action.writes
        return self.owner._transport.issue(self.part.addresses[node], action, self.storage.views(parts))

    def _post_early(self) -> None:
        for node, action in self.part.early.items():
            self.posted[node] = self._issue(node, action)


def lost(node: Node, reason: str, timeout_s: float) -> str:
    """Names rank, lane, action, value and peer of what did not happen."""
    action, reason = node.action, re.sub(r"^\[[^\]]*\] ", "", reason).split(". ")[0]
    if "timed out" in reason.lower():
        why = f"within {timeout_s:g} s"
    else:
        why = f"because the connection failed: that rank is probably dead ({reason})"
    if isinstance(action, Send):
        return f"{node}: value {action.reads[0].value} was not taken by rank {action.to} {why}"
    if isinstance(action, Recv):
        return f"{node}: value {action.writes[0].value} did not come from rank {action.source} {why}"
    return f"{node} did not end {why}"
