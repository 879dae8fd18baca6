"""`undertow simulate SCHEDULE --ranks N --machine FILE`: a schedule's modelled timeline as table, JSON and picture.

SCHEDULE is a builder's name or a file in the text form. Everything printed says that it is modelled; without a machine
file the rates are assumed ones, and the output says that too. The schedule is checked before it is simulated.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..dist.command_line import application, run_application
from ..dist.errors import UserError
from ..dist.machine import Machine
from ..dist.units import format_bytes, format_flops, format_rate, format_seconds, parse_bytes
from .builders.attention_shape import Heads
from .builders.catalog import ATTENTION_HEADS, CATALOG, by_name
from .check import check
from .cost import rank_costs
from .gantt import draw
from .network import TOPOLOGIES, Network, fastest, of_machine
from .schedule import Schedule
from .schedule_text import load
from .simulate import ASSUMED, simulate
from .simulate_peers import ideal_s, table, ways
from .timeline import lane_table, span_table
from .topologies import PRESETS, preset

app = application()
_MANY_ROWS = 60
_FILE_COLUMNS = 120  # a file or pipe has no width of its own


def main(argv: list[str]) -> int:
    """The command line after `undertow simulate`; returns the exit code. `t3 …` goes to the paper's simulator."""
    if argv[:1] == ["t3"]:
        from .t3_paper.cli import main as t3

        return t3(argv[1:])
    return run_application(app, argv, "undertow simulate")


@app.command()
def _simulate(
    schedule: Annotated[
        str, typer.Argument(help="a builder's name, a schedule's text file, or `peers`; none lists the names")
    ] = "",
    ranks: Annotated[int | None, typer.Option(help="number of ranks (default 4, or what the file says)", min=1)] = None,
    machine: Annotated[str, typer.Option(metavar="FILE", help="from `undertow probe`; otherwise assumed rates")] = "",
    size: Annotated[str, typer.Option("--bytes", help="size of a builder's schedule, such as 16MiB")] = "16MiB",
    topology: Annotated[
        str,
        typer.Option(help=f"what the link's rate limits ({', '.join(TOPOLOGIES)}), or a preset: {', '.join(PRESETS)}"),
    ] = "ports",
    heads: Annotated[str, typer.Option(metavar="Q:K", help="of `peers`: query and key heads, of 128 each")] = "",
    transport: Annotated[str, typer.Option(help="which link of the machine file (default: the fastest)")] = "",
    rendezvous: Annotated[bool, typer.Option("--rendezvous", help="a send moves no byte before its receive")] = False,
    text: Annotated[bool, typer.Option("--text", help="print the schedule in text form, and nothing else")] = False,
    all_ranks: Annotated[bool, typer.Option("--all", help="every rank's actions, however many")] = False,
    json: Annotated[str, typer.Option(metavar="FILE", help="write the timeline as JSON")] = "",
    png: Annotated[str, typer.Option(metavar="FILE", help="draw the timeline (needs the extra `plots`)")] = "",
) -> None:
    """Simulate a communication schedule on a model of a machine. The result is modelled, not measured."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=_FILE_COLUMNS)
    if not schedule:
        _list(console)
        return
    if schedule == "peers":
        _compare(console, 4 if ranks is None else ranks, size, _heads(heads), machine, topology, transport)
        return
    if heads:
        raise UserError(f"--heads {heads} of {schedule}", expected="`undertow simulate peers --heads Q:K` only")
    plan = _schedule(schedule, ranks, size)
    if text:
        sys.stdout.write(str(plan))
        return
    rates = Machine.load(Path(machine)) if machine else ASSUMED
    network, link = _network(rates, topology, transport)
    check(plan, rendezvous=rendezvous)
    timeline = simulate(plan, rates, network=network, rendezvous=rendezvous)
    if json:
        timeline.dump(_writable(json))
    if png:
        draw(timeline, _writable(png))
    few = all_ranks or len(timeline.spans) <= _MANY_ROWS
    console.print(span_table(timeline, range(plan.world) if few else [0]))
    if not few:
        console.print(f"rank 0 of {plan.world}; --all shows {len(timeline.spans)} actions\n")
    console.print(lane_table(timeline))
    _summary(console, plan, rates, network, link)
    console.print(f"modelled time: {format_seconds(timeline.makespan_s)}")


def _network(rates: Machine, topology: str, transport: str) -> tuple[Network, str]:
    """The network, and how to name it."""
    if topology in PRESETS:
        return preset(topology), f"preset {topology}: {PRESETS[topology].about}"
    network = of_machine(rates, topology=topology, transport=transport)
    return network, f"{transport or fastest(rates)}, per {TOPOLOGIES[topology]}"


def _heads(text: str) -> Heads:
    """'32:8' as heads; '' for those of the catalogue."""
    if not text:
        return ATTENTION_HEADS
    q, _, k = text.partition(":")
    if not (q.isdigit() and k.isdigit() and int(k) and int(q) and int(q) % int(k) == 0):
        raise UserError(f"--heads {text}", expected="query heads, a colon, and key heads that divide them, as 32:8")
    return replace(ATTENTION_HEADS, q_heads=int(q), kv_heads=int(k))


def _compare(
    console: Console, world: int, size: str, h: Heads, machine: str, topology: str, transport: str
) -> None:  # fmt: skip
    """Every way of the field and of ours, on one model."""
    rates = Machine.load(Path(machine)) if machine else ASSUMED
    network, link = _network(rates, topology, transport)
    entry = CATALOG["attention_ring_kv"]
    rows = max(1, round(parse_bytes(size, name="--bytes") / entry.row_bytes))
    problem = world, rows + rows % 2, h, rates
    found = list(ways(*problem, network))
    console.print(table(found, ideal_s(*problem), f"causal attention, {world} ranks of {rows + rows % 2:,} tokens"))
    assumed = " (kernel rates are assumed: no --machine file was given)" if machine == "" else ""
    console.print(f"machine: {rates.name}{assumed}; link {link}", soft_wrap=True)
    console.print(
        f"{h.q_heads}:{h.kv_heads} heads of {h.head_dim} in {h.dtype}, partial results in {h.wire or h.partial}, the "
        "same kernels for all: what is compared is "
        "what travels when. Attention stands still while results are merged beside it. * is the fastest; ideal is the "
        "attention alone, dealt out evenly. Modelled, not measured.",
        soft_wrap=True,
    )
    for way in found:
        if way.reason:
            console.print(f"{way.name}: {way.reason}", soft_wrap=True)


def _schedule(name: str, ranks: int | None, size: str) -> Schedule:
    if name in CATALOG:
        return by_name(name, 4 if ranks is None else ranks, parse_bytes(size, name="--bytes"))
    if not Path(name).exists():
        near = get_close_matches(name, CATALOG, 3, 0.4)
        raise UserError(
            f"'{name}' is neither a schedule's name nor a file",
            expected="a file in text form, or a name that `undertow simulate` lists",
            remedy=f"undertow simulate {' or '.join(near)}" if near else "",
        )
    plan = load(Path(name))
    if ranks not in (None, plan.world):
        raise UserError(f"--ranks {ranks}, but the file {name} is a schedule for {plan.world} ranks")
    return plan


def _writable(name: str) -> Path:
    path = Path(name)
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: its folder does not exist", remedy=f"mkdir -p {path.parent}")
    return path


def _list(console: Console) -> None:
    console.print("schedules, and what --bytes means for each:")
    width = max(map(len, CATALOG))
    for name, entry in CATALOG.items():
        console.print(f"  {name:<{width}}  {entry.meaning}", soft_wrap=True)
    console.print("and `undertow simulate peers`: all attention schedules, the field's and ours, in one table")
    console.print("and `undertow simulate t3`: the evaluation of the T3 paper, or its hardware under your model")


def _summary(console: Console, plan: Schedule, machine: Machine, network: Network, link: str) -> None:
    costs = rank_costs(plan)
    limit = min(network.port_bytes_per_s, network.pair_bytes_per_s, network.bus_bytes_per_s)
    assumed = " (rates are assumed: no --machine file was given)" if machine is ASSUMED else ""
    console.print(
        f"machine: {machine.name}{assumed}; link {format_rate(limit)} ({link}), "
        f"{format_seconds(network.latency_s)}, {'duplex' if network.duplex else 'one direction at a time'}",
        soft_wrap=True,
    )
    most = max(costs, key=lambda cost: cost.sent_bytes)
    console.print(
        f"most per rank: {format_bytes(most.sent_bytes)} sent in {most.messages_sent} messages, "
        f"{format_flops(max(cost.flops for cost in costs)).removesuffix('/s')}, "
        f"{format_bytes(max(cost.buffer_bytes for cost in costs))} of buffers and outputs",
        soft_wrap=True,
    )
