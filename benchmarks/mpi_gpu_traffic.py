"""Bytes of the GPU's memory that packs and unpacks move, by Nsight Compute's counters, beside what they must move.

    python -m undertow.benchmarks.mpi_gpu_traffic [--fetch 32] [--output FOLDER]

It runs itself under `ncu`, a range of four calls for each case after one that warms up, so that what the second-level
cache still holds at the end of a range is what it held at its start. `least` is mpi_gpu_bound's. The last column is the
share of a copy's rate that the counted bytes leave, if bytes of the memory are all that counts. With `--fetch 32` the
device is asked for the smallest reads.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from undertow.benchmarks.mpi_gpu_bound import GRANULE, bytes_moved
from undertow.benchmarks.mpi_gpu_rivals import Layout
from undertow.benchmarks.overlap_traffic import READ, WRITTEN, parsed
from undertow.benchmarks.report import markdown_table
from undertow.dist.errors import UserError

MIB = 1 << 20
CALLS = 4
COPY = "copy"


def cases(mib: int) -> list[tuple[str, Layout, bool]]:
    """(words, layout, whether it is a pack); a plain copy of as many bytes first, as a layout without gaps."""
    size = mib * MIB
    whole = Layout(COPY, size, ((1, size),))
    lines = [Layout(f"{block} B blocks, gaps as large", block, ((size // block, 2 * block),))
             for block in (4, 16, 32, 64, 128)]  # fmt: skip
    made = [(COPY, whole, True)]
    return made + [(f"{way} {line.name}", line, way == "pack") for line in lines for way in ("pack", "unpack")]


def table(rows: Sequence[tuple[int, int]], mib: int, granule: int = GRANULE) -> str:
    """Markdown: a row for each case, in bytes per packed byte."""
    found = cases(mib)
    if len(rows) != len(found):
        raise UserError(f"ncu measured {len(rows)} ranges", expected=f"{len(found)}, one for each case")
    size, copied = mib * MIB, sum(rows[0])
    lines = []
    for (name, layout, packing), (read, written) in zip(found, rows):
        least = bytes_moved(layout, packing, granule)
        counted = [value / CALLS / size for value in (read, written)]
        lines.append((name, *(f"{value / size:.2f}" for value in least), *(f"{value:.2f}" for value in counted),
                      f"{copied / (read + written):.0%}"))  # fmt: skip
    head = ("case", "least read", "least written", "read", "written", "of a copy's rate")
    return "\n".join(markdown_table(head, lines)) + "\n"


def measure(mib: int, fetch: int, kernel: str, seconds: float) -> str:
    """ncu's output for all cases; `UserError` where there is no ncu or it fails."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise UserError("there is no ncu", remedy="install NVIDIA Nsight Compute and put ncu on the PATH")
    command = [ncu, "--csv", "--page", "details", "--print-units", "base", "--clock-control", "none",
               "--cache-control", "none", "--replay-mode", "app-range", "--metrics", f"{READ},{WRITTEN}",
               sys.executable, "-m", "undertow.benchmarks.mpi_gpu_traffic", "--run", "--mib", str(mib),
               "--fetch", str(fetch), "--kernel", kernel]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise UserError(f"ncu took over {seconds:.0f} s", remedy="a smaller --mib, or more --seconds") from None
    if done.returncode:
        raise UserError(f"ncu ended with status {done.returncode}", remedy=(done.stdout + done.stderr)[-800:])
    return done.stdout


def run(mib: int, wanted: int, kernel: str) -> None:
    import torch

    from undertow.benchmarks.mpi_gpu_pack import fetch
    from undertow.benchmarks.mpi_gpu_rivals import Driver
    from undertow.mpi_interpose import gpu

    torch.cuda.init()
    fetch(Driver(), wanted or None)
    gpu.use_kernel(kernel)
    packed = torch.zeros(mib * MIB, dtype=torch.uint8, device="cuda")
    user = torch.zeros(2 * mib * MIB, dtype=torch.uint8, device="cuda")
    for _, layout, packing in cases(mib):
        plan = gpu.GpuPlan(layout.ir(), layout.span)

        def call(plan: gpu.GpuPlan = plan, packing: bool = packing) -> None:
            plan.enqueue(1, user.data_ptr(), packed.data_ptr(), packing, torch.cuda.current_stream().cuda_stream)

        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mib", type=int, default=256, help="packed MiB of each case")
    parser.add_argument("--fetch", type=int, default=0, help="bytes that the second-level cache reads at a time")
    parser.add_argument("--kernel", default="", help="as for mpi_interpose.gpu.use_kernel")
    parser.add_argument("--seconds", type=float, default=55.0, help="limit for ncu")
    parser.add_argument("--output", type=Path, help="folder for the counted bytes and the table")
    parser.add_argument("--run", action="store_true", help="what ncu runs")
    asked = parser.parse_args(arguments)
    if asked.run:
        run(asked.mib, asked.fetch, asked.kernel)
        return 0
    rows = parsed(measure(asked.mib, asked.fetch, asked.kernel, asked.seconds))
    text = table(rows, asked.mib, asked.fetch or GRANULE)
    sys.stdout.write(text)
    if asked.output:
        asked.output.mkdir(parents=True, exist_ok=True)
        stem = asked.output / f"mpi_gpu_traffic{f'_fetch_{asked.fetch}' if asked.fetch else ''}"
        stem.with_suffix(".md").write_text(text)
        stem.with_suffix(".json").write_text(json.dumps({"mib": asked.mib, "calls": CALLS, "ranges": rows}) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"mpi_gpu_traffic: {error}")
