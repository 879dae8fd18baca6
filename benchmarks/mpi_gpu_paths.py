"""From device memory to a pinned slab and back: the kernel over the bus, or device scratch and the copy engine.

    python -m undertow.benchmarks.mpi_gpu_paths [--output FOLDER]

Each cell is one whole step of a message (pack and wait, or unpack and wait), the median of 15, both ways in turn. The
crossover is what `kDirectBytes` in csrc/gpu/device.cc should say; the last column is a plain copy of as many bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from undertow.mpi_interpose import gpu

BLOCKS = (4, 8, 32, 256, 4096)
SIZES = tuple(1 << k for k in range(10, 28, 2))
REPEATS = 15


def median_us(action: Callable[[], None], others: list[Callable[[], None]]) -> list[float]:
    """Microseconds of `action` and of each other, interleaved."""
    actions, times = [action, *others], [[] for _ in range(1 + len(others))]
    for turn in range(REPEATS + 3):
        for run, took in zip(actions, times):
            start = time.perf_counter()
            run()
            if turn >= 3:
                took.append((time.perf_counter() - start) * 1e6)
    return [statistics.median(took) for took in times]


def through(path: str, action: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        gpu.host_path(path)
        action()

    return run


def measure(block: int, size: int) -> dict[str, float]:
    """One cell: microseconds of both paths and of a plain copy, in both directions."""
    n = size // block
    plan = gpu.GpuPlan(f"(loop {n} {2 * block} (bytes {block}))", 2 * size)
    plain = gpu.GpuPlan(f"(bytes {size})", size)
    user = torch.zeros(2 * size, dtype=torch.uint8, device="cuda")
    at = user.data_ptr()
    slab = gpu.load().undertow_gpu_slab_get(size, at)
    cell: dict[str, float] = {"block": block, "size": size}
    pairs = {
        "to host": (lambda: plan.pack(1, at, slab), lambda: plain.pack(1, at, slab)),
        "from host": (lambda: plan.unpack(1, slab, at), lambda: plain.unpack(1, slab, at)),
    }
    for way, (typed, dense) in pairs.items():
        direct, staged, copy = median_us(through("direct", typed), [through("staged", typed), dense])
        cell.update({f"{way} direct": direct, f"{way} staged": staged, f"{way} copy": copy})
    gpu.load().undertow_gpu_slab_put(slab, size)
    return cell


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, help="folder for the JSON file")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("mpi_gpu_paths needs a CUDA device\n")
        return 2
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    columns = [f"{way} {how}" for way in ("to host", "from host") for how in ("direct", "staged", "copy")]
    sys.stdout.write(f"{'block':>6} {'bytes':>10} " + " ".join(f"{name:>16}" for name in columns) + "  (us)\n")
    rows = []
    for block in BLOCKS:
        for size in SIZES:
            if size < 2 * block:
                continue
            rows.append(measure(block, size))
            numbers = " ".join(f"{rows[-1][name]:>16.1f}" for name in columns)
            sys.stdout.write(f"{block:>6} {size:>10} {numbers}\n")
            sys.stdout.flush()
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "mpi_gpu_paths.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
