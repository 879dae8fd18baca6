"""GEMM → reduce-scatter on gloo behind an emulated link: overlapped, in pieces, and as the gate chooses.

The link is a token bucket (`comms.link`) whose rate is set so that the reduce-scatter takes `ratio` × the product's
time on this machine; 'no link' is gloo as it is, where almost nothing can be hidden. All arms use one transport, and
sequential is the same schedule with one wait in front of its sends. Inputs are whole numbers, so all arms must give
the same bits. Needs several ranks, best one per core: ``torchrun --nproc-per-node 2 -m undertow bench overlap``.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Trial
from undertow.comms.cost import overlapped_scatter_seconds
from undertow.comms.link import LinkModel
from undertow.dist.errors import UserError
from undertow.parallel.overlapped_linear import Team

ROWS, INNER, OUTER = 2048, 1024, 1024
RATIOS = (0.0, 0.5, 1.0, 2.0)  # reduce-scatter time / product time; 0: no emulated link


def cases(context: Context) -> list[Case]:
    """One shape, four links."""
    if context.world_size < 2:
        raise UserError(
            "this benchmark needs several ranks", remedy="torchrun --nproc-per-node 2 -m undertow bench overlap"
        )
    rows = ROWS // 4 if context.quick else ROWS
    return [
        Case(
            name=f"{rows}×{OUTER}×{INNER}, {f'scatter / product = {ratio:g}' if ratio else 'no link'}",
            build=lambda ratio=ratio: trial(rows, ratio, context),
            plain="sequential",
            ours="auto",
            nbytes=(context.world_size - 1) * rows // context.world_size * OUTER * 4,
            group="emulated link" if ratio else "gloo as it is",
            x=ratio,
        )
        for ratio in RATIOS
    ]


def trial(rows: int, ratio: float, context: Context) -> Trial:
    """One team per arm, because a gate belongs to a team; all over one link of their own."""
    world, rank = context.world_size, context.rank
    everyone = [_inputs(rows, context.seed + peer) for peer in range(world)]
    x, w = everyone[rank]
    wanted = torch.stack([a @ b for a, b in everyone]).sum(0).chunk(world)[rank]
    product_s = _slowest(_product_s(x, w))
    nbytes = (world - 1) * rows // world * OUTER * 4
    link = LinkModel(nbytes / (ratio * product_s)) if ratio else None
    modes = {"sequential": "off", "overlap, 4 pieces": "on", "auto": "auto"}
    teams = {name: Team(overlap=mode, link=link) for name, mode in modes.items()}
    scatter_s = ratio * product_s
    predicted = {
        "sequential": product_s + scatter_s,
        "overlap, 4 pieces": overlapped_scatter_seconds(world, product_s, scatter_s, 4),
    }
    for _ in range(16):  # until the gate has decided
        teams["auto"].reduce_scatter_product(x, w, transposed=False)
    return Trial(
        [
            Arm(
                name,
                run=lambda team=team: team.reduce_scatter_product(x, w, transposed=False),
                predicted_s=predicted.get(name) if ratio else None,
            )
            for name, team in teams.items()
        ],
        reference=lambda: wanted,
    )


def _inputs(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(0, 2, shape, generator=generator).float() for shape in ((rows, INNER), (INNER, OUTER)))
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
    torch.distributed.all_reduce(cell, torch.distributed.ReduceOp.MAX)
    return float(cell.item())


BENCHMARK = Benchmark(
    name="overlap",
    claim="a reduce-scatter hides beneath the product that feeds it, and the gate is never slower than sequential",
    cases=cases,
    rounds=15,
    packages=("torch",),
    x_label="reduce-scatter time / product time",
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["overlap", *sys.argv[1:]]))
