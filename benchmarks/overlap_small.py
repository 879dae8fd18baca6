"""What a settled product adds to cuBLAS and NCCL where it is short: a few microseconds of the host are all there is.

    torchrun --nproc-per-node 2 -m undertow.benchmarks.overlap_small

The arms of `overlap_gpus` for six short products, in many rounds, each in a random order; all ranks start a call
together, and the slower rank's time counts. Beside the team's ways stands the public function, which also checks what
it is given. `host`: how long the calling thread took to queue the call. Without GPUs it runs small shapes over gloo, to
see that it works.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from undertow.benchmarks.intervals import ratio_interval
from undertow.benchmarks.overlap_gpus import GATHER, SCATTER, Ranks, close_teams
from undertow.dist.launch import detect, init_process_group, local_device
from undertow.parallel import all_gather_matmul, matmul_reduce_scatter

SHAPES = ((128, 8192, 28672), (128, 28672, 8192), (512, 8192, 28672))
SMALL = ((64, 128, 256),)  # without a GPU
PLAIN = "cuBLAS + NCCL"


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Microseconds of one call that all ranks begin together: on the device, and of the thread that queues it."""
    dist.barrier()
    if device.type != "cuda":
        began_s = time.perf_counter()
        call()
        taken_us = (time.perf_counter() - began_s) * 1e6
        return taken_us, taken_us
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    begin.record()
    call()
    host_us = (time.perf_counter() - began_s) * 1e6
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3, host_us


def arms(ranks: Ranks) -> dict[str, Callable[[], Any]]:
    team = ranks.teams["auto"]
    public: Callable[[], Any] = partial(all_gather_matmul, ranks.a, [ranks.b], 0, team)
    if ranks.pattern == SCATTER:
        public = partial(matmul_reduce_scatter, ranks.a, ranks.b, "sum", 0, team)
    ways = {name: partial(ranks.ours, name) for name in ("sequential", "auto")}
    return {PLAIN: ranks.plain, f"{PLAIN} (A/A)": ranks.plain, **ways, "auto, by the public function": public}


def compare(ranks: Ranks, rounds: int, seed: int) -> list[str]:
    """A line of a Markdown table for each arm. Collective; every rank has the same order of arms from the seed."""
    calls, order = arms(ranks), random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in calls}
    hosts: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + rounds // 20 + 1):  # the first twentieth warms up
        for name in order.sample(list(calls), len(calls)):
            taken_us, host_us = timed(calls[name], ranks.device)
            if turn > rounds // 20:
                times[name].append(taken_us)
                hosts[name].append(host_us)
    slowest = torch.tensor(list(times.values()), device=ranks.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    rows = dict(zip(calls, slowest.tolist()))
    found = []
    for name, row in rows.items():
        ratio = ratio_interval(rows[PLAIN], row)
        cells = f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]", f"{statistics.median(hosts[name]):.1f}"
        found.append(f"{name} | {statistics.median(row):.1f} | {' | '.join(cells)} |")
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="overlap_small", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    launch = detect()
    device = local_device(launch)
    init_process_group(launch, device=device)
    if launch.rank == 0:
        print("| case | arm | time, µs | cuBLAS and NCCL / arm, median [95 %] | host, µs |\n|---|---|---:|---:|---:|")
    for pattern in (GATHER, SCATTER):
        for shape in SHAPES if device.type == "cuda" else SMALL:
            ranks = Ranks(pattern, shape, launch.world_size, device, asked.seed)
            lines = compare(ranks, asked.rounds, asked.seed)
            if launch.rank == 0:
                print(*(f"| {pattern} {'×'.join(map(str, shape))} | {line}" for line in lines), sep="\n", flush=True)
    close_teams()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
