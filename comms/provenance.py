"""Every needed block exactly once: run the schedule on terms instead of numbers, then compare with its goals.

A receive holds what was sent, a copy what was copied, a reduce or merge the multiset sum of its reads, and any other
operation becomes a new atom over exactly the rows that it read (see `terms`). An output is right when its term equals
the goal, so a block that is missing, doubled, masked otherwise or taken from the wrong rank shows. No block may be
computed twice, and none that no goal needs: that would be wasted work, or a sign of a wrong plan.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter
from operator import itemgetter

from .actions import Compute, Slice
from .graph import FINISH, Graph, Node, order
from .problems import Problem
from .schedule import Goal, Schedule
from .terms import Applied, Content, applied, block_key, combined, cut, join, origin, rows_of

_start = itemgetter(0)


class _Memory:
    """What each value of each rank holds so far, as pieces of rows in order."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.pieces: list[dict[str, list[tuple[int, Content]]]] = [{} for _ in range(schedule.world)]

    def read(self, rank: int, part: Slice) -> Content:
        if self.schedule.value(part.value, rank).role == "input":
            return origin(part.value, rank, part.start, part.stop)
        pieces = self.pieces[rank].get(part.value, [])
        found = []
        for start, content in pieces[max(0, bisect_right(pieces, part.start, key=_start) - 1) :]:
            if start >= part.stop:
                break
            low, high = max(part.start, start), min(part.stop, start + rows_of(content))
            if low < high:
                found.append(cut(content, low - start, high - start))
        return join(found)

    def write(self, rank: int, part: Slice, content: Content) -> None:
        insort(self.pieces[rank].setdefault(part.value, []), (part.start, content), key=_start)


def unmet_goals(graph: Graph) -> list[Problem]:
    """Faults of meaning. The graph must be free of structural faults, unequal messages and deadlock."""
    memory, found = _Memory(graph.schedule), []
    made: dict[str, Node] = {}
    for event, phase in order(graph):
        if phase == FINISH:
            found += _step(graph, graph.nodes[event], memory, made)
    if found:
        return found
    wanted: set[str] = set()
    for goal in graph.schedule.goals:
        found += _compare(graph.schedule, goal, memory)
        _blocks(goal.content, wanted)
    found += _without_goal(graph.schedule)
    for block, node in made.items():
        if block not in wanted:
            found.append(node.problem("not needed", "no goal holds what it computes"))
    return found


def _step(graph: Graph, node: Node, memory: _Memory, made: dict[str, Node]) -> list[Problem]:
    action = node.action
    if action.kind == "recv":
        sender = graph.nodes[graph.partner[node.id]]
        contents = [memory.read(sender.rank, part) for part in sender.action.reads]
    elif isinstance(action, Compute) and action.kind == "compute":
        args = tuple(memory.read(node.rank, part) for part in action.reads)
        contents = [applied(action.label, args, part.rows, output=i) for i, part in enumerate(action.writes)]
        block = Applied(action.label, args, 0, 0).block
        if block in made:
            return [node.problem("computed twice", f"{made[block]} computes the same")]
        made[block] = node
    elif isinstance(action, Compute):
        reads = [memory.read(node.rank, part) for part in action.reads]
        fault, contents = _sum(node, action, reads)
        if fault:
            return [node.problem("wrong sum", fault, action.writes[0].value if action.writes else "")]
    elif action.kind == "send":
        contents = [() for _ in action.writes]
    else:
        return []
    for part, content in zip(action.writes, contents):
        memory.write(node.rank, part, content)
    return []


def _sum(node: Node, action: Compute, reads: list[Content]) -> tuple[str, list[Content]]:
    """The contents that a copy, reduce or merge writes, or what is wrong with it."""
    width = len(action.writes)
    rows = {part.rows for part in action.reads + action.writes}
    if not width or len(reads) % width or not reads or (action.kind == "copy" and len(reads) != width):
        return f"{len(reads)} reads for {width} writes", []
    groups = [reads[at : at + width] for at in range(0, len(reads), width)]
    if action.kind == "copy":
        unequal = [(a, b) for a, b in zip(action.reads, action.writes) if a.rows != b.rows]
        return (f"{unequal[0][0]} and {unequal[0][1]} differ in rows" if unequal else ""), reads
    if len(rows) != 1:
        return f"its slices have {', '.join(map(str, sorted(rows)))} rows; a sum needs equally many", []
    for group in groups:
        if width > 1 and len({block_key(content) for content in group}) > 1:
            return f"the reads of one group of {width} are results of different blocks", []
    try:
        return "", [combined(action.label, [group[i] for group in groups]) for i in range(width)]
    except ValueError as error:
        return str(error), []


def _compare(schedule: Schedule, goal: Goal, memory: _Memory) -> list[Problem]:
    value = schedule.by_rank[goal.rank].get(goal.rows.value) if 0 <= goal.rank < schedule.world else None
    if value is None or value.role != "output" or not 0 <= goal.rows.start < goal.rows.stop <= value.rows:
        return [Problem("goal", "it names no rows of an output of this rank", goal.rank, value=str(goal.rows))]
    held = memory.read(goal.rank, goal.rows)
    if held == goal.content:
        return []
    has, needs = (Counter(_atoms(content)) for content in (held, goal.content))
    lines = []
    for kind, difference in (("missing block", needs - has), ("unwanted block", has - needs)):
        twice = kind == "unwanted block" and all(atom in needs for atom in difference)
        lines += [
            Problem("block twice" if twice else kind, atom, goal.rank, value=str(goal.rows))
            for atom in sorted(difference)
        ]
    reason = f"it holds {'; '.join(map(str, held)) or 'nothing'} instead of the goal"
    return lines or [Problem("wrong sum", reason, goal.rank, value=str(goal.rows))]


def _atoms(content: Content) -> list[str]:
    return [atom.text(piece.rows) for piece in content for atom in piece.atoms]


def _blocks(content: Content, found: set[str]) -> None:
    """All calls that the content is made of."""
    for piece in content:
        for atom in piece.atoms:
            if isinstance(atom, Applied) and atom.block not in found:
                found.add(atom.block)
                for arg in atom.args:
                    _blocks(arg, found)


def _without_goal(schedule: Schedule) -> list[Problem]:
    found = []
    for rank, values in enumerate(schedule.by_rank):
        for name, value in values.items():
            if value.role != "output":
                continue
            end = 0
            for goal in sorted(
                (g.rows for g in schedule.goals if g.rank == rank and g.rows.value == name), key=lambda s: s.start
            ):
                if goal.start > end:
                    break
                end = max(end, goal.stop)
            if end < value.rows:
                found.append(Problem("no goal", f"rows from {end} on have no goal", rank, value=name))
    return found
