"""Rounds are learned from when a program has run for long enough; until then the library has all of its messages."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from mpis import PROGRAMS, Install, environment, start

import undertow.examples
from undertow.mpi_interpose import launch

pytestmark = pytest.mark.slow  # on the checkout only

TABLE = "".join(f"{use}_local strided 4 16 {size} 9 1 1\n" for use in ("send", "recv") for size in (2048, 4096))
CALLS = 2 * 2 * 1024  # of each use, by two ranks that send two datatypes


def messages(install: Install, how: str, patience_ms: int, folder: Path) -> tuple[int, int]:
    """How many of the program's messages were taken, and how many passed."""
    table, report = folder / "table.txt", folder / f"{how}-{patience_ms}"
    table.write_text(TABLE)
    program = [str(install.python), str(PROGRAMS / "rounds.py"), how]
    wait = {"UNDERTOW_MPI_PATIENCE_MS": str(patience_ms), "UNDERTOW_MPI_MODEL": str(table)}
    assert "ok" in start(install, 2, program, "auto", report, **wait)
    merged = launch.merge(sorted(folder.glob(f"{report.name}.[01].json")), folder / "merged.json")
    sides = [row[use] for row in merged["types"] for use in ("send", "recv")]
    return sum(side["taken"] for side in sides), sum(side["passed"] for side in sides)


@pytest.mark.parametrize("how", ["waitall", "wait", "late"])
def test_a_short_program_is_left_alone_and_a_longer_one_is_not(pympi: Install, how: str, tmp_path: Path) -> None:
    assert messages(pympi, how, 100_000, tmp_path) == (0, 2 * CALLS)
    taken, passed = messages(pympi, how, 20, tmp_path)
    assert taken > 0 and taken + passed == 2 * CALLS


def test_types_that_reach_far_wait_for_longest_and_force_waits_for_nothing(mpi: Install, tmp_path: Path) -> None:
    """By themselves: 10 s of a program for the faces of 128³ cells, whose comparison takes many milliseconds."""
    program = tmp_path / "halo3d"
    source = Path(undertow.examples.__file__).parent / "halo3d.c"
    subprocess.run([mpi.mpicc, "-O2", str(source), "-o", str(program)], check=True, env=environment(mpi))
    for mode, taken in (("auto", 0), ("force", 6 * 12)):
        report = tmp_path / mode
        out = start(mpi, 2, [str(program), "128", "12"], mode, report, UNDERTOW_MPI_PATIENCE_MS="")
        assert "0 wrong ghosts" in out
        sends = json.loads(Path(f"{report}.0.json").read_text())["functions"]["MPI_Isend"]
        assert sends["taken"] == taken, (mode, sends)


def test_a_patience_that_is_no_number_is_named(pympi: Install) -> None:
    program = [str(pympi.python), "-c", "from mpi4py import MPI"]
    said = start(pympi, 1, program, "auto", UNDERTOW_MPI_PATIENCE_MS="soon")
    assert "UNDERTOW_MPI_PATIENCE_MS=soon is not a number of milliseconds" in said
