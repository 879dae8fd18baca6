"""Which schedule wins on which link: forward and backward of every schedule in one executor, on 4 gloo ranks.

Links are emulated (`comms.link`), because on one host real ones are memory copies that take the cores that compute. The
plain arm is the KV ring that peers have (ring-flash-attention's zigzag form); every other arm is another movement of
the same blocks by the same kernels, so the comparison is of schedules. `auto` is what the planner picks, with the
block rate that was measured here just before and the emulated link; predicted times are its model's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from statistics import median

import torch

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Measured, Trial
from undertow.comms.builders.attention import Heads
from undertow.comms.link import LinkModel
from undertow.comms.network import Network
from undertow.comms.p2p import P2P
from undertow.integrations.pytest_plugin import run_ranks
from undertow.parallel.blocks.select import choose as choose_block
from undertow.parallel.masks import Mask
from undertow.parallel.partition import positions_of
from undertow.parallel.token_ring.block_ops import ops
from undertow.parallel.token_ring.planner import Rates, choose, predict
from undertow.parallel.token_ring.problem import Problem

RANKS, REPEATS, LATENCY_S = 4, 3, 2e-4
NAMES = ("ring_kv", "ring_kv_bidirectional", "token_ring", "token_ring_bookended", "all_gather_kv", "need_only_kv",
         "need_only_q", "ulysses")  # fmt: skip


def whole(problem: Problem, seed: int) -> list[torch.Tensor]:
    """q, k, v, dout of the whole sequence, rows first."""
    torch.manual_seed(seed)
    h = problem.heads
    sizes = [(h.q_heads, h.head_dim), (h.kv_heads, h.head_dim), (h.kv_heads, h.v_dim), (h.q_heads, h.v_dim)]
    return [torch.randn(problem.lq, h.batch, *size) for size in sizes]


def exact(problem: Problem, seed: int) -> list[torch.Tensor]:
    """out, dq, dk, dv by torch's own attention in float64."""
    q, k, v, dout = (x.double().permute(1, 2, 0, 3) for x in whole(problem, seed))
    leaves = q, k, v = tuple(x.requires_grad_() for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=problem.mask.causal, enable_gqa=True)
    return [x.detach().permute(2, 0, 1, 3) for x in (out, *torch.autograd.grad(out, leaves, dout))]


def one_rank(
    rank: int, world: int, problem: Problem, names: tuple[str, str], link: LinkModel, seed: int, wanted: list
) -> tuple[float, float]:
    """(seconds of one forward and backward, largest error against `wanted`)."""
    at = positions_of(problem.q_spans[rank])
    q, k, v, dout = (x[at].contiguous() for x in whole(problem, seed))
    scale = problem.heads.head_dim**-0.5
    plans = [problem.schedule(name, backward=bool(b)) for b, name in enumerate(names)]
    tables = [ops(problem, problem.inner(name), scale) for name in names]
    seconds, error = [], 0.0
    with P2P(link=link, timeout_s=120) as executor:
        for plan in plans:
            executor.prepare(plan)
        for _ in range(REPEATS):
            torch.distributed.barrier()
            start = time.perf_counter()
            f = executor.run(plans[0], {"q": q, "k": k, "v": v}, tables[0])
            delta = (dout * f["out"]).sum(-1)
            given = {"q": q, "k": k, "v": v, "dout": dout, "lse": f["lse"], "delta": delta}
            b = executor.run(plans[1], given, tables[1])
            seconds.append(time.perf_counter() - start)
            found = (f["out"], b["dq"], b["dk"], b["dv"])
            error = max(float((x - y[at]).abs().max()) for x, y in zip(found, wanted))
    return median(seconds), error


def run(problem: Problem, names: tuple[str, str], link: LinkModel, seed: int, wanted: list) -> Measured:
    results = run_ranks(RANKS, one_rank, problem, names, link, seed, wanted, timeout_s=300)
    return Measured(max(e for _, e in results) < 1e-3, seconds=max(s for s, _ in results))


def block_rates(problem: Problem) -> tuple[float, float]:
    """flop/s of one forward and one backward block on one core, while the other ranks share the cores."""
    h, rows = problem.heads, problem.lq // RANKS
    q, k, v = (torch.randn(1, n, rows, h.head_dim) for n in (h.q_heads, h.kv_heads, h.kv_heads))
    block = choose_block(q, k, v, causal=False, window=None)
    best = [float("inf")] * 2
    for _ in range(4):
        start = time.perf_counter()
        out, lse = block.forward(q, k, v, scale=1.0, causal=False)
        middle = time.perf_counter()
        block.backward(out, q, k, v, out, lse, scale=1.0, causal=False)
        best = [min(best[0], middle - start), min(best[1], time.perf_counter() - middle)]
    flops = rows * rows * h.q_heads * h.head_dim
    shared = max(1.0, RANKS / (torch.multiprocessing.cpu_count() or 1))
    return 4 * flops / best[0] / shared, 10 * flops / best[1] / shared


def trial(problem: Problem, bytes_per_s: float, seed: int) -> Trial:
    torch.set_num_threads(1)
    link, wanted = LinkModel(bytes_per_s, LATENCY_S), exact(problem, seed)
    rates = Rates("here", block_rates(problem), 4e9, Network(LATENCY_S, port_bytes_per_s=bytes_per_s))
    picked = [choose(problem, rates, backward=b, names=NAMES).name for b in (False, True)]
    pairs = {name: (name, name) for name in NAMES} | {"auto": (picked[0], picked[1])}
    seconds = {
        label: sum(predict(problem.schedule(name, backward=bool(b)), rates) for b, name in enumerate(pair))
        for label, pair in pairs.items()
    }
    arms = [
        Arm(label, partial(run, problem, pair, link, seed, wanted), predicted_s=seconds[label])
        for label, pair in pairs.items()
    ]
    return Trial(arms, reference=lambda: True)


def cases(context: Context) -> Sequence[Case]:
    length = 1024 if context.quick else 4096
    found = []
    for kv_heads in (8, 2):
        for megabytes in (50, 400):
            problem = Problem(RANKS, length, length, Heads(1, 8, kv_heads, 64, 64), Mask(causal=True))
            found.append(
                Case(
                    f"{kv_heads} of 8 key heads, {megabytes} MB/s",
                    partial(trial, problem, megabytes * 1e6, context.seed),
                    plain="ring_kv",
                    ours="auto",
                    group=f"{kv_heads} of 8 key heads",
                    x=megabytes * 1e6,
                    warm_ups=0,
                )
            )
    return found


BENCHMARK = Benchmark(
    name="token_ring",
    claim="the planner's schedule is never slower than the KV ring, and faster where something else should travel",
    cases=cases,
    rounds=5,
    x_label="link (bytes/s)",
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["token_ring", *sys.argv[1:]]))
