"""A 3-D halo exchange by subarray types: plain, and under the preload; and a model of it on thousands of processes.

    undertow bench halo3d [--filter mpich-5]                        two ranks, every MPI at hand
    python -m undertow.benchmarks.halo3d RESULT.json [--ranks N]    the modelled exchange, from mpi_datatypes' result

Measured: examples/halo3d.c with cells of 4 bytes, program against program, times of the slowest rank. A program of
4,000 exchanges gives its median, in which the trials of the preload do not show, which begin at once here
(UNDERTOW_MPI_PATIENCE_MS=0) and else when a program has run for longer; one of 1,000, under the preload as it comes,
gives the mean of all that it did. Of a mean the A/A row says how noisy the machine is. The prediction, where a result
of `undertow bench mpi_datatypes` for this MPI is kept, is the sum of the six faces' measured messages. Modelled: the
same sum on nodes of many ranks, whose faces that leave a node share its network card; a rank's own work is taken from
the two-rank measurement. Nothing of the model was run at scale.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Measured, Trial
from undertow.benchmarks.facts import ROOT
from undertow.benchmarks.mpi_datatypes import installed, label
from undertow.mpi_interpose import build, measure
from undertow.mpi_interpose.launch import environment
from undertow.mpi_interpose.toolchain import Mpi
from undertow.mpi_interpose.toolchain import environment as clean_environment

SOURCE = ROOT / "examples" / "halo3d.c"
FACES = ("face-z", "face-y", "face-x")
ARMS = {"library": "off", "interposed": "auto", "forced": "force"}
# Exchanges of a program. LONG: more than twice those in which the preload tries its ways.
LONG, SHORT, QUICK = 4000, 1000, 800


@lru_cache(maxsize=8)
def program(mpi: Mpi, folder: Path) -> Path:
    """The example built for `mpi`, with cells of 4 bytes as in the measured faces."""
    target = folder / f"halo3d-{label(mpi)}"
    command = [mpi.mpicc, "-O2", "-DCELL=float", "-DMPI_CELL=MPI_FLOAT", str(SOURCE), "-o", str(target)]
    subprocess.run(command, check=True, env=clean_environment())
    return target


def exchange(mpi: Mpi, mode: str, n: int, steps: int, folder: Path) -> Measured:
    """One run of the program on two ranks, in seconds an exchange; the answer is the number of wrong ghosts.

    A run of SHORT exchanges gives their mean, another their median.
    """
    values = clean_environment()
    ranks = ["-n", "2"]
    if mode != "off":
        values.update(environment(build.library(mpi), mode, None))
        if steps != SHORT:
            values["UNDERTOW_MPI_PATIENCE_MS"] = "0"
        ranks += ["env", f"LD_PRELOAD={values.pop('LD_PRELOAD')}"]
    command = [*measure.launcher(mpi), *ranks, str(program(mpi, folder)), str(n), str(steps)]
    done = subprocess.run(command, env=values, capture_output=True, text=True, check=True, timeout=300)
    found = re.search(r"exchange ([\d.]+) us \(mean ([\d.]+)\), (\d+) wrong", done.stdout)
    if not found:
        raise ValueError(f"halo3d said: {done.stdout[-200:]}")
    return Measured(int(found[3]), float(found[2 if steps == SHORT else 1]) / 1e6)


@dataclass(frozen=True)
class Faces:
    """One-way times in seconds of the three faces of an n³ cube of 4-byte cells, for a way of messages."""

    n: int
    seconds: dict[str, float]

    @property
    def local_s(self) -> float:
        """The six faces of a rank, one after the other: what it packs, moves and unpacks itself."""
        return 2 * sum(self.seconds.values())


def faces(cells: Sequence[dict], n: int, arm: str) -> Faces | None:
    """From the rows of mpi_datatypes' JSON; None when they lack this size."""
    found = {
        row["name"]: row["arms"][arm]["ns"][1] / 1e9
        for row in cells
        if row["use"] == "message" and row["name"] in FACES and row["size"] == 4 * n * n
    }
    return Faces(n, found) if len(found) == 3 else None


def result_of(mpi: Mpi) -> list[dict]:
    """The newest kept result of mpi_datatypes for this MPI, or nothing."""
    files = sorted((ROOT / "benchmarks" / "results").glob(f"mpi_datatypes_{label(mpi)}_*.json"))
    return json.loads(files[-1].read_text())["cells"] if files else []


def cases(context: Context) -> Sequence[Case]:
    folder = Path(tempfile.mkdtemp(prefix="undertow-halo3d-"))
    sizes = (32,) if context.quick else (16, 32, 64, 128)
    lengths = (QUICK if context.quick else LONG, SHORT)
    return [_case(mpi, n, steps, folder) for mpi in installed() for n in sizes for steps in lengths]


def _case(mpi: Mpi, n: int, steps: int, folder: Path) -> Case:
    def trial() -> Trial:
        known = result_of(mpi)
        way = {"library": "library", "interposed": "auto", "forced": "both"}
        predicted = {arm: faces(known, n, way[arm]) for arm in ARMS}
        arms = []
        for arm, mode in ARMS.items():
            found = predicted[arm]
            run = lambda mode=mode: exchange(mpi, mode, n, steps, folder)  # noqa: E731
            arms.append(Arm(arm, run, predicted_s=found.local_s if found else None))
        return Trial(arms, lambda: 0)

    short = ", mean of 1000" if steps == SHORT else ""
    group = label(mpi) + short
    return Case(
        f"{label(mpi)} {n}^3{short}", trial, "library", "interposed", nbytes=6 * n * n * 4, group=group, x=n, warm_ups=0
    )


BENCHMARK = Benchmark(
    "halo3d",
    "a 3-D halo exchange by subarray types is never slower under the preload, and faster on MPICH",
    cases,
    rounds=9,
    x_label="cells per side and rank",
)


@dataclass(frozen=True)
class Cluster:
    """A machine of equal nodes: `side`³ ranks on each, one network card per node."""

    ranks: int = 3072
    side: int = 4
    nic_bytes_per_s: float = 25e9
    latency_s: float = 2e-6

    def exchange_s(self, found: Faces) -> float:
        """MODELLED time of one exchange: the rank's own work, and the card's time for all faces that leave the node.

        Nodes hold cubes of side³ ranks, so 6·side² faces of 4·n² bytes leave each; packing and the card overlap, so the
        longer of the two counts, and the last message's latency is added.
        """
        on_the_wire_s = 6 * self.side**2 * 4 * found.n**2 / self.nic_bytes_per_s if self.ranks > self.side**3 else 0.0
        return max(found.local_s, on_the_wire_s) + self.latency_s


def model(file: Path, cluster: Cluster) -> str:
    """A table of modelled exchanges, plain and under the preload."""
    data = json.loads(file.read_text())
    lines = [
        f"MODELLED, not run: halo exchange on {cluster.ranks} processes, {cluster.side**3} per node, "
        f"{cluster.nic_bytes_per_s / 1e9:g} GB/s per node, from messages measured with",
        f"{data['facts']['mpi'][:40].strip()} on {data['facts']['hardware']}",
        f"{'cells':>8} {'library us':>12} {'interposed us':>14} {'gain':>6}",
    ]
    for n in (16, 32, 64, 128):
        both = [faces(data["cells"], n, arm) for arm in ("library", "auto")]
        if both[0] and both[1]:
            plain, ours = (cluster.exchange_s(found) * 1e6 for found in both if found)
            lines.append(f"{n:>6}^3 {plain:>12.1f} {ours:>14.1f} {plain / ours:>6.2f}")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("result", type=Path, help="JSON of `undertow bench mpi_datatypes`")
    parser.add_argument("--ranks", type=int, default=Cluster.ranks)
    parser.add_argument("--side", type=int, default=Cluster.side, help="ranks per node are the cube of this")
    parser.add_argument("--nic-gb-s", type=float, default=Cluster.nic_bytes_per_s / 1e9, help="per node")
    options = parser.parse_args(argv)
    sys.stdout.write(model(options.result, Cluster(options.ranks, options.side, options.nic_gb_s * 1e9)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
