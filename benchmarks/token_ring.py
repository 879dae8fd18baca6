"""Which schedule wins on which link: forward and backward of every schedule in one executor, behind an emulated link.

Links are emulated (`comms.link`), because on one host real ones are memory copies that take the cores that compute. The
schedules move the same blocks by the same kernels in one executor, so the comparison is of schedules; `zigzag ring` is
ring-flash-attention's: whole shards, merges between blocks. The plain arm is the public call with our `ring_kv`, ours
the same call with 'auto' and its measured gate; `predicted` is what the model picks, from block rates and launch times
measured here just before and the emulated link. Every answer is compared with float64 attention, and the bytes that
the transport counted with the plan's.
Needs ranks: ``torchrun --nproc-per-node 4 -m undertow bench token_ring`` (5 minutes on two idle cores).
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from undertow.benchmarks.attention_modelled import PEERS, schedule_of
from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Measured, Trial
from undertow.comms.actions import Compute
from undertow.comms.builders.attention_shape import Heads
from undertow.comms.cost import rank_costs
from undertow.comms.link import LinkModel
from undertow.comms.network import Network
from undertow.comms.p2p import P2P
from undertow.comms.schedule import Schedule
from undertow.dist.errors import UserError
from undertow.parallel import token_ring_attention
from undertow.parallel.blocks.select import choose as choose_block
from undertow.parallel.masks import Mask
from undertow.parallel.partition import positions_of
from undertow.parallel.token_ring.block_ops import ops
from undertow.parallel.token_ring.executors import forget, home
from undertow.parallel.token_ring.planner import Rates, choose, predict
from undertow.parallel.token_ring.problem import SCHEDULES, Problem

LATENCY_S = 2e-4
PLAIN = "the call, ring_kv"
TOLERANCE = 1e-3  # float32 sums of some thousand terms of size 1, against float64
GATE_CALLS = 31  # enough for the gate to have decided


class Team:
    """What the arms of one case share on this rank: inputs, the right answer, and one executor behind the link."""

    def __init__(self, problem: Problem, link: LinkModel, seed: int) -> None:
        self.problem, self.rank = problem, dist.get_rank()
        self.link, self.scale = link, problem.heads.head_dim**-0.5
        whole = _whole(problem, seed)
        at = positions_of(problem.q_spans[self.rank])
        self.q, self.k, self.v, self.dout = (x[at].contiguous() for x in whole)
        self.wanted = [x[at] for x in _exact(problem, whole)]
        self.executor = P2P(link=link, timeout_s=120)

    def run(self, plans: Sequence[Schedule]) -> Measured:
        """One forward and one backward; times itself, so that the answer's check is outside of the time."""
        given, tables = {"q": self.q, "k": self.k, "v": self.v}, []
        for plan in plans:
            self.executor.prepare(plan)
            tables.append(ops(self.problem, self.problem.inner(plan.name), self.scale))
        copies = [self.problem.kv_copies(plan.name) for plan in plans]
        link = self.executor.link
        assert link is not None
        before = sum(link.sent_bytes.values())
        dist.barrier()
        start = time.perf_counter()
        f = self.executor.run(plans[0], _repeated(given, copies[0]), tables[0])
        delta = (self.dout * f["out"]).sum(-1)
        given |= {"dout": self.dout, "lse": f["lse"], "delta": delta}
        b = self.executor.run(plans[1], _repeated(given, copies[1]), tables[1])
        dk, dv = (b[n].unflatten(2, (-1, copies[1])).sum(3) for n in ("dk", "dv"))
        seconds = time.perf_counter() - start
        costs = [rank_costs(plan)[self.rank] for plan in plans]
        sent, planned = sum(link.sent_bytes.values()) - before, sum(c.sent_bytes for c in costs)
        return self._measured(
            (f["out"], b["dq"], dk, dv), seconds, sent, planned, max(c.buffer_bytes for c in costs)
        )  # fmt: skip

    def call(self, schedule: str) -> Measured:
        """The same through `token_ring_attention`, whose executor has a link of its own."""
        leaves = [x.transpose(0, 1).contiguous().requires_grad_() for x in (self.q, self.k, self.v)]
        n = self.problem.lq
        dist.barrier()
        start = time.perf_counter()
        out = token_ring_attention(
            *leaves, causal=self.problem.mask.causal, lengths=(n, n), schedule=schedule, backward_schedule=schedule
        )
        grads = torch.autograd.grad(out, leaves, self.dout.transpose(0, 1))
        seconds = time.perf_counter() - start
        return self._measured([x.transpose(0, 1) for x in (out.detach(), *grads)], seconds)

    def _measured(
        self, found: Sequence[torch.Tensor], seconds: float, sent: int = 0, planned: int = 0, buffers: int = 0
    ) -> Measured:
        error = max(float((x - y).abs().max()) for x, y in zip(found, self.wanted))
        extras = {"error": error} | ({"sent_bytes": sent, "buffer_bytes": buffers} if planned else {})
        return Measured(error < TOLERANCE and sent == planned, seconds, extras)

    def close(self) -> None:
        self.executor.close()
        forget()


def _whole(problem: Problem, seed: int) -> list[torch.Tensor]:
    """q, k, v, dout of the whole sequence, rows first; alike on all ranks."""
    torch.manual_seed(seed)
    h = problem.heads
    sizes = [(h.q_heads, h.head_dim), (h.kv_heads, h.head_dim), (h.kv_heads, h.v_dim), (h.q_heads, h.v_dim)]
    return [torch.randn(problem.lq, h.batch, *size) for size in sizes]


def _exact(problem: Problem, whole: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """out, dq, dk, dv by torch's own attention in float64."""
    q, k, v, dout = (x.double().permute(1, 2, 0, 3) for x in whole)
    leaves = q, k, v = tuple(x.requires_grad_() for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=problem.mask.causal, enable_gqa=True)
    return [x.detach().permute(2, 0, 1, 3) for x in (out, *torch.autograd.grad(out, leaves, dout))]


def _repeated(given: dict[str, torch.Tensor], copies: int) -> dict[str, torch.Tensor]:
    """Key heads repeated where a schedule deals them to more ranks than there are."""
    return {n: x.repeat_interleave(copies, 2) if n in "kv" and copies > 1 else x for n, x in given.items()}


def block_rates(problem: Problem, world: int) -> tuple[float, float]:
    """flop/s of a rank's forward and backward block while all ranks compute, of the slowest rank."""
    h, rows = problem.heads, problem.lq // world
    q, k, v = (torch.randn(1, n, rows, h.head_dim) for n in (h.q_heads, h.kv_heads, h.kv_heads))
    block = choose_block(q, k, v, causal=False, window=None)
    dist.barrier()
    times: list[tuple[float, float]] = []
    for _ in range(6):
        start = time.perf_counter()
        out, lse = block.forward(q, k, v, scale=1.0, causal=False)
        middle = time.perf_counter()
        block.backward(out, q, k, v, out, lse, scale=1.0, causal=False)
        times.append((middle - start, time.perf_counter() - middle))
    cell = torch.tensor([sorted(t)[len(t) // 2] for t in zip(*times)], dtype=torch.float64)
    dist.all_reduce(cell, dist.ReduceOp.MAX)
    flops = rows * rows * h.q_heads * h.head_dim
    return 4 * flops / float(cell[0]), 10 * flops / float(cell[1])


def launch_s(problem: Problem) -> float:
    """Seconds of host work per operation: a ring whose blocks are too small to take any time, of the slowest rank."""
    tiny = replace(problem, lq=2 * problem.world, lk=2 * problem.world)
    team, plan = Team(tiny, LinkModel(1e12), 0), tiny.schedule("ring_kv")
    given = {"q": team.q, "k": team.k, "v": team.v}
    table, seconds = ops(tiny, 1, 1.0), list[float]()
    for _ in range(9):
        dist.barrier()
        start = time.perf_counter()
        team.executor.run(plan, given, table)
        seconds.append(time.perf_counter() - start)
    team.executor.close()
    cell = torch.tensor([sorted(seconds)[len(seconds) // 2]], dtype=torch.float64)
    dist.all_reduce(cell, dist.ReduceOp.MAX)
    counts = Counter(rank for rank, _, _, a in plan.actions() if isinstance(a, Compute))
    return float(cell) / max(counts.values())  # alike on all ranks, which must predict and so pick alike


_teams: list[Team] = []  # of the case that runs now


def trial(problem: Problem, bytes_per_s: float, seed: int) -> Trial:
    while _teams:
        _teams.pop().close()
    torch.set_num_threads(1)
    link = LinkModel(bytes_per_s, LATENCY_S)
    team = Team(problem, link, seed)
    _teams.append(team)
    network = Network(LATENCY_S, port_bytes_per_s=bytes_per_s)
    rates = Rates("here", block_rates(problem, problem.world), 4e9, network, launch_s(problem))
    names = [n for n in SCHEDULES if not problem.possible(n) and n not in ("double_ring", "ulysses_token")]
    plans = {n: [problem.schedule(n, backward=b) for b in (False, True)] for n in names}
    picked = [choose(problem, rates, backward=b, names=tuple(names)).name for b in (False, True)]
    peer = [schedule_of(PEERS["zigzag ring (ring-flash-attention)"], problem, b, goals=True) for b in (False, True)]
    plans["zigzag ring"] = [plan for plan in peer if plan is not None]
    plans["predicted"] = [plans[name][b] for b, name in enumerate(picked)]
    arms = [
        Arm(label, partial(team.run, pair), predicted_s=sum(predict(plan, rates) for plan in pair))
        for label, pair in plans.items()
    ]
    home(None, torch.device("cpu"), link=link)  # the public call finds this one
    for _ in range(GATE_CALLS):
        team.call("auto")
    arms += [Arm(PLAIN, partial(team.call, "ring_kv")), Arm("auto", partial(team.call, "auto"))]
    return Trial(arms, reference=lambda: True)


def cases(context: Context) -> Sequence[Case]:
    world = context.world_size
    if world < 2:
        raise UserError(
            "this benchmark needs several ranks", remedy="torchrun --nproc-per-node 4 -m undertow bench token_ring"
        )
    length = 256 * world if context.quick else 512 * world
    found = []
    for kv_heads in (8, 2):
        for megabytes in (50, 400):
            problem = Problem(world, length, length, Heads(1, 8, kv_heads, 64, 64), Mask(causal=True))
            found.append(
                Case(
                    f"{kv_heads} of 8 key heads, {megabytes} MB/s",
                    partial(trial, problem, megabytes * 1e6, context.seed),
                    plain=PLAIN,
                    ours="auto",
                    group=f"{kv_heads} of 8 key heads",
                    x=megabytes * 1e6,
                    warm_ups=1,
                )
            )
    return found


BENCHMARK = Benchmark(
    name="token_ring",
    claim="the chosen schedule is never slower than the KV ring, and faster where something else should travel",
    cases=cases,
    rounds=11,
    packages=("torch",),
    x_label="link (bytes/s)",
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["token_ring", *sys.argv[1:]]))
