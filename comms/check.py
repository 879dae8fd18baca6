"""Prove that a schedule is right before anything runs: every reader may then trust it.

The parts: names and messages (`graph`), equal bytes at both ends, an order that never stops (with buffered sends, and
where asked with sends that wait for their receive, as gloo's and NCCL's do), buffers (`lifetimes`), and each needed
block exactly once (`provenance`). The proof covers every interleaving that the lanes allow, not one run: without
conflicting accesses, and with each row written once, all interleavings compute the same.
"""

from __future__ import annotations

from .graph import FINISH, START, Graph, build, order
from .lifetimes import early_reuse
from .problems import Problem, ScheduleError
from .provenance import unmet_goals
from .schedule import Schedule


def find_problems(schedule: Schedule, *, rendezvous: bool = False) -> tuple[Problem, ...]:
    """All faults of the first part that finds any; empty for a schedule that is right.

    `rendezvous`: a send may also be held until its receive has been reached.
    """
    graph = build(schedule)
    if graph.problems:
        return tuple(graph.problems)
    return tuple(
        _unequal_messages(graph)
        or _deadlock(graph, rendezvous=False)
        or (_deadlock(graph, rendezvous=True) if rendezvous else [])
        or early_reuse(graph)
        or unmet_goals(graph)
    )


def check(schedule: Schedule, *, rendezvous: bool = False) -> None:
    """Raise `ScheduleError`, which names rank, lane, action and value of each fault, unless the schedule is right."""
    problems = find_problems(schedule, rendezvous=rendezvous)
    if problems:
        raise ScheduleError(schedule, problems)


def _unequal_messages(graph: Graph) -> list[Problem]:
    found = []
    for node in graph.nodes:
        if node.action.kind != "recv":
            continue
        sender = graph.nodes[graph.partner[node.id]]
        ends = [
            [(values[part.value].dtype, values[part.value].row_size, part.rows) for part in parts]
            for values, parts in (
                (graph.schedule.by_rank[sender.rank], sender.action.reads),
                (graph.schedule.by_rank[node.rank], node.action.writes),
            )
        ]
        if ends[0] != ends[1]:
            text = f"receives {_layout(ends[1])}, but {sender} sends {_layout(ends[0])}"
            found.append(
                node.problem("unequal message", text, node.action.writes[0].value if node.action.writes else "")
            )
    return found


def _layout(end: list[tuple[str, tuple[int, tuple[str, ...]], int]]) -> str:
    parts = (f"{rows} × {'×'.join([str(size[0]), *size[1]])} B of {dtype}" for dtype, size, rows in end)
    return ", ".join(parts) or "nothing"


def _deadlock(graph: Graph, *, rendezvous: bool) -> list[Problem]:
    """One problem for each lane that stops, naming what its first stuck action waits for."""
    happened = set(order(graph, rendezvous=rendezvous))
    found = []
    for _, _, ids in graph.lanes:
        stuck = next((node for node in ids if (node, FINISH) not in happened), None)
        if stuck is None:
            continue
        phase = FINISH if (stuck, START) in happened else START
        missing = [event for event in graph.before(stuck, phase, rendezvous=rendezvous) if event not in happened]
        waits = "; ".join(f"{'the start' if p == START else 'the end'} of {graph.nodes[n]}" for n, p in missing)
        node = graph.nodes[stuck]
        sends = " when sends wait for their receive" if rendezvous else ""
        value = (node.action.reads or node.action.writes)[0].value
        found.append(node.problem("deadlock", f"stops for ever{sends}: it waits for {waits}", value))
    return found


def out_of_order(graph: Graph) -> list[Problem]:
    """Messages that a transport without tags would mix up: two lanes must exchange theirs in the same order."""
    found, latest = [], {}
    for node in graph.nodes:
        if node.action.kind == "send":
            other = graph.nodes[graph.partner[node.id]]
            before = latest.setdefault((node.lane_id, other.lane_id), other)
            if other.index < before.index:
                found.append(node.problem("message order", f"sent after, but received before, {before}"))
            latest[node.lane_id, other.lane_id] = other
    return found
