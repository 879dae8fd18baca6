"""What a halo exchange's calls cost where the preload lets all of them pass: a promise of at most 50 ns a call.

    undertow bench mpi_rounds [--quick] [--filter openmpi-5]

mpi_interpose/csrc/tools/rounds.c runs rounds of thirteen calls by the preload and by the library's own functions in one
process, in turn, so that what else runs on the machine meets both; the library is there twice (A/A). The table of the
preload is empty: nothing is packed, what is measured is the look at each call. One rank that talks to itself has the
least noise; with two, a rank waits for the other. Every cell is started several times, because addresses differ from
start to start. The figure of a start is the median over its turns; that of a cell the median over starts, with the
least and the greatest.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from undertow.benchmarks.case import Benchmark
from undertow.benchmarks.facts import facts, slug
from undertow.benchmarks.mpi_datatypes import installed, label
from undertow.mpi_interpose import build, measure
from undertow.mpi_interpose.compile import CSRC
from undertow.mpi_interpose.errors import InterposeError
from undertow.mpi_interpose.launch import environment
from undertow.mpi_interpose.toolchain import Mpi
from undertow.mpi_interpose.toolchain import environment as clean_environment

CALLS, STARTS, TURNS, ROUNDS, LIMIT_NS = 13, 9, 60, 60, 50.0


@dataclass(frozen=True)
class Start:
    """Medians over the turns of one start, in ns: the library's round, and what the other two took more."""

    library: float
    again: float
    preload: float


@dataclass(frozen=True)
class Cell:
    mpi: str
    ranks: int
    cells: int
    starts: tuple[Start, ...]

    def middle(self, name: str) -> tuple[float, float, float]:
        """(median, least, greatest) over starts, in ns."""
        values = [getattr(start, name) for start in self.starts]
        return statistics.median(values), min(values), max(values)

    def ratio(self, name: str) -> float:
        """Library / arm."""
        library = self.middle("library")[0]
        return library / (library + self.middle(name)[0])

    @property
    def call_ns(self) -> float:
        return self.middle("preload")[0] / CALLS


def read(text: str) -> Start:
    """From the program's lines (library, again, preload)."""
    turns = [tuple(map(float, line.split())) for line in text.splitlines() if line.strip()]
    if not turns:
        raise ValueError("rounds printed nothing; expected a line of three times for each turn")
    more = [statistics.median(turn[arm] - turn[0] for turn in turns) for arm in (1, 2)]
    return Start(statistics.median(turn[0] for turn in turns), *more)


def program(mpi: Mpi, folder: Path) -> Path:
    target = folder / f"rounds-{label(mpi)}"
    command = [mpi.mpicc, "-O2", str(CSRC / "tools" / "rounds.c"), "-o", str(target)]
    subprocess.run(command, check=True, env=clean_environment())
    return target


def start(mpi: Mpi, binary: Path, table: Path, ranks: int, cells: int, turns: int) -> Start:
    values = clean_environment()
    values.update(
        environment(build.library(mpi), "auto", None), UNDERTOW_MPI_MODEL=str(table), UNDERTOW_MPI_PATIENCE_MS="0"
    )
    preload = ["env", f"LD_PRELOAD={values.pop('LD_PRELOAD')}"]
    command = [*measure.launcher(mpi), "-n", str(ranks), *preload, str(binary), str(cells), str(turns), str(ROUNDS)]
    done = subprocess.run(command, env=values, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise InterposeError(f"rounds on {label(mpi)} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return read(done.stdout)


def markdown(found: list[Cell], about: dict[str, str]) -> str:
    worst = max(found, key=lambda cell: cell.call_ns)
    lines = ["# What a halo exchange's calls cost that pass", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += ["", "Repeat: `undertow bench mpi_rounds`. Medians over starts, [least, greatest]; ns of a round of"]
    lines += [f"{CALLS} calls; A/A: the library's own functions a second time.", ""]
    lines += ["| goal | measured | met |", "|---|---|---|"]
    lines += [
        f"| a call that passes costs at most {LIMIT_NS:.0f} ns more | {worst.call_ns:.1f} ns at most ({worst.mpi}, "
        f"{worst.ranks} rank(s), {worst.cells}³) | {'yes' if worst.call_ns <= LIMIT_NS else 'no'} |"
    ]
    lines += ["", "| MPI | ranks | cells | library | A/A, more | preload, more | a call | library / A/A | / preload |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for cell in found:
        more = ["{:.0f} [{:.0f}, {:.0f}]".format(*cell.middle(name)) for name in ("again", "preload")]
        ratios = [f"{cell.ratio(name):.3f}" for name in ("again", "preload")]
        row = (cell.mpi, cell.ranks, f"{cell.cells}³", f"{cell.middle('library')[0]:.0f}", *more, f"{cell.call_ns:.1f}")
        lines.append("| " + " | ".join(map(str, (*row, *ratios))) + " |")
    return "\n".join([*lines, ""])


def run(quick: bool, rounds: int | None, only: str, output: Path) -> int:
    """Every MPI at hand; the results are written after each cell."""
    chosen = [mpi for mpi in installed() if only in label(mpi)]
    if not chosen:
        sys.stderr.write(f"no MPI found whose name holds '{only}' (pip install undertow[mpi])\n")
        return 2
    about = {**facts(), "mpi": ", ".join(map(label, chosen))}
    output.mkdir(parents=True, exist_ok=True)
    base = output / f"mpi_rounds_{slug(about['hardware'])}_{about['date']}"
    found: list[Cell] = []
    with tempfile.TemporaryDirectory() as name:
        table = Path(name) / "nothing.txt"
        table.write_text("")
        for mpi in chosen:
            binary = program(mpi, Path(name))
            for ranks, cells in ((1, 16),) if quick else ((1, 16), (2, 16), (2, 32)):
                times = range(rounds or (3 if quick else STARTS))
                starts = [start(mpi, binary, table, ranks, cells, TURNS) for _ in times]
                found.append(Cell(label(mpi), ranks, cells, tuple(starts)))
                sys.stdout.write(f"{label(mpi)}, {ranks} rank(s), {cells}³: {found[-1].call_ns:.1f} ns a call\n")
                sys.stdout.flush()
                whole = {"format": 1, "facts": about, "cells": [asdict(cell) for cell in found]}
                Path(f"{base}.json").write_text(json.dumps(whole, indent=1) + "\n")
                Path(f"{base}.md").write_text(markdown(found, about))
    sys.stdout.write(f"written: {base}.md\n")
    return int(any(cell.call_ns > LIMIT_NS for cell in found))


BENCHMARK = Benchmark(
    "mpi_rounds",
    "the thirteen calls of a halo exchange that pass cost next to nothing under the preload",
    lambda context: (),
    program=run,
)
