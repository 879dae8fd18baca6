"""What a schedule takes, without simulating it: bytes, operations, memory, and the seconds of each action.

Bytes are exact sums over the plan; the closed forms at the end hold where links do not contend and are what the
simulator is tested against (Thakur, Rabenseifner & Gropp 2005, section 4, for the ring).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..dist.errors import UserError
from ..dist.machine import Link, Machine
from .actions import Compute, Send
from .schedule import Schedule

Seconds = Mapping[str, float | Callable[[Compute], float]]
NO_SECONDS: Seconds = MappingProxyType({})


@dataclass(frozen=True)
class RankCost:
    """Totals of one rank. `buffer_bytes`: scratch memory and outputs, each slot counted once."""

    rank: int
    sent_bytes: int
    received_bytes: int
    messages_sent: int
    flops: int
    buffer_bytes: int


def rank_costs(schedule: Schedule) -> tuple[RankCost, ...]:
    """The totals of each rank."""
    sent, received, messages, flops = ([0] * schedule.world for _ in range(4))
    for rank, _, _, action in schedule.actions():
        if isinstance(action, Send):
            nbytes = schedule.nbytes(rank, *action.reads)
            sent[rank] += nbytes
            received[action.to] += nbytes
            messages[rank] += 1
        elif isinstance(action, Compute):
            flops[rank] += action.flops
    return tuple(
        RankCost(rank, sent[rank], received[rank], messages[rank], flops[rank], buffer_bytes(schedule, rank))
        for rank in range(schedule.world)
    )


def buffer_bytes(schedule: Schedule, rank: int) -> int:
    """Bytes that an executor allocates for `rank`: all but the inputs, values of one slot counted once."""
    slots: dict[tuple[str, str], int] = {}
    for name, value in schedule.by_rank[rank].items():
        if value.role != "input":
            key = ("slot", value.slot) if value.slot else ("value", name)
            slots[key] = max(slots.get(key, 0), value.nbytes)
    return sum(slots.values())


def action_seconds(
    schedule: Schedule, rank: int, action: Compute, machine: Machine, op_seconds: Seconds = NO_SECONDS
) -> float:
    """Seconds of an operation on `machine`.

    `op_seconds` wins: seconds, or a function of the action. Otherwise flops / rate of the action's engine; otherwise
    memory traffic, half of the bytes read and written at the rate of a copy within one memory.
    """
    given = op_seconds.get(action.op)
    if given is not None:
        return given(action) if callable(given) else given
    if action.flops:
        return action.flops / _rate(machine, "flops", action.engine)
    route = "d2d" if "d2d" in machine.copies else "host"
    return schedule.nbytes(rank, *action.reads, *action.writes) / 2 / _rate(machine, "copies", route)


def _rate(machine: Machine, table: str, key: str) -> float:
    rates: dict[str, float] = getattr(machine, table)
    if key not in rates:
        raise UserError(
            f"machine {machine.name} has no rate {table}['{key}']",
            expected=f"one of {', '.join(rates) or 'those that `undertow probe` measures'}",
            remedy="measure it with undertow probe, or choose a dtype that the machine file knows",
        )
    return rates[key]


def ring_seconds(world: int, chunk_bytes: float, link: Link) -> float:
    """A ring all-gather or reduce-scatter: world - 1 hops, each of which waits for the one before."""
    return (world - 1) * link.seconds(chunk_bytes)


def direct_seconds(world: int, chunk_bytes: float, link: Link) -> float:
    """A staggered direct reduce-scatter or all-to-all: each port sends world - 1 chunks; one latency shows."""
    return (world - 1) * chunk_bytes / link.bytes_per_s + (link.latency_s if world > 1 else 0.0)


def overlapped_scatter_seconds(world: int, gemm_s: float, scatter_s: float, subchunks: int = 1) -> float:
    """A staggered GEMM → direct reduce-scatter: the longer of the two, plus the part of the shorter that cannot hide.

    The first of world · subchunks pieces must be computed before anything is sent; the own chunk, computed last, hides
    behind the sends.
    """
    return max(gemm_s, gemm_s / (world * subchunks) + scatter_s)


def overlapped_columns_seconds(
    world: int, gemm_s: float, scatter_s: float, shares: Sequence[float], *, whole: bool = False
) -> float:
    """The same by pieces of columns, of these shares, each with the rows of every other rank; the own rows at last, or
    (`whole`) among those of each piece.

    A piece leaves when it is computed and those before it have left; only own rows at last hide the sends of the last
    piece.
    """
    ready_s = left_s = 0.0
    for share in shares:
        ready_s += share * gemm_s * (1.0 if whole else (world - 1) / world)
        left_s = max(ready_s, left_s) + share * scatter_s
    return max(gemm_s, left_s)
