"""Overlapped products between the GPUs of one host over NCCL, beside cuBLAS + NCCL and torch's asynchronous operators.

GEMM → reduce-scatter and all-gather → GEMM over the shapes of Flux and FlashOverlap and a sweep of M, and GEMM → all-
reduce over those shapes. `cuBLAS + NCCL` is what a script has: one product and one collective. torch's fused operators
run on its symmetric memory, with NVLink multicast left off. Every arm's answer is compared with a float32 product
summed in float32.

    torchrun --nproc-per-node 2 -m undertow bench overlap_gpus --minutes 6

Without GPUs it runs a small shape over gloo, to see that it works.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Trial
from undertow.benchmarks.overlap_choice import known
from undertow.comms.chunk_plan import chunk_rows
from undertow.comms.cost import overlapped_scatter_seconds
from undertow.comms.cuda_collectives import all_gather_single, reduce_scatter_single
from undertow.comms.overlap_cuda import CudaOverlapEngine
from undertow.dist.errors import UserError
from undertow.parallel.overlap_arms import ARMS, CUDA_ARMS, ROW_ARMS, SEQUENTIAL
from undertow.parallel.overlap_gate import checked_calls
from undertow.parallel.overlap_queueing import Queueing
from undertow.parallel.overlap_team import Team

SHAPES = [(8192, 12288, 49152), (8192, 49152, 12288), (8192, 8192, 28672), (8192, 28672, 8192)]
SWEEP = [  # the widest spread first, for a run whose minutes end before its cases
    (m, n, k) for m in (128, 32768, 1024, 4096, 512, 16384, 2048, 256) for n, k in ((8192, 28672), (28672, 8192))
]
SUMMED = len(SHAPES)  # shapes of which the all-reduce is timed too
PLAIN, TORCH = "cuBLAS + NCCL", "torch symm_mem.fused"
SCATTER, GATHER, SUM = "matmul_reduce_scatter", "all_gather_matmul", "matmul_all_reduce"


class Ranks:
    """One case on this rank: its inputs, the team of each way, and the right answer."""

    def __init__(self, pattern: str, shape: tuple[int, int, int], world: int, device: torch.device, seed: int) -> None:
        m, n, k = shape
        self.pattern, self.world, self.device, self.rank = pattern, world, device, dist.get_rank()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(seed + self.rank)
        self.sizes = chunk_rows(m, world)
        inner, outer = (k, n // world) if pattern == GATHER else (k // world, n)
        rows = self.sizes[self.rank] if pattern == GATHER else m
        self.a = torch.randn(rows, inner, device=device, generator=generator).to(dtype)
        self.b = (torch.randn(inner, outer, device=device, generator=generator) / k**0.5).to(dtype)
        self.names = [arm.name for arm in (CUDA_ARMS if device.type == "cuda" else ARMS)]
        if pattern != SCATTER:
            self.names = [name for name in self.names if not name.startswith(("replayed", "panels"))]
        if pattern == GATHER:
            self.names = [name for name in self.names if not name.startswith(("tracked", "columns"))]
        self.teams = {name: _team(name, device) for name in (*self.names, "auto")}
        if device.type == "cuda":  # the same pieces by the other transport
            halves = self.names[2]
            self.names.append(f"{halves}, by NCCL")
            self.teams[self.names[-1]] = _team(halves, device, "nccl")
        for team in self.teams.values():
            _forget(team)
        for _ in range(checked_calls(len(CUDA_ARMS))):
            self.ours("auto")
        self.wanted = self._exact()

    def ours(self, name: str) -> torch.Tensor:
        if self.pattern == SCATTER:
            return self.teams[name].reduce_scatter(self.a, self.b, self.sizes)
        if self.pattern == SUM:
            return self.teams[name].all_reduce(self.a, self.b, self.sizes)
        return self.teams[name].all_gather(self.a, [self.b], self.sizes)[1][0]

    def plain(self) -> torch.Tensor:
        if self.pattern == SCATTER:
            y = self.a @ self.b
            out = y.new_empty(self.sizes[self.rank], y.shape[1])
            reduce_scatter_single(out, y)
            return out
        if self.pattern == SUM:
            y = self.a @ self.b
            dist.all_reduce(y)
            return y
        whole = self.a.new_empty(sum(self.sizes), self.a.shape[1])
        all_gather_single(whole, self.a)
        return whole @ self.b

    def facts(self) -> dict[str, float]:
        """What the model of the gate has to predict from. Collective."""
        product = self.a
        if self.pattern == GATHER:  # of random numbers: a product of zeros takes less power and so less time
            product = torch.randn_like(self.a.new_empty(sum(self.sizes), self.a.shape[1]))
        moved = product if self.pattern == GATHER else product @ self.b
        share = moved.new_empty(self.sizes[self.rank], moved.shape[1])

        def collective() -> None:
            if self.pattern == SCATTER:
                reduce_scatter_single(share, moved)
            elif self.pattern == SUM:
                dist.all_reduce(moved)
            else:
                all_gather_single(moved, share)

        flops = 2.0 * product.numel() * self.b.shape[1]
        nbytes = moved.numel() * moved.element_size() * (2 if self.pattern == SUM else 1)
        (product_s, product_host_s), (link_s, link_host_s) = map(self._seconds, (lambda: product @ self.b, collective))
        queueing = self.teams["auto"].queueing()
        found = known(self.world, flops, nbytes * (self.world - 1) / self.world, product_s, link_s, queueing=queueing)
        return {**found, "product_host_s": product_host_s, "link_host_s": link_host_s}

    def _seconds(self, call: Callable[[], Any]) -> tuple[float, float]:
        """The median of a few calls that all ranks begin together, on a GPU by its own clock, as the arms are timed;
        and how much of that a host that only queues needs for it."""
        times, hosts = list[float](), list[float]()
        for _ in range(6):
            dist.barrier()
            if self.device.type != "cuda":
                began_s = time.perf_counter()
                call()
                times.append(time.perf_counter() - began_s)
                hosts.append(0.0)
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)  # the barrier is queued on a stream of its own
            begin.record()
            began_s = time.perf_counter()
            call()
            hosts.append(time.perf_counter() - began_s)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times[1:]), statistics.median(hosts[1:])

    def torch_fused(self) -> torch.Tensor:
        import torch.distributed._symmetric_memory  # noqa: F401 - it registers the operators

        name = dist.distributed_c10d._get_default_group().group_name
        if self.pattern == SCATTER:
            return torch.ops.symm_mem.fused_matmul_reduce_scatter(self.a, self.b, "sum", 0, name)
        return torch.ops.symm_mem.fused_all_gather_matmul(self.a, [self.b], 0, name)[1][0]

    def wrong(self, found: torch.Tensor) -> bool:
        """bf16 rounds each rank's partial, of magnitude below 8, and the sum, below 8 √W: 2^-8 · 8 (W + √W)."""
        limit = 8 * (self.world + self.world**0.5) * (2**-8 if found.dtype == torch.bfloat16 else 2**-20)
        return not bool(((found.float() - self.wanted).abs() <= limit).all())

    def _exact(self) -> torch.Tensor:
        if self.pattern == SCATTER:
            y = self.a.float() @ self.b.float()
            out = y.new_empty(self.sizes[self.rank], y.shape[1])
            reduce_scatter_single(out, y)
            return out
        if self.pattern == SUM:
            y = self.a.float() @ self.b.float()
            dist.all_reduce(y)
            return y
        whole = self.a.new_empty(sum(self.sizes), self.a.shape[1])
        all_gather_single(whole, self.a)
        return whole.float() @ self.b.float()


_teams: dict[tuple[str, str], Team] = {}  # for all cases: mapping the GPUs' memory takes longer than a case's rounds


def _team(overlap: str, device: torch.device, transport: str = "auto") -> Team:
    """Collective when it is first asked for."""
    key = overlap, transport
    if key not in _teams:
        _teams[key] = Team(overlap=overlap, device=device, transport=transport)
    return _teams[key]


def _forget(team: Team) -> None:
    """What was recorded for other cases: together they need more memory than recordings may hold."""
    if isinstance(team.engine, CudaOverlapEngine):
        replays = team.engine.recorder.replays
        for case in list(replays.cases):
            replays.drop(case)


def close_teams() -> None:
    """Collective; before the process groups are destroyed."""
    while _teams:
        _teams.popitem()[1].close()


def predicted(pattern: str, world: int, facts: Mapping[str, float], queueing: Queueing) -> dict[str, float]:
    """Seconds of the ways that a closed form exists for, from those of the product and of the collective alone, each
    from an idle device, and of the host that queues them or pieces of them.

    A gather is a scatter backwards: of its pieces the own one is there first, and the last one's product hides nothing.
    An all-reduce hides its reduce-scatter alone, which is half of it. Of two calls in a row the second is queued while
    the first one runs.
    """
    product_s, link_s = facts["product_s"], facts.get("link_s", 0.0)
    hosts_s = product_host_s, link_host_s = facts.get("product_host_s", 0.0), facts.get("link_host_s", 0.0)
    product_left_s, link_left_s = max(0.0, product_s - product_host_s), max(0.0, link_s - link_host_s)
    first_s, second_s = (link_s, product_left_s) if pattern == GATHER else (product_s, link_left_s)
    sequential_s = max(first_s, sum(hosts_s)) + second_s
    shown_s = link_left_s / 2 if pattern == SUM else 0.0
    found = {
        arm.name: max(
            overlapped_scatter_seconds(world, product_s, link_left_s - shown_s, arm.subchunks) + shown_s,
            queueing.seconds(arm, world),
        )
        for arm in ROW_ARMS
    }
    return {PLAIN: sequential_s, SEQUENTIAL.name: sequential_s, **found}


def trial(pattern: str, shape: tuple[int, int, int], world: int, seed: int) -> Trial:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    ranks = Ranks(pattern, shape, world, device, seed)
    kind = device.type

    why = ranks.teams["auto"].gate.explain().splitlines()[-1]  # the team is that of all cases
    facts = ranks.facts()
    queueing = ranks.teams["auto"].queueing()
    expected_s = predicted(pattern, world, facts, queueing)

    def checked(name: str, call: Callable[[], Any]) -> Arm:
        if name == "auto":
            return Arm(name, call, device=kind, said=why, facts=facts)
        return Arm(name, call, device=kind, predicted_s=expected_s.get(name))

    arms = [checked(PLAIN, ranks.plain)]
    arms += [checked(name, partial(ranks.ours, name)) for name in (*ranks.names, "auto")]
    if pattern == SUM:
        arms.append(Arm.missing(TORCH, "torch has no fused product and all-reduce"))
    elif cuda:
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        arms.append(checked(TORCH, ranks.torch_fused))
    else:
        arms.append(Arm.missing(TORCH, "torch's fused operators have no CPU kernels"))
    return Trial(arms, reference=lambda: ranks)


def cases(context: Context) -> Sequence[Case]:
    world, cuda = context.world_size, torch.cuda.is_available()
    if world < 2:
        raise UserError(
            "this benchmark needs several ranks", remedy="torchrun --nproc-per-node 2 -m undertow bench overlap_gpus"
        )
    shapes = SHAPES + SWEEP if cuda else [(256, 128, 128)]
    return [
        Case(
            f"{pattern} {m}×{n}×{k}",
            partial(trial, pattern, (m, n, k), world, context.seed),
            plain=PLAIN,
            ours="auto",
            group=pattern,
            x=m,
            wrong=lambda found, ranks: int(ranks.wrong(found)),
        )
        for m, n, k in (shapes[:1] if context.quick else shapes)
        for pattern in (SCATTER, GATHER, *([SUM] if (m, n, k) in shapes[:SUMMED] else []))
    ]


BENCHMARK = Benchmark(
    name="overlap_gpus",
    claim="between GPUs products that send while they run are never slower than cuBLAS and NCCL",
    cases=cases,
    rounds=12,  # the gate can be judged by them: `overlap_choice`
    packages=("torch",),
    x_label="rows",
    choices=tuple(arm.name for arm in CUDA_ARMS),
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["overlap_gpus", *sys.argv[1:]]))
