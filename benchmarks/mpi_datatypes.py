"""MPI datatypes: the library's own pack, unpack and messages against the interposer's, cell by cell.

    python -m undertow.benchmarks.mpi_datatypes [--quick] [--messages] [--mpicc PATH] [--output FOLDER]

The timing loop is the C program that `undertow mpi measure` uses (csrc/tools/measure.c): library, library again (A/A)
and ours in turn within one process, every answer compared first, medians of 15. The harness of this folder is not
used, because its arms are calls in Python and these cells are as short as 50 ns. Two things are printed per cell: our
kernel against the library (`gain`), and what `auto` mode would do by the built-in table and gain (`auto`).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path

from undertow.mpi_interpose import build, launch, measure
from undertow.mpi_interpose.toolchain import Mpi

FOLDER = Path(__file__).parent / "results"


def auto_gain(row: measure.Row, table: str) -> float:
    """What a program gains in mode auto: our kernel's gain where the table takes it, else 1."""
    known = measure.lookup(table, row.use, row.cls, row.block, row.size)
    taken = row.cls != "contiguous" and known is not None and known[0] / known[1] >= measure.GAIN
    return row.library_ns / row.ours_ns if taken else 1.0


def markdown(rows: list[measure.Row], mpi: Mpi, table: str) -> str:
    """One table, all cells, the losses too."""
    lines = [
        f"# MPI datatypes: {mpi.version[:40].strip()}",
        "",
        f"{platform.processor() or platform.machine()}, {date.today().isoformat()}. Times in microseconds, medians.",
        "",
        "| call | class | type | block B | message B | library | A/A | ours | gain | auto |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        again = max(row.library_ns, row.again_ns) / min(row.library_ns, row.again_ns)
        cells = (row.use, row.cls, row.name, row.block, row.size, f"{row.library_ns / 1e3:.2f}", f"{again:.2f}")
        gains = (f"{row.ours_ns / 1e3:.2f}", f"{row.library_ns / row.ours_ns:.2f}", f"{auto_gain(row, table):.2f}")
        lines.append("| " + " | ".join(map(str, (*cells, *gains))) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--messages", action="store_true", help="also time messages between two ranks")
    parser.add_argument("--mpicc")
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args(argv)
    mpi = launch.mpi_of([], options.mpicc, False)
    rows = measure.measure(mpi, build.library(mpi), quick=options.quick, messages=options.messages)
    table = build.builtin_model(mpi.flavour)
    text = markdown(rows, mpi, table)
    name = f"mpi_datatypes_{mpi.flavour}_{date.today().isoformat()}"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.md").write_text(text)
    facts = {"mpi": mpi.version, "machine": platform.platform(), "rows": [asdict(row) for row in rows]}
    (options.output / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
