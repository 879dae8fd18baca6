"""The edges of a schedule, derived from names: which action follows which, and which send meets which receive.

All readers (check, local, p2p, simulate) walk this one graph, so none of them can understand a schedule differently. An
action is two events, its start and its finish; `order` is any order of events that the edges allow. Structural faults
(a name that is not declared, rows written twice, a message without its other end) are found on the way.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter

from .actions import Action, Compute, Recv, Send, Slice, Wait
from .problems import Problem, ScheduleError
from .schedule import Schedule

START, FINISH = 0, 1


@dataclass(frozen=True)
class Node:
    """An action in its place. `id` counts all actions of the schedule; `lane_id` all lanes."""

    id: int
    rank: int
    lane: str
    lane_id: int
    index: int
    action: Action

    def problem(self, kind: str, text: str, value: str = "") -> Problem:
        return Problem(kind, text, self.rank, self.lane, self.index, str(self.action), value)

    def __str__(self) -> str:
        return f"rank {self.rank}, lane {self.lane}, action {self.index} `{self.action}`"


@dataclass
class Graph:
    """Nodes and edges of a schedule; made by `build`, then only read.

    `previous[n]`: the action before n in its lane, or -1. `writers[n]`: the actions that write rows which n reads.
    `partner[n]`: the other end of the message, or -1. `accesses[rank]`: value → [(node, slice, is it a write)];
    a wait accesses nothing, it only learns that the rows are there.
    """

    schedule: Schedule
    nodes: list[Node] = field(default_factory=list)
    lanes: list[tuple[int, str, list[int]]] = field(default_factory=list)
    previous: list[int] = field(default_factory=list)
    writers: list[tuple[int, ...]] = field(default_factory=list)
    partner: list[int] = field(default_factory=list)
    accesses: list[dict[str, list[tuple[int, Slice, bool]]]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def before(self, node: int, phase: int, *, rendezvous: bool) -> list[tuple[int, int]]:
        """The events, as (node, phase), that must come before this one."""
        if phase == START:
            found = [(other, FINISH) for other in self.writers[node]]
            return found + ([(self.previous[node], FINISH)] if self.previous[node] >= 0 else [])
        found = [(node, START)]
        kind = self.nodes[node].action.kind
        if self.partner[node] >= 0 and (kind == "recv" or (kind == "send" and rendezvous)):
            found.append((self.partner[node], START))
        return found


def build(schedule: Schedule) -> Graph:
    """The graph of `schedule`. Faults stand in `problems`; edges are complete only when that list is empty."""
    graph = Graph(schedule, accesses=[{} for _ in range(max(schedule.world, 0))])
    if [program.rank for program in schedule.programs] != list(range(schedule.world)) or schedule.world < 1:
        found = ", ".join(str(program.rank) for program in schedule.programs)
        graph.problems.append(
            Problem("world", f"programs of ranks {found or 'none'}, expected one each for 0 … {schedule.world - 1}")
        )
        return graph
    _declarations(graph)
    for program in schedule.programs:
        for lane in program.lanes:
            _lane(graph, program.rank, lane.name, lane.actions)
    _match(graph)
    writes = [_write_once(graph, rank) for rank in range(schedule.world)]
    graph.writers = [_writers(graph, node, writes[node.rank]) for node in graph.nodes]
    return graph


def need(schedule: Schedule) -> Graph:
    """The graph of a schedule without structural faults; raises `ScheduleError` otherwise."""
    graph = build(schedule)
    if graph.problems:
        raise ScheduleError(schedule, tuple(graph.problems))
    return graph


class Frontier:
    """Which events may happen next: tell it what happened, and it names what that made possible.

    Whatever the order of telling, the same events happen in the end, so events that are missing at the end of one order
    are stuck in all of them.
    """

    def __init__(self, graph: Graph, *, rendezvous: bool = False) -> None:
        self._waiting: dict[tuple[int, int], int] = {}
        self._after: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self.first: list[tuple[int, int]] = []
        for node in range(len(graph.nodes)):
            for phase in (START, FINISH):
                before = graph.before(node, phase, rendezvous=rendezvous)
                self._waiting[node, phase] = len(before)
                for event in before:
                    self._after.setdefault(event, []).append((node, phase))
                if not before:
                    self.first.append((node, phase))

    def happened(self, event: tuple[int, int]) -> list[tuple[int, int]]:
        """The events that this one, the last of those they waited for, makes possible."""
        found = []
        for follower in self._after.get(event, ()):
            self._waiting[follower] -= 1
            if not self._waiting[follower]:
                found.append(follower)
        return found


def order(
    graph: Graph, *, rendezvous: bool = False, pick: Callable[[int], int] | None = None
) -> Iterator[tuple[int, int]]:
    """Events (node, phase) in an order that the edges allow, until no further event can happen.

    `pick(n)` chooses among n possible events; the default is first come, first served.
    """
    frontier = Frontier(graph, rendezvous=rendezvous)
    ready = deque(frontier.first)
    while ready:
        if pick is not None:
            ready.rotate(-pick(len(ready)))
        event = ready.popleft()
        yield event
        ready.extend(frontier.happened(event))


def _declarations(graph: Graph) -> None:
    schedule, seen = graph.schedule, set()
    for value in schedule.values:
        for rank in value.ranks or range(schedule.world):
            if not 0 <= rank < schedule.world:
                graph.problems.append(
                    Problem("world", f"declared for rank {rank} of {schedule.world}", value=value.name)
                )
            elif (rank, value.name) in seen:
                graph.problems.append(Problem("declared twice", "two declarations", rank, value=value.name))
            seen.add((rank, value.name))
    for rank, values in enumerate(schedule.by_rank):
        last = {value.slot: value for value in values.values()}
        for value in values.values():
            if value.slot and (value.role == "input" or (value.role == "output" and last[value.slot] is not value)):
                text = f"slot {value.slot} cannot hold an input, nor an output before its last value"
                graph.problems.append(Problem("slot", text, rank, value=value.name))


def _lane(graph: Graph, rank: int, name: str, actions: tuple[Action, ...]) -> None:
    if any((rank, name) == other[:2] for other in graph.lanes):
        graph.problems.append(Problem("lane", "two lanes of this name", rank, name))
    ids: list[int] = []
    graph.lanes.append((rank, name, ids))
    kinds = {"operation" if isinstance(a, Compute) else a.kind for a in actions if not isinstance(a, Wait)}
    if len(kinds) > 1:
        graph.problems.append(
            Problem("lane", f"it mixes {' and '.join(sorted(kinds))}; a lane carries one of these", rank, name)
        )
    for index, action in enumerate(actions):
        node = Node(len(graph.nodes), rank, name, len(graph.lanes) - 1, index, action)
        graph.previous.append(ids[-1] if ids else -1)
        graph.nodes.append(node)
        graph.partner.append(-1)
        ids.append(node.id)
        for part, is_write in [(s, False) for s in action.reads] + [(s, True) for s in action.writes]:
            if _known(graph, node, part) and not isinstance(action, Wait):
                graph.accesses[rank].setdefault(part.value, []).append((node.id, part, is_write))


def _known(graph: Graph, node: Node, part: Slice) -> bool:
    value = graph.schedule.by_rank[node.rank].get(part.value)
    if value is None:
        graph.problems.append(node.problem("unknown value", "not declared on this rank", part.value))
    elif not 0 <= part.start < part.stop <= value.rows:
        graph.problems.append(
            node.problem("rows", f"rows {part.start}:{part.stop} of a value with {value.rows} rows", part.value)
        )
    elif isinstance(node.action, Send) and part in node.action.writes and value.dtype != "token":
        graph.problems.append(node.problem("token", f"a send may write tokens only, not {value.dtype}", part.value))
    else:
        return True
    return False


def _match(graph: Graph) -> None:
    """Pair every send with its receive by (sender, receiver, tag)."""
    sends: dict[tuple[int, int, str], int] = {}
    recvs: dict[tuple[int, int, str], int] = {}
    for node in graph.nodes:
        action = node.action
        if not isinstance(action, (Send, Recv)):
            continue
        peer = action.to if isinstance(action, Send) else action.source
        if not 0 <= peer < graph.schedule.world or peer == node.rank:
            graph.problems.append(
                node.problem(
                    "peer", f"rank {peer} is not another rank of the {graph.schedule.world}; use a copy at home"
                )
            )
            continue
        table = sends if isinstance(action, Send) else recvs
        key = (node.rank, peer, action.tag) if isinstance(action, Send) else (peer, node.rank, action.tag)
        if key in table:
            graph.problems.append(node.problem("tag", f"tag {action.tag} is used twice between these two ranks"))
        table.setdefault(key, node.id)
    for key in sends.keys() | recvs.keys():
        if key not in recvs:
            node = graph.nodes[sends[key]]
            graph.problems.append(
                node.problem("unmatched send", f"rank {key[1]} has no receive {key[2]} from rank {key[0]}")
            )
        elif key not in sends:
            node = graph.nodes[recvs[key]]
            graph.problems.append(
                node.problem("unmatched receive", f"rank {key[0]} has no send {key[2]} to rank {key[1]}")
            )
        else:
            graph.partner[sends[key]], graph.partner[recvs[key]] = recvs[key], sends[key]
    graph.problems.sort(key=lambda p: (p.rank, p.lane, p.index))  # the sets above have no order of their own


def _write_once(graph: Graph, rank: int) -> dict[str, list[tuple[int, int, int]]]:
    """For each value its writers as (first row, row after the last, node) in the order of rows."""
    found = {}
    for name, value in graph.schedule.by_rank[rank].items():
        accesses = graph.accesses[rank].get(name, [])
        writes = sorted((part.start, part.stop, node) for node, part, is_write in accesses if is_write)
        found[name] = writes
        end, gaps = 0, False
        for start, stop, node in writes:
            if value.role == "input":
                graph.problems.append(graph.nodes[node].problem("input written", "an input may be read only", name))
            elif start < end:
                text = f"rows {start}:{min(end, stop)} have a writer already"
                graph.problems.append(graph.nodes[node].problem("written twice", text, name))
            gaps, end = gaps or start > end, max(end, stop)
        if value.role == "output" and (gaps or end < value.rows):
            graph.problems.append(Problem("output incomplete", "some rows of it are never written", rank, value=name))
    return found


def _writers(graph: Graph, node: Node, writes: dict[str, list[tuple[int, int, int]]]) -> tuple[int, ...]:
    found: set[int] = set()
    for part in node.action.reads:
        value = graph.schedule.by_rank[node.rank].get(part.value)
        if value is None or value.role == "input":
            continue
        candidates = writes[part.value]
        first = max(0, bisect_right(candidates, part.start, key=itemgetter(0)) - 1)
        covered = 0
        for start, stop, other in candidates[first:]:
            if start >= part.stop:
                break
            shared = min(part.stop, stop) - max(part.start, start)
            if shared > 0:
                found.add(other)
                covered += shared
        if covered < part.rows:
            graph.problems.append(
                node.problem("never written", f"no action writes all of rows {part.start}:{part.stop}", part.value)
            )
    return tuple(sorted(found))
