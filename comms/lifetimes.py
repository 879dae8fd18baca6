"""No buffer is reused early: values that share a slot must live one after the other, in every interleaving.

Each event gets a vector clock, one counter per lane: how far that lane has certainly come when the event happens
(Mattern 1989; torch's and CUDA's race detectors do the same). A value may take over a slot's bytes only when all
accesses to their earlier owner certainly ended before its own write starts. Waiting for a receive also certifies that
the matching send has read its source, because the bytes came from there. An in-place reduce may write over what it
reads.
"""

from __future__ import annotations

import numpy as np

from .actions import Compute, Slice, Value
from .graph import FINISH, START, Graph, Problem, order


def early_reuse(graph: Graph) -> list[Problem]:
    """Pairs of accesses to one slot that no edge orders. The graph must be free of deadlock."""
    shared = [
        (rank, [name for name, value in values.items() if value.slot == slot])
        for rank, values in enumerate(graph.schedule.by_rank)
        for slot in sorted({value.slot for value in values.values() if value.slot})
    ]
    shared = [(rank, names) for rank, names in shared if len(names) > 1]
    if not shared:
        return []
    writers = {
        node
        for rank, names in shared
        for name in names
        for node, _, is_write in graph.accesses[rank].get(name, [])
        if is_write
    }
    clocks = _clocks(graph, writers)
    found = []
    for rank, names in shared:
        for later in range(1, len(names)):
            for node, part, is_write in graph.accesses[rank].get(names[later], []):
                for earlier in range(later) if is_write else ():
                    found += _conflicts(graph, clocks, rank, names[earlier], node, part)
    return found


def _conflicts(
    graph: Graph, clocks: dict[int, np.ndarray], rank: int, earlier: str, writer: int, part: Slice
) -> list[Problem]:
    values = graph.schedule.by_rank[rank]
    found = []
    for other, before, is_write in graph.accesses[rank].get(earlier, []):
        if not _overlap(values[earlier], before, values[part.value], part):
            continue
        if other == writer:
            action = graph.nodes[writer].action
            in_place = isinstance(action, Compute) and action.kind in ("reduce", "merge")
            same = (
                values[earlier].row_size == values[part.value].row_size
                and values[earlier].dtype == values[part.value].dtype
            )
            if in_place and not is_write and same and (before.start, before.stop) == (part.start, part.stop):
                continue
        elif clocks[writer][graph.nodes[other].lane_id] > graph.nodes[other].index:
            continue
        text = (
            f"it takes over slot {values[earlier].slot} from {earlier}, but nothing makes it wait until "
            f"{graph.nodes[other]} has {'written' if is_write else 'read'} {before}"
        )
        found.append(graph.nodes[writer].problem("slot reuse", text, part.value))
    return found


def _overlap(a: Value, part_a: Slice, b: Value, part_b: Slice) -> bool:
    if a.row_size[1] or b.row_size[1]:  # symbols: rows can be compared when they are equally long, otherwise assume it
        size_a, size_b = (1, 1) if a.row_size == b.row_size else (0, 0)
        if not size_a:
            return True
    else:
        size_a, size_b = a.row_bytes, b.row_bytes
    return part_a.start * size_a < part_b.stop * size_b and part_b.start * size_b < part_a.stop * size_a


def _clocks(graph: Graph, wanted: set[int]) -> dict[int, np.ndarray]:
    """For each wanted node: actions per lane that have certainly ended when it starts."""
    width = len(graph.lanes)
    at: dict[tuple[int, int], np.ndarray] = {}
    for node, phase in order(graph):
        clock = np.zeros(width, dtype=np.int32)
        for event in graph.before(node, phase, rendezvous=False):
            np.maximum(clock, at[event], out=clock)
            if phase == FINISH and event[0] != node:  # the send of this receive: its source has been read
                sender = graph.nodes[event[0]]
                clock[sender.lane_id] = max(clock[sender.lane_id], sender.index + 1)
        if phase == FINISH:
            clock[graph.nodes[node].lane_id] = graph.nodes[node].index + 1
        at[node, phase] = clock
    return {node: at[node, START] for node in wanted}
