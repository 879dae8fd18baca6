"""Collectives as schedules, run by `comms.p2p`, against the backend's own; predicted by the simulator.

Plain is what torch.distributed offers for the same result; ours is the better of the schedules for one size. The point
of a schedule is not to beat a collective that has nothing to hide under, but overlap must not be paid for by a slow
transport, so this measures what the executor itself costs. Predictions replay the very schedule on the machine file's
link (`--machine`), with compute lanes free of contention: on a host whose ranks share cores they are a lower bound.
Needs several ranks: ``torchrun --nproc-per-node 4 -m undertow bench schedules``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.distributed as dist

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Trial
from undertow.comms.builders.all_gather import ring_all_gather
from undertow.comms.builders.all_to_all import all_to_all
from undertow.comms.builders.reduce_scatter import direct_reduce_scatter, ring_reduce_scatter
from undertow.comms.cuda_collectives import all_gather_single, reduce_scatter_single
from undertow.comms.network import of_machine
from undertow.comms.p2p import P2P
from undertow.comms.schedule import Schedule
from undertow.comms.simulate import simulate
from undertow.dist.errors import UserError
from undertow.dist.machine import Machine
from undertow.dist.units import format_bytes

KIB = 1024
COLUMNS = 256  # float32: a row is 1 KiB
OURS = "schedule"


def cases(context: Context) -> list[Case]:
    """Chunks of 64 KiB to 16 MiB; a case's bytes are what each rank sends."""
    if context.world_size < 2:
        raise UserError(
            "this benchmark needs several ranks", remedy="torchrun --nproc-per-node 4 -m undertow bench schedules"
        )
    chunks = [64 * KIB, 1024 * KIB] if context.quick else [64 * KIB, 256 * KIB, 1024 * KIB, 4096 * KIB, 16384 * KIB]
    return [
        Case(
            name=f"{name}, {format_bytes(chunk)} chunks",
            build=lambda name=name, chunk=chunk: trial(name, chunk // KIB, context),
            plain="gloo",
            ours=OURS,
            nbytes=(context.world_size - 1) * chunk,
            group=name,
            x=chunk,
        )
        for name in ("all-gather", "reduce-scatter", "all-to-all")
        for chunk in chunks
    ]


def trial(name: str, rows: int, context: Context) -> Trial:
    """The arms over whole numbers, so that every order of summation gives the same bits."""
    world, rank = context.world_size, context.rank
    everyone = [_input(rows * (1 if name == "all-gather" else world), context.seed + peer) for peer in range(world)]
    x = everyone[rank]
    if name == "all-gather":
        schedules = {OURS: ring_all_gather(world, rows, [COLUMNS])}
        wanted, plain = torch.cat(everyone), _all_gather
    elif name == "all-to-all":
        schedules = {OURS: all_to_all(world, rows, [COLUMNS])}
        wanted, plain = torch.cat([peer[rank * rows :][:rows] for peer in everyone]), _all_to_all
    else:
        schedules = {
            OURS: direct_reduce_scatter(world, rows, [COLUMNS]),
            "ring": ring_reduce_scatter(world, rows, [COLUMNS]),
        }
        wanted, plain = torch.stack(everyone).sum(0)[rank * rows :][:rows], _reduce_scatter
    arms = [Arm("gloo", run=lambda: plain(x, torch.empty_like(wanted)))]
    arms += [
        Arm(arm, run=_runner(schedule, x), predicted_s=_predicted_s(schedule, context.machine))
        for arm, schedule in schedules.items()
    ]
    return Trial(arms, reference=lambda: wanted)


def _input(rows: int, seed: int) -> torch.Tensor:
    return torch.randint(-8, 9, (rows, COLUMNS), generator=torch.Generator().manual_seed(seed)).float()


@lru_cache
def executor() -> P2P:
    """One per process: made by all ranks at the first arm that needs it."""
    return P2P()


def _runner(schedule: Schedule, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: executor().run(schedule, {"x": x})["out"]


def _predicted_s(schedule: Schedule, machine: Machine | None) -> float | None:
    if machine is None or "gloo" not in machine.links:
        return None
    return simulate(schedule, machine, network=of_machine(machine, transport="gloo"), rendezvous=True).makespan_s


def _all_gather(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    all_gather_single(out, x)
    return out


def _reduce_scatter(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    reduce_scatter_single(out, x)
    return out


def _all_to_all(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    dist.all_to_all_single(out, x)
    return out


BENCHMARK = Benchmark(
    name="schedules",
    claim="what running a collective as a schedule costs over the backend's own collective",
    cases=cases,
    packages=("torch",),
    x_label="chunk (bytes)",
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["schedules", *sys.argv[1:]]))
