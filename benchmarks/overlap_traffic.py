"""Bytes that a GPU's memory reads and writes for one product and its scatter, by Nsight Compute's hardware counters.

    python -m undertow.benchmarks.overlap_traffic --shape 4096 8192 16384

It runs itself under `ncu`, one range for each way: sequential, cuBLAS pieces of rows and of columns, and the Triton
kernel that counts its tiles. A range counts all of the device's memory traffic while it lasts, copy engines included;
the rank is that of `bench overlap_cuda`, one of eight, with pinned host memory as the link. `least` is what the
operands, the product, the copies and the sum must move if every byte moves once. What the plan of pieces says that
their products read of the operands stands beside it. T3's hardware saves on the scatter: sums form in memory, so what
arrives and what leaves is neither written nor read again. Software cannot, and should stay at the sequential's bytes.
The last two rows are what the simulator's algebra gives for a ring on T3's machine, beside its own sequential.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Sequence

from undertow.comms.chunk_plan import chunk_rows
from undertow.comms.t3_paper.closed_form import traffic_bytes
from undertow.dist.errors import UserError
from undertow.parallel.overlap_arms import CUDA_ARMS, cut

READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
PIECES = ("overlap, 1 piece", "overlap, 2 pieces", "columns, 4 pieces", "columns, 8 pieces")
WAYS = ("sequential", *PIECES, "tracked, 2 pieces")
WORLD = 8


def parsed(text: str) -> list[tuple[int, int]]:
    """(bytes read, bytes written) of each range, in order, from `ncu --csv --page details --print-units base`."""
    lines = text.splitlines()
    head = next((at for at, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        said = next((line for line in lines if line.startswith("==ERROR==")), 'no line that begins with "ID"')
        raise UserError(f"ncu measured nothing: {said}", remedy="see whether this user may read the GPU's counters")
    found: dict[int, dict[str, int]] = {}
    for row in csv.DictReader(lines[head:]):
        if row["Metric Name"] in (READ, WRITTEN):
            if row["Metric Unit"] != "byte":
                raise UserError(f"ncu counts in {row['Metric Unit']}", expected="byte (--print-units base)")
            value = int(float(row["Metric Value"].replace(",", "")))
            found.setdefault(int(row["ID"]), {})[row["Metric Name"]] = value
    if lacking := [at for at, metrics in found.items() if len(metrics) < 2]:
        raise UserError(f"ncu's ranges {lacking} lack a metric", expected=f"{READ} and {WRITTEN}")
    return [(found[at][READ], found[at][WRITTEN]) for at in sorted(found)]


def least(m: int, n: int, k: int, world: int = WORLD) -> tuple[int, int]:
    """(read, written) bytes of bf16 operands, product, copies out and in, and the sum, each byte once."""
    y, chunk = 2 * m * n, 2 * m * n // world
    return 2 * (m * k + k * n) + (y - chunk) + world * chunk, y + (world - 1) * chunk + chunk


def claimed(config: str, m: int, n: int, k: int, world: int = WORLD) -> tuple[int, int]:
    """(read, written) bytes of the product and the ring scatter by the simulator's algebra, 'sequential' or 't3'; the
    operands are read once."""
    found = traffic_bytes(config, 2 * m * n / world, world, 2 * (m * k + k * n))
    read, written = (sum(found[f"{part}_{kind}"] for part in ("gemm", "rs")) for kind in ("reads", "writes"))
    return int(read), int(written)


def markdown(shape: Sequence[int], ways: Sequence[tuple[int, int]]) -> str:
    """One row for each way, beside the least and the sequential way."""
    if len(ways) != len(WAYS):
        raise UserError(f"ncu measured {len(ways)} ranges", expected=f"{len(WAYS)}: {'; '.join(WAYS)}")
    m, n, k = shape
    sizes = chunk_rows(m, WORLD)
    plans = {arm.name: 2 * cut(arm, 0, sizes, n).reads(k, n) for arm in CUDA_ARMS if arm.name in PIECES}
    rows = [("least", least(*shape)), *zip(WAYS, ways)]
    lines = [f"M×N×K = {'×'.join(map(str, shape))}, rank 0 of {WORLD}", ""]
    lines += [
        "| way | read GB | written GB | all / sequential | operands, by the plan, GB |",
        "|---|---:|---:|---:|---:|",
    ]
    rows += [
        ("simulator, ring: sequential", claimed("sequential", *shape)),
        ("simulator, ring: T3", claimed("t3", *shape)),
    ]
    for name, (r, w) in rows:
        whole = sum(claimed("sequential", *shape) if name.startswith("simulator") else ways[0])
        planned = f"{plans[name] / 1e9:.3f}" if name in plans else ""
        lines.append(f"| {name} | {r / 1e9:.3f} | {w / 1e9:.3f} | {(r + w) / whole:.3f} | {planned} |")
    return "\n".join(lines) + "\n"


def measure(shape: Sequence[int], seconds: float) -> str:
    """ncu's output for all ways; `UserError` where there is no ncu or it fails."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise UserError("there is no ncu", remedy="install NVIDIA Nsight Compute and put ncu on the PATH")
    command = [ncu, "--csv", "--page", "details", "--print-units", "base", "--clock-control", "none",
               "--replay-mode", "app-range", "--metrics", f"{READ},{WRITTEN}",
               sys.executable, "-m", "undertow.benchmarks.overlap_traffic", "--run",
               "--shape", *map(str, shape)]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise UserError(f"ncu took over {seconds:.0f} s", remedy="a smaller --shape, or more --seconds") from None
    if done.returncode:
        raise UserError(f"ncu ended with status {done.returncode}", remedy=(done.stdout + done.stderr)[-800:])
    return done.stdout


def run(shape: Sequence[int]) -> None:
    """Each way once in a range of its own, after its answer has been checked."""
    import torch

    from undertow.benchmarks.overlap_cuda import trial

    m, n, k = shape
    made = trial(m, n, k, 0)
    arms = {arm.name: arm for arm in made.arms}
    if missing := [name for name in WAYS if arms[name].unavailable]:
        raise UserError(f"{missing[0]} cannot run: {arms[missing[0]].unavailable}")
    for name in WAYS:
        arms[name].run()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        arms[name].run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[4096, 8192, 16384], metavar=("M", "N", "K"))
    parser.add_argument("--seconds", type=float, default=55.0, help="limit for ncu")
    parser.add_argument("--run", action="store_true", help="what ncu runs")
    asked = parser.parse_args(arguments)
    if asked.run:
        run(asked.shape)
    else:
        print(markdown(asked.shape, parsed(measure(asked.shape, asked.seconds))))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"overlap_traffic: {error}")
