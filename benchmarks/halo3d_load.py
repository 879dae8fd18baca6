"""Whether a halo exchange beside other programs is still decided rightly: many starts, what each decided, what it cost.

    python -m undertow.benchmarks.halo3d_load [--mpi openmpi-5] [--cells 16 32] [--loads none niced busy] [--starts 10]
    python -m undertow.benchmarks.halo3d_load --python …        the mpi4py example, with the preload and without in turn
    python -m undertow.benchmarks.halo3d_load --read FILE…      the table of results that were kept (--output)

A busy machine is where a trial may decide for what loses. In C, csrc/tools/rounds.c starts with 1,000 rounds of
examples/halo3d.c's exchange under the preload, with the shipped table, and then times rounds by the preload and by the
library's own functions in turn, in one process, so that the load meets both; the library is there twice (A/A). A start
has lost where its rounds take over 3 % more than the library's, and more than three times what the A/A column is off.
Loads: a process for each core that copies memory, at nice 19 or 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from undertow.benchmarks.facts import facts
from undertow.benchmarks.mpi_datatypes import installed, label
from undertow.benchmarks.mpi_rounds import Start, program, read
from undertow.mpi_interpose import build, measure
from undertow.mpi_interpose.launch import environment
from undertow.mpi_interpose.toolchain import Mpi
from undertow.mpi_interpose.toolchain import environment as clean_environment

BUSY = "import numpy as np\na, b = np.zeros(1 << 20), np.zeros(1 << 20)\nwhile True: b[:] = a"
NICE = {"none": None, "niced": 19, "busy": 0}
TURNS, ROUNDS, PYTHON_STEPS = 16, 60, 4000


@dataclass(frozen=True)
class Decided:
    """One start: its times in ns, and how many ranks pack some of these messages at the end."""

    library: float
    again: float
    preload: float
    packs: int

    @property
    def lost(self) -> bool:
        return self.preload > max(0.03 * self.library, 3 * abs(self.again))

    @property
    def ratio(self) -> float:
        """Plain / ours."""
        return self.library / (self.library + self.preload)


@contextlib.contextmanager
def load(kind: str) -> Iterator[None]:
    """Other programs, one for each core, until the block ends."""
    nice = NICE[kind]
    command = ["nice", "-n", str(nice), sys.executable, "-c", BUSY]
    others = [subprocess.Popen(command) for _ in range(os.cpu_count() or 2)] if nice is not None else []
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def environment_of(mpi: Mpi, mode: str, report: Path | None = None) -> tuple[dict[str, str], list[str]]:
    """Variables of the launcher, and the words that set the preload for the ranks alone."""
    values = clean_environment()
    if mode == "off":
        return values, []
    values.update(environment(build.library(mpi), mode, str(report) if report else None), UNDERTOW_MPI_PATIENCE_MS="0")
    return values, ["env", f"LD_PRELOAD={values.pop('LD_PRELOAD')}"]


def packing(report: Path, ranks: int) -> int:
    """Ranks whose report says that rounds of some datatype are packed."""
    found = 0
    for rank in range(ranks):
        types = json.loads(Path(f"{report}.{rank}.json").read_text())["types"]
        found += any(one["decision"] == "ours" for row in types for one in row["checked"] if one["of"] == "rounds")
    return found


def start(mpi: Mpi, binary: Path, cells: int, turns: int, folder: Path) -> Decided:
    values, preload = environment_of(mpi, "auto", folder / "report")
    command = [*measure.launcher(mpi), "-n", "2", *preload, str(binary), str(cells), str(turns), str(ROUNDS)]
    done = subprocess.run(command, env=values, capture_output=True, text=True, check=True, timeout=300)
    times: Start = read(done.stdout)
    return Decided(times.library, times.again, times.preload, packing(folder / "report", 2))


def python_of(mpi: Mpi) -> Path | None:
    """The Python beside this MPI's wrapper, if it has mpi4py: another one's would bring another MPI."""
    python = Path(mpi.mpicc or "").with_name("python")
    asked = [str(python), "-c", "import mpi4py"]
    return (
        python if python.exists() and not subprocess.run(asked, capture_output=True, check=False).returncode else None
    )


def python_run(mpi: Mpi, python: Path, mode: str, cells: int, steps: int) -> float:
    """Median exchange of examples/halo3d.py, ns."""
    values, preload = environment_of(mpi, mode)
    here = Path(__file__).resolve().parents[1]
    words = [str(python), str(here / "examples" / "halo3d.py"), "--cells", str(cells), "--steps", str(steps)]
    command = [*measure.launcher(mpi), "-n", "2", *preload, *words]
    done = subprocess.run(command, env=values, capture_output=True, text=True, check=True, timeout=300)
    found = re.search(r'"median_s": ([\d.e-]+)', done.stdout)
    if not found:
        raise ValueError(f"halo3d.py said: {done.stdout[-200:]}")
    return float(found[1]) * 1e9


def bounds(ratios: list[float]) -> tuple[float, float, float]:
    """Median over starts with the 95 % interval of a seeded bootstrap."""
    rng = np.random.default_rng(0)
    draws = np.median(rng.choice(ratios, (4000, len(ratios))), axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def row(mpi: str, cells: int, kind: str, starts: list[Decided]) -> str:
    middle, low, high = bounds([one.ratio for one in starts])
    worst = max(one.preload for one in starts)
    lost = sum(one.lost for one in starts)
    packed = sum(one.packs > 0 for one in starts)
    wrong = sum(one.lost and one.packs > 0 for one in starts)
    library = statistics.median(one.library for one in starts)
    again = statistics.median(one.again for one in starts)
    values = (
        *(mpi, f"{cells}³", kind, len(starts), f"{library / 1000:.2f}", f"{again:.0f}", packed, lost, wrong),
        *(f"{statistics.median(one.preload for one in starts):.0f}", f"{worst:.0f}"),
        f"{middle:.3f} [{low:.3f}, {high:.3f}]",
    )
    return "| " + " | ".join(map(str, values)) + " |"


HEAD = (
    "| MPI | cells | load | starts | library, µs | A/A, ns more | pack | lost | pack and lost | ours, ns more | "
    "worst | plain / ours |\n|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


PYTHON_HEAD = (
    "| MPI | cells | load | starts | library, µs | plain / plain | plain / ours |\n|---|---:|---|---:|---:|---:|---:|"
)


def python_row(mpi: str, cells: int, kind: str, starts: list[list[float]]) -> str:
    """`starts`: median exchanges of the program plain, plain again and under the preload, ns."""
    ratios = [
        "{:.3f} [{:.3f}, {:.3f}]".format(*bounds([plain / other for plain, other in pairs]))
        for pairs in ([one[:2] for one in starts], [one[::2] for one in starts])
    ]
    library = f"{statistics.median(one[0] for one in starts) / 1000:.2f}"
    return "| " + " | ".join([mpi, f"{cells}³", kind, str(len(starts)), library, *ratios]) + " |"


def tables(files: list[Path]) -> str:
    """The rows of results that were written by --output: the C program's, then the Python program's."""
    cells = [cell for file in files for cell in json.loads(file.read_text())["cells"]]
    name = lambda cell: (cell["mpi"], cell["cells"], cell["load"])  # noqa: E731
    c = [row(*name(cell), [Decided(**one) for one in cell["starts"]]) for cell in cells if "starts" in cell]
    python = [python_row(*name(cell), cell["python"]) for cell in cells if "python" in cell]
    return "\n".join([*([HEAD, *c] if c else []), *([PYTHON_HEAD, *python] if python else []), ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mpi", default="", help="only those whose name holds this word")
    parser.add_argument("--cells", type=int, nargs="+", default=[16])
    parser.add_argument("--loads", nargs="+", choices=list(NICE), default=list(NICE))
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--python", action="store_true", help="the mpi4py example, program against program")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--read", type=Path, nargs="+", help="results to print")
    options = parser.parse_args(argv)
    if options.read:
        sys.stdout.write(tables(options.read))
        return 0
    chosen = [mpi for mpi in installed() if options.mpi in label(mpi)]
    found: list[dict] = []
    sys.stdout.write(f"{PYTHON_HEAD if options.python else HEAD}\n")
    with tempfile.TemporaryDirectory() as name:
        for mpi in chosen:
            python = python_of(mpi) if options.python else None
            if options.python and not python:
                sys.stderr.write(f"{label(mpi)}: not run, no Python beside {mpi.mpicc} has mpi4py\n")
                continue
            binary = program(mpi, Path(name)) if python is None else Path()
            for cells in options.cells:
                for kind in options.loads:
                    cell = {"mpi": label(mpi), "cells": cells, "load": kind}
                    with load(kind):
                        if python is None:
                            starts = [
                                start(mpi, binary, cells, options.turns, Path(name)) for _ in range(options.starts)
                            ]
                            line = row(label(mpi), cells, kind, starts)
                            found.append({**cell, "starts": [asdict(one) for one in starts]})
                        else:
                            times = [
                                [python_run(mpi, python, mode, cells, PYTHON_STEPS) for mode in ("off", "off", "auto")]
                                for _ in range(options.starts)
                            ]
                            line = python_row(label(mpi), cells, kind, times)
                            found.append({**cell, "python": times})
                    sys.stdout.write(line + "\n")
                    sys.stdout.flush()
                    if options.output:
                        options.output.write_text(json.dumps({"format": 1, "facts": facts(), "cells": found}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
