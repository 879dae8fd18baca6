"""From device memory to a pinned slab and back: the kernel over the bus, or device scratch and the copy engine.

    python -m undertow.benchmarks.mpi_gpu_paths [--output FOLDER]               one card, some seconds
    mpirun -n 2 python -m undertow.benchmarks.mpi_gpu_paths --output FOLDER     every rank on its own, at the same time

Each cell is one whole step of a message (pack and wait, or unpack and wait), the median of 16, both ways in turn; the
last column of each direction is a plain copy of as many bytes, `whole` the staged way without the ring of two
halves that messages of more than 8 MiB go through. Every result is compared first. From the cells follows the machine's
model: for each direction and block the number of bytes up to which the kernel should go directly, written
to FOLDER/gpu.txt. It is used at once with UNDERTOW_MPI_GPU_PATHS=FOLDER/gpu.txt, and shipped as
mpi_interpose/csrc/policy/gpu.txt. How good it is says a fit on half of the samples, judged by the other half.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from undertow.benchmarks import facts, mpi_gpu_pages
from undertow.mpi_interpose import gpu

BLOCKS = (4, 8, 32, 256, 4096)
SIZES = tuple(1 << k for k in (10, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 24, 26))
REPEATS = 16
RING = 4 << 20  # half of what messages of more than twice as much go through; as shipped
WAYS = ("direct", "staged", "whole")
DIRECTIONS = {"to_host": "to host", "from_host": "from host"}
LAUNCHED = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")


def rank() -> int:
    """Of this process, by its launcher's word; 0 without one."""
    return next((int(os.environ[name]) for name in LAUNCHED if name in os.environ), 0)


def in_turn(actions: list[Callable[[], None]]) -> list[list[float]]:
    """Microseconds of each action, interleaved, after three turns that do not count."""
    times: list[list[float]] = [[] for _ in actions]
    for turn in range(REPEATS + 3):
        for run, took in zip(actions, times):
            start = time.perf_counter()
            run()
            if turn >= 3:
                took.append((time.perf_counter() - start) * 1e6)
    return times


def through(how: str, action: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        gpu.ring(0 if how == "whole" else RING)
        gpu.host_path("staged" if how == "whole" else how)
        action()

    return run


def measure(block: int, size: int) -> dict:
    """One cell: microseconds of both paths and of a plain copy, in both directions, and the samples behind them."""
    n = size // block
    plan = gpu.GpuPlan(f"(loop {n} {2 * block} (bytes {block}))", 2 * size)
    plain = gpu.GpuPlan(f"(bytes {size})", size)
    user = torch.randint(0, 256, (2 * size,), dtype=torch.uint8, device="cuda")
    at = user.data_ptr()
    slab = gpu.load().undertow_gpu_slab_get(size, at)
    cell: dict = {"block": block, "size": size, "wrong": _wrong(plan, user, slab, block), "samples": {}}
    pairs = {
        "to host": (lambda: plan.pack(1, at, slab), lambda: plain.pack(1, at, slab)),
        "from host": (lambda: plan.unpack(1, slab, at), lambda: plain.unpack(1, slab, at)),
    }
    for way, (typed, dense) in pairs.items():
        times = in_turn([*(through(how, typed) for how in WAYS), dense])
        for how, took in zip((*WAYS, "copy"), times):
            cell[f"{way} {how}"] = statistics.median(took)
            cell["samples"][f"{way} {how}"] = [round(us, 2) for us in took]
    gpu.load().undertow_gpu_slab_put(slab, size)
    return cell


def _wrong(plan: gpu.GpuPlan, user: torch.Tensor, slab: int, block: int) -> int:
    """Bytes that differ after a pack by one path and an unpack by the other, against torch's view of the blocks."""
    view, wrong = user.view(-1, 2, block)[:, 0], 0
    want, gaps = view.clone(), user.view(-1, 2, block)[:, 1].clone()
    for first, second in (("direct", "staged"), ("staged", "direct")):
        gpu.host_path(first)
        plan.pack(1, user.data_ptr(), slab)
        view.zero_()
        torch.cuda.synchronize()
        gpu.host_path(second)
        plan.unpack(1, slab, user.data_ptr())
        wrong += int((view != want).sum()) + int((user.view(-1, 2, block)[:, 1] != gaps).sum())
    return wrong


def cost(cell: dict, way: str, how: str, part: slice) -> float:
    return statistics.median(cell["samples"][f"{way} {how}"][part])


def fit(cells: list[dict], part: slice = slice(None)) -> list[tuple[str, int, int]]:
    """Rows (direction, block, bytes): the limit with the least sum of log(time) of the chosen path over the sizes."""
    rows = []
    for key, way in DIRECTIONS.items():
        for block in sorted({cell["block"] for cell in cells}):
            own = [cell for cell in cells if cell["block"] == block]
            limits = [0, *sorted(cell["size"] for cell in own)]

            def regret(limit: int, own: list[dict] = own, way: str = way) -> float:
                return sum(
                    math.log(cost(cell, way, "direct" if cell["size"] <= limit else "staged", part)) for cell in own
                )

            rows.append((key, block, min(limits, key=regret)))
    return rows


def text(rows: Iterable[tuple[str, int, int]], about: Iterable[str]) -> str:
    """As csrc/gpu/paths.hh reads it."""
    head = ["up to how many bytes kernels reach pinned host memory themselves; see csrc/gpu/paths.hh", *about]
    return "".join(f"# {line}\n" for line in head) + "".join(f"{way} {block} {most}\n" for way, block, most in rows)


def path(model: str, key: str, cell: dict) -> str:
    """What the model chooses for a cell: 'direct' or 'staged'."""
    return "direct" if cell["size"] <= gpu.direct_up_to(model, key == "to_host", cell["block"]) else "staged"


def judge(cells: list[dict], model: str, part: slice = slice(None)) -> tuple[float, float]:
    """(share of cells where the model's path is the better one or within 3 % of it, mean regret) by these samples."""
    right, regrets = 0, []
    for cell in cells:
        for key, way in DIRECTIONS.items():
            chosen = cost(cell, way, path(model, key, cell), part)
            best = min(cost(cell, way, how, part) for how in ("direct", "staged"))
            regrets.append(chosen / best - 1)
            right += regrets[-1] <= 0.03
    return right / len(regrets), statistics.mean(regrets)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=100, help="stop starting cells after this long")
    parser.add_argument("--output", type=Path, help="folder for the JSON file and the model")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("mpi_gpu_paths needs a CUDA device\n")
        return 2
    place = torch.device("cuda", rank() % torch.cuda.device_count())
    torch.cuda.set_device(place)
    torch.zeros(1, device="cuda")
    card = f"{place} {torch.cuda.get_device_name(place)}"
    columns = [f"{way} {how}" for way in DIRECTIONS.values() for how in (*WAYS, "copy")]
    out, began, cells = [f"rank {rank()}: {card}"], time.monotonic(), []
    out.append(f"{'block':>6} {'bytes':>10} " + " ".join(f"{name:>16}" for name in columns) + "  (us)")
    for size, block in ((size, block) for size in SIZES for block in BLOCKS):
        if size < 2 * block or time.monotonic() - began > options.seconds:
            continue
        cells.append(measure(block, size))
        numbers = " ".join(f"{cells[-1][name]:>16.1f}" for name in columns)
        out.append(f"{block:>6} {size:>10} {numbers}{' WRONG' if cells[-1]['wrong'] else ''}")
    gpu.host_path("auto")
    half = text(fit(cells, slice(0, None, 2)), [])
    share, regret = judge(cells, half, slice(1, None, 2))
    for cell in cells:
        cell["chosen"] = {way: path(half, key, cell) for key, way in DIRECTIONS.items()}
    quality = f"by held-out samples the fitted path is right in {share:.0%} of the cells, mean regret {regret:.1%}"
    model = text(fit(cells), [f"{card}; {facts.hardware()}; {time.strftime('%Y-%m-%d')}", quality])
    sys.stdout.write("\n".join([*out, model]))
    if options.output:
        suffix = f".{rank()}" if rank() else ""
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"gpu{suffix}.txt").write_text(model)
        data = {**mpi_gpu_pages.begun("mpi_gpu_paths", "", REPEATS, [card, quality]), "rows": cells}
        mpi_gpu_pages.save(data, options.output / f"mpi_gpu_paths{suffix}.json")
        mpi_gpu_pages.write(data, options.output / f"mpi_gpu_paths{suffix}.json")
    return 1 if any(cell["wrong"] for cell in cells) else 0


if __name__ == "__main__":
    sys.exit(main())
