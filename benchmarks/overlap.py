"""GEMM → reduce-scatter on gloo behind an emulated link: overlapped, as the gate chooses, and as PyTorch does it.

The link is a token bucket (`comms.link`) whose rate is set so that the reduce-scatter takes `ratio` × the product's
time on this machine; 'no link' is gloo as it is, where almost nothing can be hidden. Sequential is the same engine with
all sends behind the whole product. The rival is what a PyTorch user has: one `mm`, then `dist.reduce_scatter_tensor`,
which on an emulated link takes no less than its bytes need there. Inputs are whole numbers, so all arms must give the
same bits. `pieces` says what the gate chose (0 is sequential), and the row keeps why. Ranks are forked here:
`undertow bench overlap`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Measured, Trial
from undertow.benchmarks.crew import Crew
from undertow.benchmarks.overlap_choice import known
from undertow.comms.cuda_collectives import reduce_scatter_single
from undertow.comms.link import LinkModel
from undertow.parallel.overlap_arms import ARMS
from undertow.parallel.overlap_gate import hidden_seconds
from undertow.parallel.overlap_team import Team

# Ranks, and M×N×K of one rank's product; four ranks share this project's two cores. The first two are the goal's cells,
# the others are for judging the gate on more shapes (`overlap_choice`).
SHAPES = [(2, (2048, 1024, 1024)), (4, (1024, 1024, 1024)), (2, (4096, 512, 1024)), (2, (1024, 2048, 512)),
          (2, (512, 1024, 4096)), (4, (2048, 512, 512))]  # fmt: skip
RATIOS = (0.0, 0.5, 1.0, 2.0)  # reduce-scatter time / product time; 0: no emulated link
FIXED = tuple(arm.name for arm in ARMS)
TORCH = "mm, then reduce_scatter_tensor"


def cases(context: Context) -> list[Case]:
    """Each shape over four links."""
    found = []
    for world, shape in SHAPES if not context.quick else [(2, (256, 1024, 1024))]:
        for ratio in RATIOS if not context.quick else (0.0, 1.0):
            product = f"{world} ranks, {'×'.join(map(str, shape))}"
            found.append(
                Case(
                    name=f"{product}, {f'scatter / product = {ratio:g}' if ratio else 'no link'}",
                    build=partial(trial, world, shape, ratio, context.seed),
                    plain="sequential",
                    ours="auto",
                    nbytes=scattered_bytes(world, *shape[:2]),
                    group=product,
                    x=ratio,
                )
            )
    return found


def scattered_bytes(world: int, rows: int, columns: int) -> int:
    """What one rank sends."""
    return (world - 1) * rows // world * columns * 4


def trial(world: int, shape: tuple[int, int, int], ratio: float, seed: int) -> Trial:
    """A crew of `world` ranks; one team per arm, because a gate belongs to a team, each over a link of its own."""
    rows, columns, inner = shape
    inputs = [_inputs(shape, seed + rank) for rank in range(world)]
    crew = Crew(world, partial(_jobs, inputs, ratio))
    product_s = max(crew.run("product")[1])
    why = crew.run("decide")[1][0]
    scatter_s = ratio * product_s
    predicted = {
        arm.name: hidden_seconds(arm, world, product_s, scatter_s) if arm.overlap else product_s + scatter_s
        for arm in ARMS
    }
    predicted[TORCH] = product_s + scatter_s

    def run(name: str) -> Measured:
        seconds, found = crew.run(name)
        rights, pieces = zip(*found)
        return Measured(all(rights), seconds, {"pieces": float(pieces[0])} if name == "auto" else {})

    nbytes = scattered_bytes(world, rows, columns)
    facts = known(world, 2.0 * rows * columns * inner, nbytes, product_s, scatter_s, set_link=True)

    arms = [
        Arm(
            name,
            partial(run, name),
            predicted_s=predicted.get(name) if ratio else None,
            said=why if name == "auto" else "",
            facts=facts if name == "auto" else {},
        )
        for name in (*FIXED, "auto", TORCH)
    ]
    return Trial(arms, reference=lambda: True)


def _jobs(inputs: list[Any], ratio: float, rank: int, world: int) -> Mapping[str, Callable[[], Any]]:
    """On each rank. A job returns (is the answer right, pieces chosen)."""
    x, w = inputs[rank]
    wanted = torch.stack([a @ b for a, b in inputs]).sum(0).chunk(world)[rank]
    nbytes = scattered_bytes(world, x.shape[0], w.shape[1])
    product_s = _slowest(_product_s(x, w))
    link = LinkModel(nbytes / (ratio * product_s)) if ratio else None
    teams = {name: Team(overlap=name, link=link) for name in (*FIXED, "auto")}
    sizes = (x.shape[0] // world,) * world
    out = torch.empty(sizes[rank], w.shape[1])

    def ours(team: Team) -> torch.Tensor:
        return team.reduce_scatter(x, w, sizes)

    def decide() -> str:
        while teams["auto"].gate.chosen() is None:  # alike on all ranks
            ours(teams["auto"])
        return teams["auto"].explain()

    def plain() -> torch.Tensor:
        y = x @ w
        began_s = time.perf_counter()
        reduce_scatter_single(out, y)
        if link is not None:
            time.sleep(max(0.0, began_s + nbytes / link.bytes_per_s - time.perf_counter()))
        return out

    def judged(call: Callable[[], torch.Tensor], team: Team | None = None) -> Callable[[], Any]:
        def job() -> Any:
            found = call()
            arm = team.gate.chosen() if team is not None else None
            return torch.equal(found, wanted), arm.subchunks if arm is not None and arm.overlap else 0

        return job

    jobs = {name: judged(partial(ours, team), team) for name, team in teams.items()}
    return {**jobs, TORCH: judged(plain), "decide": decide, "product": lambda: product_s}


def _inputs(shape: tuple[int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    (m, n, k), generator = shape, torch.Generator().manual_seed(seed)
    a, b = (torch.randint(0, 2, sizes, generator=generator).float() for sizes in ((m, k), (k, n)))
    return a, b


def _product_s(x: torch.Tensor, w: torch.Tensor) -> float:
    """Measured while all ranks multiply, as they will."""
    out, seconds = x.new_empty(x.shape[0], w.shape[1]), []
    for _ in range(7):
        began_s = time.perf_counter()
        torch.mm(x, w, out=out)
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds[2:])


def _slowest(seconds: float) -> float:
    """The same link on all ranks."""
    cell = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(cell, dist.ReduceOp.MAX)
    return float(cell.item())


BENCHMARK = Benchmark(
    name="overlap",
    claim="a reduce-scatter hides beneath the product that feeds it, and the gate is never slower than sequential",
    cases=cases,
    rounds=15,
    packages=("torch",),
    x_label="reduce-scatter time / product time",
    choices=FIXED,
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["overlap", *sys.argv[1:]]))
