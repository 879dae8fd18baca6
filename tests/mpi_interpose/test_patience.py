"""Rounds, and calls with types that reach far, are learned from when a program has run for long enough; until then the
library has them.
"""

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
SPELLS = "".join(  # what programs/patience.py does: 64 KiB that reach over 128 KiB, 1 MiB and 6 MiB, and small rounds
    f"{use} strided 4 {step} {size} 9000 1000 1\n"
    for use in ("pack", "unpack", "send_local", "recv_local")
    for step, size in ((8, 65536), (64, 65536), (384, 65536), (16, 2048))
)


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
    taken, passed = messages(pympi, how, 5, tmp_path)  # some 20 ms on the fastest machine so far
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


def spells(
    install: Install, folder: Path, program: str, kib: int, pause_s: float = 0, *, wait: str = "", mode: str = "auto",
    before_s: float = 100,
) -> tuple[dict[str, tuple[int, int]], int]:  # fmt: skip
    """(taken, passed) of each use of programs/patience.py on all ranks, and how many the report says came too soon.

    The program is run again while it is not done `before_s` after its MPI_Init: then it may have outlasted a patience.
    """
    table, ranks = folder / "table.txt", 2 if program == "calls" else 1
    table.write_text(SPELLS)
    command = [str(install.python), str(PROGRAMS / "patience.py"), program, str(kib), str(pause_s)]
    variables = {"UNDERTOW_MPI_PATIENCE_MS": wait, "UNDERTOW_MPI_MODEL": str(table)}
    for _ in range(8):
        said = start(install, ranks, command, mode, folder / "report", **variables)
        if float(said.split("ok ")[1].split()[0]) < before_s:
            break
    else:
        pytest.fail(f"eight programs in a row took longer than {before_s} s: {said}")
    merged = launch.merge([folder / f"report.{rank}.json" for rank in range(ranks)], folder / "merged.json")
    found = {
        use: tuple(sum(row[use][how] for row in merged["types"] if use in row) for how in ("taken", "passed"))
        for use in launch.USES
    }
    return found, sum(n for why, n in merged["refused"].items() if "UNDERTOW_MPI_PATIENCE_MS" in why)


def test_by_itself_a_program_waits_for_a_tenth_of_a_second_before_it_learns_from_rounds(
    pympi: Install, tmp_path: Path
) -> None:
    found, _ = spells(pympi, tmp_path, "rounds", 128, before_s=0.06)
    assert found["send"] == found["recv"] == (0, 600)
    found, _ = spells(pympi, tmp_path, "rounds", 128, wait="0")  # as many are enough to be tried
    assert found["send"][0] > 0 and found["recv"][0] > 0
    found, _ = spells(pympi, tmp_path, "rounds", 128, pause_s=0.11)
    assert found["send"][0] > 0 and found["recv"][0] > 0


def test_a_type_that_reaches_far_is_not_taken_in_the_first_second(pympi: Install, tmp_path: Path) -> None:
    early, too_soon = spells(pympi, tmp_path, "calls", 1024, before_s=0.9)
    assert early == {"pack": (0, 12), "unpack": (0, 12), "send": (0, 24), "recv": (0, 24)} and too_soon == 72
    # Compared at its third use, the unpack of the second step here, or the message after it.
    for at_once in (
        spells(pympi, tmp_path, "calls", 1024, wait="0"),
        spells(pympi, tmp_path, "calls", 1024, mode="force"),
        spells(pympi, tmp_path, "calls", 128),
    ):
        found, too_soon = at_once
        assert too_soon == 0 and all(taken >= passed for taken, passed in found.values()), found
        assert sum(passed for _, passed in found.values()) <= 2 * 2


def test_its_time_comes_after_a_second_and_that_of_larger_ones_later(pympi: Install, tmp_path: Path) -> None:
    found, too_soon = spells(pympi, tmp_path, "calls", 1024, pause_s=1.01)
    assert too_soon <= 72 and all(taken > 0 for taken, _ in found.values()), found
    found, too_soon = spells(pympi, tmp_path, "calls", 6144, pause_s=1.01, before_s=9)
    assert too_soon == 144 and all(taken == 0 for taken, _ in found.values()), found


def test_the_variable_holds_for_far_types_alike_and_never_for_small_ones(pympi: Install, tmp_path: Path) -> None:
    found, too_soon = spells(pympi, tmp_path, "calls", 1024, pause_s=1.01, wait="100000", before_s=90)
    assert too_soon == 144 and all(taken == 0 for taken, _ in found.values()), found
    found, too_soon = spells(pympi, tmp_path, "calls", 6144, pause_s=0.05, wait="40")
    assert all(taken > 0 for taken, _ in found.values()), found
    found, too_soon = spells(pympi, tmp_path, "calls", 128, wait="100000")
    assert too_soon == 0 and all(taken > 0 for taken, _ in found.values()), found


def test_persistent_requests_do_not_wait(pympi: Install, tmp_path: Path) -> None:
    found, too_soon = spells(pympi, tmp_path, "kept", 1024, before_s=0.9)
    assert too_soon == 0 and found["send"][0] == found["recv"][0] == 5, found  # all after the first two sides
