"""Run a schedule on a model of a machine: event-driven, over the same graph that the executors walk.

Operations take the time of `cost.action_seconds`; messages are flows over `network` resources, whose rates are divided
anew whenever a flow begins or ends. A receive ends one latency after the last byte has left. Of the contention of a
rank's lanes one kind is modelled: an operation without flops (a merge, a sum, a copy) takes `drag` of the rate of
those with flops beside it. Messages slow no operation down, and launching an action takes no time.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field

from ..dist.machine import Link, Machine
from .actions import Action, Compute, Recv, Send, Wait
from .cost import NO_SECONDS, Seconds, action_seconds
from .graph import FINISH, START, Frontier, Graph, Node, need
from .network import Network, Resource, fair_rates, of_machine
from .schedule import Schedule
from .timeline import Span, Timeline, Use

ASSUMED = Machine(
    "assumed",
    links={"assumed": Link(latency_s=5e-6, bytes_per_s=50e9)},
    copies={"d2d": 1.5e12},
    flops={
        f"{kind}/{dtype}": rate
        for kind, rates in {
            "gemm": {"bfloat16": 600e12, "float16": 600e12, "float32": 50e12, "float64": 50e12},
            "attention_forward": {"bfloat16": 400e12, "float16": 400e12, "float32": 25e12, "float64": 25e12},
            "attention_backward": {"bfloat16": 350e12, "float16": 350e12, "float32": 25e12, "float64": 25e12},
        }.items()
        for dtype, rate in rates.items()
    },
    facts={"source": "round figures for a current accelerator; not measured"},
)

Event = tuple[int, int]


@dataclass
class _Flow:
    """A message on its way. `left` in bytes."""

    left: float
    used: tuple[Resource, ...]
    rate: float = 0.0


@dataclass
class _Cores:
    """Operations that run on one rank: those with flops, by event, as [seconds left, since when]; others by number."""

    drag: float
    working: dict[Event, list[float]] = field(default_factory=dict)
    others: int = 0

    @property
    def rate(self) -> float:
        return max(0.0, 1.0 - self.drag * self.others)

    def change(self, now: float, others: int) -> dict[Event, float]:
        """As many other operations more (or fewer) from now on: when each one with flops will end; inf if it stands."""
        for work in self.working.values():
            work[0] -= (now - work[1]) * self.rate
            work[1] = now
        self.others += others
        return {
            event: now + max(left, 0.0) / self.rate if self.rate else math.inf
            for event, (left, _) in self.working.items()
        }


@dataclass
class _Wires:
    """Messages on their way, the rates they share, and what each resource has carried."""

    network: Network
    world: int
    flows: dict[int, _Flow] = field(default_factory=dict)
    capacity: dict[Resource, float] = field(default_factory=dict)
    carried: dict[Resource, float] = field(default_factory=dict)
    busy_s: dict[Resource, float] = field(default_factory=dict)
    changed: bool = False

    def begin(self, node: int, source: int, to: int, nbytes: int) -> None:
        resources = self.network.resources(source, to, self.world)
        self.capacity |= resources
        self.flows[node] = _Flow(float(nbytes), tuple(resources))
        self.changed = True

    def ends(self, now: float) -> dict[int, float]:
        """When each flow will end if no other begins or ends."""
        if self.changed:
            rates = fair_rates({node: flow.used for node, flow in self.flows.items()}, self.capacity)
            for node, rate in rates.items():
                self.flows[node].rate = rate
            self.changed = False
        return {node: now + (flow.left / flow.rate if flow.left else 0.0) for node, flow in self.flows.items()}

    def carry(self, seconds: float, ended: list[int]) -> None:
        """Move all flows on by `seconds`; those in `ended` have moved all of their bytes by then."""
        busy: set[Resource] = set()
        for node, flow in self.flows.items():
            moved = flow.left if node in ended else min(flow.left, flow.rate * seconds)
            flow.left -= moved
            busy.update(flow.used)
            for resource in flow.used:
                self.carried[resource] = self.carried.get(resource, 0.0) + moved
        for resource in busy:
            self.busy_s[resource] = self.busy_s.get(resource, 0.0) + seconds
        for node in ended:
            del self.flows[node]
            self.changed = True


class _Run:
    """A simulation at the moment `now`."""

    def __init__(
        self, graph: Graph, network: Network, durations: dict[int, float], rendezvous: bool, drag: float
    ) -> None:
        self.graph, self.durations = graph, durations
        self.cores = [_Cores(drag) for _ in range(graph.schedule.world)]
        self.due: dict[Event, float] = {}  # the valid one of an event's entries in the agenda
        self.wires = _Wires(network, graph.schedule.world)
        self.frontier = Frontier(graph, rendezvous=rendezvous)
        self.now = 0.0
        self.times: dict[Event, float] = {}
        self.began: dict[int, float] = {}  # by send: when its bytes began to move
        self.arrival: dict[int, float] = {}  # by receive: when its last byte is there
        self.listening: set[int] = set()  # receives that only wait for their bytes
        self.agenda: list[tuple[float, int, Event]] = []

    def run(self) -> None:
        possible = deque(self.frontier.first)
        while possible or self.agenda or self.wires.flows:
            while possible:
                possible.extend(self._begin(possible.popleft()))
            for event in self._next_moment():
                possible.extend(self._happen(event))

    def _begin(self, event: Event) -> list[Event]:
        """The event's conditions hold: let it happen now, or find out when it will."""
        node, phase = event
        action, rank = self.graph.nodes[node].action, self.graph.nodes[node].rank
        if phase == START or isinstance(action, Wait):
            return self._happen(event)
        if isinstance(action, Compute):
            self._compute(event, rank, action)
        elif isinstance(action, Send):
            self.began[node] = self.now
            self.wires.begin(node, rank, action.to, self.graph.schedule.nbytes(rank, *action.reads))
        elif node in self.arrival:
            self._plan(max(self.now, self.arrival[node]), event)
        else:
            self.listening.add(node)
        return []

    def _compute(self, event: Event, rank: int, action: Compute) -> None:
        """Begin an operation, which may slow down those that run."""
        cores = self.cores[rank]
        if action.flops:
            cores.working[event] = [self.durations[event[0]], self.now]
            self._replan(cores.change(self.now, 0))
        else:
            self._replan(cores.change(self.now, 1))
            self._plan(self.now + self.durations[event[0]], event)

    def _replan(self, ends: dict[Event, float]) -> None:
        for event, seconds in ends.items():
            if self.due.get(event) != seconds:
                self._plan(seconds, event)

    def _happen(self, event: Event) -> list[Event]:
        node, phase = event
        self.times[event] = self.now
        action = self.graph.nodes[node].action
        if phase == FINISH and isinstance(action, Compute):
            cores = self.cores[self.graph.nodes[node].rank]
            cores.working.pop(event, None)
            if not action.flops:
                self._replan(cores.change(self.now, -1))
        if phase == FINISH and isinstance(action, Send):
            receive = self.graph.partner[node]
            latency_s = self.wires.network.latency(self.graph.nodes[node].rank, action.to)
            self.arrival[receive] = self.now + latency_s
            if receive in self.listening:
                self._plan(self.arrival[receive], (receive, FINISH))
        return self.frontier.happened(event)

    def _plan(self, seconds: float, event: Event) -> None:
        self.due[event] = seconds
        if seconds < math.inf:
            heapq.heappush(self.agenda, (seconds, len(self.times), event))

    def _next_moment(self) -> list[Event]:
        """Go to the next moment at which something happens; the events of that moment."""
        while self.agenda and self.due.get(self.agenda[0][2]) != self.agenda[0][0]:
            heapq.heappop(self.agenda)  # planned anew since
        ends = self.wires.ends(self.now)
        moments = [*ends.values(), *(entry[0] for entry in self.agenda[:1])]
        if not moments:
            return []
        until = min(moments)
        ended = [node for node, end in ends.items() if end <= until]
        self.wires.carry(until - self.now, ended)
        self.now = until
        events: list[Event] = [(node, FINISH) for node in ended]
        while self.agenda and self.agenda[0][0] <= until:
            seconds, _, event = heapq.heappop(self.agenda)
            if self.due.get(event) == seconds:
                del self.due[event]
                events.append(event)
        return events


def simulate(
    schedule: Schedule,
    machine: Machine = ASSUMED,
    *,
    network: Network | None = None,
    op_seconds: Seconds = NO_SECONDS,
    rendezvous: bool = False,
    drag: float = 0.0,
) -> Timeline:
    """The modelled timeline of `schedule` on `machine`; deterministic.

    `network` replaces the machine's link; `op_seconds` the time of operations (by name: seconds, or a function of the
    action). `rendezvous`: bytes move only once the receive has been reached. `drag`: 0 if merges cost the attention
    beside them nothing, 1 if it stands still meanwhile. Raises `UserError` for a rate that the machine lacks, and
    `RuntimeError` for a schedule that deadlocks (`check` says where).
    """
    run = _played(schedule, machine, network, op_seconds, rendezvous, drag)
    return Timeline(
        schedule.name,
        schedule.world,
        machine.name,
        max(run.times.values(), default=0.0),
        tuple(_span(run, node) for node in run.graph.nodes),
        tuple(
            Use(" ".join(map(str, resource)), nbytes, run.wires.busy_s[resource])
            for resource, nbytes in sorted(run.wires.carried.items(), key=lambda item: str(item[0]))
        ),
    )


def makespan_s(schedule: Schedule, *, network: Network, op_seconds: Seconds, drag: float) -> float:
    """The seconds of `simulate` alone: a third faster, for who compares many schedules."""
    run = _played(schedule, ASSUMED, network, op_seconds, False, drag)
    return max(run.times.values(), default=0.0)


def _played(
    schedule: Schedule, machine: Machine, network: Network | None, op_seconds: Seconds, rendezvous: bool, drag: float
) -> _Run:
    graph = need(schedule)
    durations = {
        node.id: action_seconds(schedule, node.rank, node.action, machine, op_seconds)
        for node in graph.nodes
        if isinstance(node.action, Compute)
    }
    run = _Run(graph, network or of_machine(machine), durations, rendezvous, drag)
    run.run()
    if len(run.times) < 2 * len(graph.nodes):
        raise RuntimeError(f"schedule {schedule.name} stops before its end; check() says where")
    return run


def _span(run: _Run, node: Node) -> Span:
    action = node.action
    reached_s, start_s = run.times[node.id, START], run.times[node.id, START]
    moved = ()
    if isinstance(action, Send):
        start_s, moved = run.began[node.id], action.reads
    elif isinstance(action, Recv):
        start_s, moved = max(reached_s, run.began[run.graph.partner[node.id]]), action.writes
    nbytes = run.graph.schedule.nbytes(node.rank, *moved)
    finish_s = run.times[node.id, FINISH]
    texts = (action.kind, str(action), _brief(action))
    return Span(node.rank, node.lane, node.index, *texts, reached_s, start_s, finish_s, nbytes)


def _brief(action: Action) -> str:
    if isinstance(action, Compute):
        return f"{action.op if action.op == action.kind else f'{action.kind} {action.op}'} → {action.writes[0]}"
    if isinstance(action, Send):
        return f"send {action.reads[0]} → {action.to}"
    return f"recv {action.writes[0]} ← {action.source}" if isinstance(action, Recv) else f"wait {action.reads[0]}"
