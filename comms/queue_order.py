"""In which order one thread puts all lanes' actions on a rank's streams, and where an event must order two of them.

A message is one point of this order, at both its ends: all ranks queue parts of one global order. So nothing can stop
for ever, however little runs beside each other: take the first action of the order that has not ended. All before it
have, on every rank, so its streams are free, and a host that waited for its device (a full launch queue, memory that
must be given back, streams that share a hardware queue) waited for something earlier. Such an order exists exactly for
the schedules that `check(rendezvous=True)` accepts. Within what the edges allow, a shorter chain of actions before it
comes first, and messages before operations, so that data moves before the device is busy.

A receive that stands on a GPU spins on its multiprocessors until the message comes. So one whose message some rank must
first compute for is held back until this rank has done as many operations of its own lane: ranks keep step, and what
arrives earlier waits at its sender's. That is one edge more, along the same order. Pure: no device, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from .actions import Compute, Recv
from .graph import Graph, Node


@dataclass(frozen=True)
class Step:
    """An action in its turn. `waits`: steps of other lanes, by index, that its lane must be ordered behind first.
    `marked`: another lane, or the end, waits for it, so it leaves an event."""

    node: Node
    waits: tuple[int, ...]
    marked: bool


@dataclass(frozen=True)
class QueueOrder:
    """All steps of one rank. `own`: the lane that takes the caller's stream; the others begin behind what stands on it.
    `ends`: the steps, by index, that the caller's stream must be ordered behind last."""

    steps: tuple[Step, ...]
    own: str
    ends: tuple[int, ...]


def own_lanes(graph: Graph) -> dict[int, str]:
    """By rank its first lane that computes: where the heavy operations are, and the caller's stream goes."""
    found: dict[int, str] = {}
    for rank, lane, ids in graph.lanes:
        if any(isinstance(graph.nodes[node].action, Compute) for node in ids):
            found.setdefault(rank, lane)
    return found


def global_order(graph: Graph) -> tuple[list[int], list[int]]:
    """All actions of all ranks, by node, the two ends of a message next to each other; and for each node how many
    operations of own lanes, one after the other, must end before it.

    `graph` must be free of deadlock when sends wait for their receive; `ValueError` otherwise.
    """
    one_of = [min(node, other) if other >= 0 else node for node, other in enumerate(graph.partner)]
    before: dict[int, set[int]] = {one: set() for one in one_of}
    for node, one in enumerate(one_of):
        earlier = (*graph.writers[node], *([graph.previous[node]] if graph.previous[node] >= 0 else []))
        before[one].update(one_of[other] for other in earlier)
    after: dict[int, list[int]] = {one: [] for one in before}
    for one, found in before.items():
        for other in found:
            after[other].append(one)
    left = {one: len(found) for one, found in before.items()}
    level = {one: 0 for one, count in left.items() if not count}
    ready, depth, own = list(level), dict.fromkeys(before, 0), own_lanes(graph)
    for one in ready:
        node = graph.nodes[one]
        below = depth[one] + (isinstance(node.action, Compute) and node.lane == own.get(node.rank))
        for follower in after[one]:
            left[follower] -= 1
            level[follower] = max(level.get(follower, 0), level[one] + 1)
            depth[follower] = max(depth[follower], below)
            if not left[follower]:
                ready.append(follower)
    if len(ready) < len(before):
        raise ValueError(f"schedule {graph.schedule.name} stops for ever when sends wait for their receive")
    ready.sort(key=lambda one: (level[one], graph.partner[one] < 0, one))
    ordered = [node for one in ready for node in ((one, graph.partner[one]) if graph.partner[one] >= 0 else (one,))]
    return ordered, [depth[one] for one in one_of]


def queue_order(graph: Graph, rank: int) -> QueueOrder:
    """The part of `rank`. An edge within a lane needs no event, nor does one that an earlier wait of it covers."""
    ordered, depth = global_order(graph)
    nodes = [graph.nodes[node] for node in ordered if graph.nodes[node].rank == rank]
    own = own_lanes(graph).get(rank, "")
    at = {node.id: index for index, node in enumerate(nodes)}
    computed = [(depth[node.id], i) for i, node in enumerate(nodes) if node.lane == own]
    behind: dict[tuple[str, str], int] = {}  # (lane, other lane) → the latest step of the other it is ordered behind
    waits: list[tuple[int, ...]] = []
    for node in nodes:
        latest: dict[str, int] = {}
        first = [at[writer] for writer in graph.writers[node.id]]
        if isinstance(node.action, Recv):  # in step with the ranks that must compute for it
            first += [i for below, i in computed if below < depth[node.id] and i < at[node.id]]
        for index in sorted(first):
            latest[nodes[index].lane] = index
        needed = [i for lane, i in latest.items() if lane != node.lane and behind.get((node.lane, lane), -1) < i]
        behind.update(((node.lane, nodes[i].lane), i) for i in needed)
        waits.append(tuple(needed))
    last = {node.lane: index for index, node in enumerate(nodes)}
    ends = tuple(i for lane, i in last.items() if lane != own and behind.get((own, lane), -1) < i)
    marked = {i for found in waits for i in found} | set(ends)
    steps = (Step(node, found, index in marked) for index, (node, found) in enumerate(zip(nodes, waits)))
    return QueueOrder(tuple(steps), own, ends)
