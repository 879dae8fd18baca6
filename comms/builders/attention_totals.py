"""What an attention schedule will send and compute, without writing it: sums over needs and routes.

The same numbers as `cost.rank_costs` of the finished schedule (the tests compare them), in a hundredth of the time, so
that a planner can look at many schedules and many ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..actions import ITEM_BYTES
from .attention_block import blocks_of
from .attention_cargo import Cargo
from .attention_shape import INPUTS, OF_QUERIES, RESULTS, Need, Shape
from .routes import Route
from .running import Field


@dataclass
class Totals:
    """Of one rank. `sent_to`: bytes by receiver; `blocks`: operations of each call of attention."""

    sent_bytes: int = 0
    received_bytes: int = 0
    messages_sent: int = 0
    flops: int = 0
    sent_to: dict[int, int] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)


def totals(shape: Shape, routes: Sequence[Route], moves: str, *, backward: bool) -> list[Totals]:
    """The totals of each rank of the schedule that `attention` makes of the same arguments."""
    inner = shape.inner
    size = len(shape.q_rows) // inner
    found = [Totals() for _ in shape.q_rows]

    def message(source: int, to: int, nbytes: int) -> None:
        """Between teams; every share of the heads sends one of its own."""
        for column in range(inner if nbytes else 0):
            _message(found, source * inner + column, to * inner + column, nbytes)

    cargo = Cargo(shape, routes, moves, size, backward=backward)
    row = sum(_row_bytes(shape.field(name, inner)) for name in cargo.payload)
    for owner in range(size):
        for visitor in range(size):
            for part, route in enumerate(routes) if owner != visitor else ():
                low, high = cargo.rows(owner, visitor, part) or (0, 0)
                message(route.parent(owner, visitor), visitor, (high - low) * row)
    away = [group for group in RESULTS[backward] if (group[0] in OF_QUERIES) == (moves == "q")]
    back = sum(_row_bytes(shape.part(name, inner)) for group in away for name in group)
    for block in blocks_of(shape, routes, moves, size, backward=backward):
        place, flops = (block.parts[0][0] if moves == "q" else block.i), block.flops(shape, backward)
        for column in range(inner if flops else 0):
            found[place * inner + column].flops += flops
            found[place * inner + column].blocks.append(flops)
    for (i, j), needs in shape.needs.items():
        for need in needs:
            if i != j and need.area:
                place = j if moves == "q" else i
                message(place, i if moves == "q" else j, _rows(need, moves) * back)
    if inner > 1:
        _heads(found, shape, backward)
    return found


def _rows(need: Need, moves: str) -> int:
    return need.q1 - need.q0 if moves == "q" else need.k1 - need.k0


def _heads(found: list[Totals], shape: Shape, backward: bool) -> None:
    """The exchange of heads before, and of results after."""
    inner = shape.inner
    results = [name for group in RESULTS[backward] for name in group]
    for rank in range(len(found)):
        team = rank // inner * inner
        for other in range(team, team + inner):
            for name in INPUTS[backward] if other != rank else ():
                _message(found, rank, other, shape.rows(name, rank) * _row_bytes(shape.field(name, inner)))
            for name in results if other != rank else ():
                _message(found, other, rank, shape.rows(name, rank) * _row_bytes(shape.part(name, inner)))


def _message(found: list[Totals], source: int, to: int, nbytes: int) -> None:
    if nbytes:
        found[source].sent_bytes += nbytes
        found[source].sent_to[to] = found[source].sent_to.get(to, 0) + nbytes
        found[source].messages_sent += 1
        found[to].received_bytes += nbytes


def _row_bytes(of: Field) -> int:
    _, row, dtype = of
    return ITEM_BYTES[dtype] * math.prod(int(d) for d in row)
