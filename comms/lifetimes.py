"""No buffer is reused early: values that share a slot must live one after the other, in every interleaving.

Each event gets a vector clock, one counter per lane: how far that lane has certainly come when the event happens
(Mattern 1989; torch's and CUDA's race detectors do the same). A value may take over a slot's bytes only when all
accesses to their earlier owner certainly ended before its own write starts. Waiting for a receive also certifies that
the matching send has read its source, because the bytes came from there. An in-place reduce may write over what it
reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .actions import Compute, Slice, Value
from .graph import FINISH, START, Graph, order
from .problems import Problem


@dataclass(frozen=True)
class _Access:
    """Bytes (or rows, where all owners of the slot have equal ones) `low` ≤ i < `high` of a slot, touched by `node`."""

    low: int
    high: int
    node: int
    part: Slice
    is_write: bool


def early_reuse(graph: Graph) -> list[Problem]:
    """Accesses to one slot that no edge orders. The graph must be free of deadlock."""
    slots: dict[tuple[int, str], list[Value]] = {}
    for rank, values in enumerate(graph.schedule.by_rank):
        for value in values.values():
            if value.slot:
                slots.setdefault((rank, value.slot), []).append(value)
    shared = {(rank, slot): owners for (rank, slot), owners in slots.items() if len(owners) > 1}
    if not shared:
        return []
    clocks = _clocks(graph)
    return [problem for (rank, slot), owners in shared.items() for problem in _slot(graph, clocks, rank, slot, owners)]


def _slot(graph: Graph, clocks: dict[int, np.ndarray], rank: int, slot: str, owners: list[Value]) -> list[Problem]:
    """Go through the owners in order, with the accesses that a later owner still has to be compared with.

    An access can be forgotten once a later write covers it: whoever comes after that write comes after the access.
    """
    live: list[_Access] = []
    found = []
    for owner in owners:
        accesses = [
            _Access(*_range(part, owner, owners), node, part, is_write)
            for node, part, is_write in graph.accesses[rank].get(owner.name, [])
        ]
        covered: set[_Access] = set()
        for new in accesses:
            for old in live if new.is_write else ():
                if old.low < new.high and new.low < old.high:
                    if not _ordered(graph, clocks, old, new):
                        text = (
                            f"it takes over slot {slot} from {old.part.value}, but nothing makes it wait until "
                            f"{graph.nodes[old.node]} has {'written' if old.is_write else 'read'} {old.part}"
                        )
                        found.append(graph.nodes[new.node].problem("slot reuse", text, new.part.value))
                    if new.low <= old.low and old.high <= new.high:
                        covered.add(old)
        live = [old for old in live if old not in covered] + accesses
    return found


def _ordered(graph: Graph, clocks: dict[int, np.ndarray], old: _Access, new: _Access) -> bool:
    """Has `old` certainly ended when `new` starts, or is it an in-place sum: the same rows of the same result?"""
    if old.node != new.node:
        before = graph.nodes[old.node]
        return bool(clocks[new.node][before.lane_id] > before.index)
    action = graph.nodes[new.node].action
    if not isinstance(action, Compute) or action.kind not in ("reduce", "merge") or old.is_write:
        return False
    values = graph.schedule.by_rank[graph.nodes[new.node].rank]
    a, b = values[old.part.value], values[new.part.value]
    same_rows = (a.dtype, a.row_size, old.part.start, old.part.stop) == (
        b.dtype,
        b.row_size,
        new.part.start,
        new.part.stop,
    )
    results = {at % len(action.writes) for at, read in enumerate(action.reads) if read == old.part}
    return same_rows and results == {action.writes.index(new.part)}


def _range(part: Slice, owner: Value, owners: list[Value]) -> tuple[int, int]:
    if all(other.row_size == owner.row_size for other in owners):
        return part.start, part.stop
    if any(other.row_size[1] for other in owners):
        return 0, 1  # symbols: nobody knows, so everything overlaps
    return part.start * owner.row_bytes, part.stop * owner.row_bytes


def _clocks(graph: Graph) -> dict[int, np.ndarray]:
    """For each node: how many actions of each lane have certainly ended when it starts."""
    width = len(graph.lanes)
    starts: dict[int, np.ndarray] = {}
    ends: dict[int, np.ndarray] = {}
    for node, phase in order(graph):
        clock = np.zeros(width, dtype=np.int32)
        for event, when in graph.before(node, phase, rendezvous=False):
            np.maximum(clock, starts[event] if when == START else ends[event], out=clock)
            if phase == FINISH and event != node:  # the send of this receive: its source has been read
                sender = graph.nodes[event]
                clock[sender.lane_id] = max(clock[sender.lane_id], sender.index + 1)
        if phase == FINISH:
            clock[graph.nodes[node].lane_id] = graph.nodes[node].index + 1
        (starts if phase == START else ends)[node] = clock
    return starts
