"""`undertow simulate peers`: every way of the field and every schedule of ours on one model, forward and backward.

The kernels are the same for all, so what differs is what travels when; it is a comparison of schedules, not of
projects, and every table says that it is modelled. Peers merge between blocks, ours beside the next one; that is not
counted in our favour: attention is taken to stand still meanwhile (`drag` 1; measured on one H200: 0.6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.table import Table

from ..dist.errors import UserError
from ..dist.machine import Machine
from ..dist.units import format_bytes, format_seconds
from .builders.attention_named import SCHEDULES, even_attention
from .builders.attention_shape import Heads
from .builders.peers import PEERS, even_peer, exchanging
from .cost import rank_costs
from .network import Network
from .schedule import Schedule
from .simulate import simulate

PHASES = ("forward", "backward")


@dataclass(frozen=True)
class Way:
    """One row of the table. `seconds` and `sent_bytes` (of the rank that sends most) by phase, or why there is none."""

    name: str
    ours: bool
    seconds: tuple[float, ...] = ()
    sent_bytes: tuple[int, ...] = ()
    reason: str = ""


def ways(world: int, rows: int, heads: Heads, machine: Machine, network: Network) -> Iterator[Way]:
    """Causal attention over `world` ranks of `rows` (even) each: the peers first, then our schedules."""

    def named(name: str, backward: bool) -> Schedule:
        inner = exchanging(name, world, heads)
        return even_attention(name, world, rows, heads, causal=True, backward=backward, inner=inner)

    for name in PEERS:
        yield _way(name, False, lambda b, n=name: even_peer(n, world, rows, heads, backward=b), machine, network)
    for name in SCHEDULES:
        yield _way(name, True, lambda b, n=name: named(n, b), machine, network)


def _way(name: str, ours: bool, build: Callable[[bool], Schedule], machine: Machine, network: Network) -> Way:
    try:
        plans = [build(backward) for backward in (False, True)]
    except UserError as error:
        return Way(name, ours, reason=str(error).splitlines()[0])
    seconds = tuple(simulate(plan, machine, network=network, drag=1.0).makespan_s for plan in plans)
    sent = tuple(max(cost.sent_bytes for cost in rank_costs(plan)) for plan in plans)
    return Way(name, ours, seconds, sent)


def ideal_s(world: int, rows: int, heads: Heads, machine: Machine) -> tuple[float, ...]:
    """Of each phase: the attention alone, dealt out evenly, without a message or a merge."""
    found = []
    for phase in PHASES:
        plan = even_attention("all_gather_kv", world, rows, heads, causal=True, backward=phase == "backward")
        flops = sum(cost.flops for cost in rank_costs(plan)) / world
        found.append(flops / machine.flops[f"attention_{phase}/{heads.dtype}"])
    return tuple(found)


def table(found: list[Way], ideal: tuple[float, ...], title: str) -> Table:
    """A row for each way; the fastest of each phase is marked."""
    shown = Table(title=f"modelled: {title}", title_justify="left")
    shown.add_column("way")
    for phase in PHASES:
        for name in (phase, "of ideal", "most sent"):
            shown.add_column(name, justify="right", no_wrap=True)
    best = [min(way.seconds[i] for way in found if way.seconds) for i in (0, 1)]
    for at, way in enumerate(found):
        if way.ours and not found[at - 1].ours:
            shown.add_section()
        cells: list[str] = []
        for i in (0, 1):
            if way.reason:
                cells += ["–", "", ""]
                continue
            mark = " *" if way.seconds[i] == best[i] else ""
            share = f"{ideal[i] / way.seconds[i]:.0%}"
            cells += [format_seconds(way.seconds[i]) + mark, share, format_bytes(way.sent_bytes[i])]
        shown.add_row(("undertow " if way.ours else "") + way.name, *cells)
    return shown
