"""Modelled: every attention schedule of the field on 2 to 64 ranks, with the same kernels on the same links.

    python benchmarks/attention_modelled.py --output attention_modelled
    python benchmarks/attention_modelled.py --blocks attention_blocks.json --output attention_modelled

The schedules are the ones that the executor runs, and the peers' are written by the same builders, so what differs is
what travels when. Nothing here is a measurement of those projects: their kernels, their launch times and their bugs
are not in it. Kernel rates, what a kernel loses at its start and end, and what a merge costs the attention beside it,
are measured where `--blocks` brings the result of benchmarks/attention_blocks.py. The ideal is the work at the
kernel's rate, divided by the ranks, without starts. With so many tokens per rank a ring's blocks have the same shapes
for every number of ranks, and those were timed; blocks of Ulysses, USP and joined arrivals grow with the ranks, and
take what the line through the timed shapes says (time = operations / rate + start). All figures are ranges. One end:
nominal links (`comms.topologies`), and merges that cost the attention beside them nothing (measured: the least of what
they cost). The other: half of those links, and attention that stands still while a merge runs beside it (measured: the
most). Peers merge between blocks.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from undertow.benchmarks.facts import facts
from undertow.comms.builders.attention_shape import Heads
from undertow.comms.builders.peers import PEERS, Peer, peer_schedule
from undertow.comms.network import Network
from undertow.comms.schedule import Schedule
from undertow.comms.topologies import PRESETS, preset
from undertow.dist.machine import Link
from undertow.parallel.masks import Mask
from undertow.parallel.token_ring.planner import Rates, choose, predict
from undertow.parallel.token_ring.problem import Problem, shape_of

H100 = (641e12, 545e12)  # cuDNN, causal, 32 heads of 128 at 32K tokens, measured on one H100: flop/s of each phase
COPY = 1.5e12  # bytes/s of a copy within its memory
LINKS = (1.0, 0.5)  # of the nominal rate, best and worst
DRAGS = (
    0.0,
    1.0,
)  # how much of a merge's time the attention beside it loses, best and worst, where nothing measured it
RATE_FIELDS = ("port_bytes_per_s", "pair_bytes_per_s", "bus_bytes_per_s", "far_bytes_per_s")


@dataclass(frozen=True)
class Cell:
    """Modelled. `seconds` and `efficiency` (ideal / seconds) at both ends of `LINKS` and `drags`."""

    topology: str
    heads: str
    ranks: int
    phase: str
    way: str
    schedule: str
    sent_bytes: int
    seconds: tuple[float, ...]
    efficiency: tuple[float, ...]
    drags: tuple[float, float]


def slower(network: Network, scale: float) -> Network:
    return replace(network, **{name: getattr(network, name) * scale for name in RATE_FIELDS})


def schedule_of(peer: Peer, problem: Problem, backward: bool, *, goals: bool = False) -> Schedule | None:
    """What the peer would run; None where it cannot (heads that do not divide)."""
    name = peer.names[backward]
    if problem.possible(name) or (name == "ulysses" and problem.kv_copies(name) > 1 and problem.world > 32):
        return None
    return peer_schedule(peer, shape_of(problem, name), causal=problem.mask.causal, backward=backward, goals=goals)


@dataclass(frozen=True)
class Job:
    """One column of a table: one topology, ratio of heads, number of ranks and phase. `flops`, `starts`: of each phase;
    `drags`: at both ends of the assumptions."""

    problem: Problem
    topology: str
    backward: bool
    flops: tuple[float, float]
    starts: tuple[float, float]
    drags: tuple[float, float]

    @property
    def heads(self) -> str:
        return f"{self.problem.heads.q_heads}:{self.problem.heads.kv_heads}"

    @property
    def phase(self) -> str:
        return "backward" if self.backward else "forward"

    def __str__(self) -> str:
        return f"{self.topology} {self.heads} P={self.problem.world} {self.phase}"


def cells(job: Job) -> list[Cell]:
    """Every way's cell."""
    problem, found = job.problem, []
    rates = [
        Rates("preset " + job.topology, job.flops, COPY, slower(preset(job.topology), scale), 0.0, drag, job.starts)
        for scale, drag in zip(LINKS, job.drags)
    ]
    ideal = sum(total.flops for total in problem.totals("ring_kv", backward=job.backward)) / problem.world
    ideal_s = ideal / job.flops[job.backward]
    plans: dict[str, Schedule | None] = {
        way: schedule_of(peer, replace(problem, layout=peer.layout), job.backward) for way, peer in PEERS.items()
    }
    chosen = choose(problem, rates[0], backward=job.backward).name
    plans["undertow, predicted"] = problem.schedule(chosen, backward=job.backward, goals=False)
    for way, plan in plans.items():
        if plan is None:
            continue
        seconds = tuple(predict(plan, rate) for rate in rates)
        sent = sum(plan.nbytes(r, *a.reads) for r, _, _, a in plan.actions() if a.kind == "send") // plan.world
        efficiency = tuple(ideal_s / s for s in seconds)
        of_job = job.topology, job.heads, problem.world, job.phase
        found.append(Cell(*of_job, way, plan.name, sent, seconds, efficiency, job.drags))
    return found


def measured_rates(file: str, heads: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """(flop/s of each phase, seconds that a kernel's start takes in each), from a result of attention_blocks: the line
    time = flops / rate + start with the least squares of relative errors over all shapes of blocks with so many query
    heads; grouped heads are the same work."""
    cells = json.loads(Path(file).read_text())["cells"]
    rows = [c for c in cells if c["heads"].split(":")[0] == heads.split(":")[0] and c["backend"] == "best"]
    rates, starts = [], []
    for phase, width in (("forward", 4), ("backward", 10)):
        points = list[tuple[int, float]]()
        for shape, ms in (item for c in rows if c["phase"] == phase for item in c["shapes"].items()):
            size, kind = shape.split(" ", 1)
            q, k = map(int, size.split("×"))
            if kind in ("causal", "full", "joined"):
                pairs = q * (q + 1) // 2 if kind == "causal" else q * k
                points.append((pairs * int(heads.split(":")[0]) * 128 * width, ms / 1e3))
        line = Link.fit(points)
        rates.append(line.bytes_per_s)
        starts.append(line.latency_s)
    return (rates[0], rates[1]), (starts[0], starts[1])


def measured_drags(file: str, heads: str) -> tuple[float, float]:
    """Least and most that attention lost beside a merge, in shares of the merge's time, from the same result; within 0
    to 1, as the simulator takes it. `DRAGS` where these heads were not measured. Streams as the executor's: priority 0.
    """
    pairs = json.loads(Path(file).read_text()).get("beside", [])
    found = [min(max(p["drag"], 0.0), 1.0) for p in pairs if p["heads"] == heads and p["priority"] == 0]
    return (min(found), max(found)) if found else DRAGS


def tables(rows: Sequence[Cell]) -> list[Table]:
    """One per topology, heads and phase: efficiency in %, at the worst … best end of the assumptions."""
    done = []
    for key in dict.fromkeys((c.topology, c.heads, c.phase) for c in rows):
        mine = [c for c in rows if (c.topology, c.heads, c.phase) == key]
        ranks = sorted({c.ranks for c in mine})
        shown = Table(
            title=f"modelled: {', '.join(key)}; % of ideal, worst … best end of the assumptions", title_justify="left"
        )
        shown.add_column("way")
        for n in ranks:
            shown.add_column(f"P = {n}", justify="right")
        for way in dict.fromkeys(c.way for c in mine):
            by_rank = {c.ranks: c for c in mine if c.way == way}
            shown.add_row(way, *(_range(by_rank.get(n), "undertow" in way) for n in ranks))
        done.append(shown)
    return done


def _range(cell: Cell | None, named: bool) -> str:
    if cell is None:
        return "–"
    low, high = (f"{100 * e:.0f}" for e in (min(cell.efficiency), max(cell.efficiency)))
    return (low if low == high else f"{low}…{high}") + (f" {cell.schedule}" if named else "")


def draw(rows: Sequence[Cell], path: Path) -> None:
    """Efficiency over ranks, a panel for each topology, heads and phase."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = list(dict.fromkeys((c.topology, c.heads, c.phase) for c in rows))
    figure, axes = plt.subplots(
        -(-len(keys) // 4), min(4, len(keys)), figsize=(18, 4 * -(-len(keys) // 4)), squeeze=False
    )
    for panel, key in zip(axes.flat, keys):
        mine = [c for c in rows if (c.topology, c.heads, c.phase) == key]
        for way in dict.fromkeys(c.way for c in mine):
            line = sorted((c for c in mine if c.way == way), key=lambda c: c.ranks)
            thick = dict(linewidth=2.5, color="black") if "undertow" in way else {}
            panel.plot([c.ranks for c in line], [100 * c.efficiency[0] for c in line], marker="o", label=way, **thick)
        panel.set(title=", ".join(key), xscale="log", xlabel="ranks", ylabel="% of ideal (modelled)", ylim=(0, 105))
        panel.set_xscale("log", base=2)
    axes.flat[0].legend(fontsize=7)
    figure.suptitle("modelled, not measured: schedules with the same kernels on nominal links")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main(argv: Sequence[str]) -> int:
    options = _arguments(argv)
    rows, deadline_s = list[Cell](), time.monotonic() + options.seconds
    fork = multiprocessing.get_context("fork")  # no tensor is touched here, so no thread of torch's is missed there
    # No cycles are made, and looking for some among the million objects of 64 ranks took half of the time.
    with ProcessPoolExecutor(options.workers, mp_context=fork, initializer=gc.disable) as pool:
        todo = [(job, pool.submit(cells, job)) for job in jobs(options)]
        for job, found in todo:
            try:
                rows += found.result(max(0.0, deadline_s - time.monotonic()))
                print(job, file=sys.stderr, flush=True)
            except TooLate:
                found.cancel()
                print(f"out of time before {job}")
    for shown in tables(rows):
        Console(width=170).print(shown)
    if options.output:
        _write(rows, options)
    return 0


def jobs(options: argparse.Namespace) -> list[Job]:
    found = []
    for ranks, topology, (q_heads, kv_heads) in product(options.ranks, options.topologies, options.heads):
        heads = Heads(1, q_heads, kv_heads, 128, 128, "bfloat16", "float32", options.wire)
        (flops, starts), drags = (H100, (0.0, 0.0)), DRAGS
        if options.blocks:
            flops, starts = measured_rates(options.blocks, f"{q_heads}:{kv_heads}")
            drags = measured_drags(options.blocks, f"{q_heads}:{kv_heads}")
        problem = Problem(ranks, ranks * options.tokens, ranks * options.tokens, heads, Mask(causal=True))
        found += [Job(problem, topology, backward, flops, starts, drags) for backward in (False, True)]
    return found


def _write(rows: Sequence[Cell], options: argparse.Namespace) -> None:
    base = Path(options.output)
    kernels = options.blocks and "measured: " + Path(options.blocks).name or "H100, cuDNN at 32K, measured once"
    found = {"modelled": True, "kernels": kernels, "tokens per rank": options.tokens, "facts": facts(("torch",))}
    base.with_suffix(".json").write_text(json.dumps({**found, "cells": [asdict(c) for c in rows]}, indent=1) + "\n")
    console = Console(width=170, record=True, file=open(base.with_suffix(".txt"), "w"))  # noqa: SIM115
    for shown in tables(rows):
        console.print(shown)
    console.file.close()
    draw(rows, base.with_suffix(".png"))


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(x) for x in text.split(",")]

    def pairs(text: str) -> list[tuple[int, int]]:
        return [(int(a), int(b)) for a, b in (x.split(":") for x in text.split(","))]

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=numbers, default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--heads", type=pairs, default=[(32, 32), (32, 8)], help="query:key heads of 128")
    parser.add_argument("--tokens", type=int, default=8192, help="of each rank")
    parser.add_argument("--topologies", type=lambda t: t.split(","), default=["nvswitch", "two_level"],
                        help=f"of {', '.join(PRESETS)}")  # fmt: skip
    parser.add_argument(
        "--wire", default="", help="dtype of partial results; default: 16 bits where nothing is lost by it"
    )
    parser.add_argument("--blocks", default="", help="JSON of benchmarks/attention_blocks.py")
    parser.add_argument("--seconds", type=float, default=600.0, help="no column is begun after this")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, each with a column at a time")
    parser.add_argument("--output", default="", help="writes OUTPUT.json, .txt and .png")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
