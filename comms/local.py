"""Run a schedule for all ranks in this one process: the reference executor, and the test bench of schedules.

By default events happen first come, first served, so a run repeats bit for bit. With a seed they happen in a random
order that the edges allow, as unkindly as a real transport may be: a receive's buffer is poisoned when the receive is
reached, and what a send carries is read at the last legal moment. A schedule that `check` accepts gives the same bits
for every seed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from .actions import Compute
from .graph import FINISH, Graph, need, order
from .ops import Ops, table
from .schedule import Schedule
from .storage import Storage, layout_of


class Stuck(RuntimeError):
    """The schedule stopped before its end; `check` says why."""


def run(
    schedule: Schedule,
    inputs: Sequence[Mapping[str, torch.Tensor]],
    ops: Ops | None = None,
    *,
    seed: int | None = None,
    rendezvous: bool = False,
    device: torch.device | str = "cpu",
) -> list[dict[str, torch.Tensor]]:
    """`inputs[rank]` by value name → the outputs of each rank by value name.

    `ops` adds to, and may replace, the built-in operations. Does not call `check`: a wrong schedule raises `Stuck`, or
    computes something wrong.
    """
    graph = need(schedule)
    memory = [Storage(layout_of(schedule, rank), inputs[rank], device=device) for rank in range(schedule.world)]
    if seed is not None:
        for rank, values in enumerate(schedule.by_rank):
            for value in values.values():
                if value.role != "input" and value.rows:
                    memory[rank].poison((value.all(),))
    functions = table(schedule, ops)
    generator = random.Random(seed)
    pick = None if seed is None else generator.randrange
    happened = 0
    carried: dict[int, list[torch.Tensor]] = {}
    for node, phase in order(graph, rendezvous=rendezvous, pick=pick):
        happened += 1
        _event(graph, memory, functions, carried, node, phase, poison=seed is not None)
    if happened < 2 * len(graph.nodes):
        raise Stuck(f"schedule {schedule.name} stopped after {happened} of {2 * len(graph.nodes)} events")
    return [storage.outputs for storage in memory]


def _event(
    graph: Graph,
    memory: list[Storage],
    functions: Ops,
    carried: dict[int, list[torch.Tensor]],
    node: int,
    phase: int,
    *,
    poison: bool,
) -> None:
    rank, action = graph.nodes[node].rank, graph.nodes[node].action
    if phase != FINISH:
        if action.kind == "recv" and poison:
            memory[rank].poison(action.writes)
    elif isinstance(action, Compute):
        functions[action.op](memory[rank].views(action.reads), memory[rank].views(action.writes), **dict(action.params))
    elif action.kind == "send" and node not in carried:
        carried[node] = [rows.clone() for rows in memory[rank].views(action.reads)]
    elif action.kind == "recv":
        sender = graph.partner[node]
        if sender not in carried:
            carried[sender] = [
                rows.clone() for rows in memory[graph.nodes[sender].rank].views(graph.nodes[sender].action.reads)
            ]
        for rows, target in zip(carried[sender], memory[rank].views(action.writes)):
            target.copy_(rows)
