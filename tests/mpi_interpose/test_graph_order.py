"""MPI_Dist_graph_create_adjacent with reorder: neighbours are put together, and stay who they were."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from mpis import PROGRAMS, Install, environment

HEAVY, LIGHT = 50, 1


def run(install: Install, places: Sequence[str], **variables: str) -> tuple[int, int]:
    words: list[str] = []
    common = {"LD_PRELOAD": str(install.preload), "UNDERTOW_MPI_MODE": "force", **variables}
    for k, place in enumerate(places):
        own = [f"{name}={value}" for name, value in {**common, "UNDERTOW_MPI_PLACE": place}.items()]
        words += [*([":"] if k else []), "-n", "1", "env", *own, str(install.python), str(PROGRAMS / "graph.py")]
    done = subprocess.run(
        [*install.mpirun, *words], env=environment(install), capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0 and "ok" in done.stdout, done.stdout + done.stderr[-3000:]
    before, after = next(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("crossing"))
    return int(before), int(after)


def test_heavy_neighbours_meet_on_one_place(pympi: Install) -> None:
    before, after = run(pympi, "aabb", UNDERTOW_MPI_REORDER="1")
    assert before >= 4 * HEAVY and after <= 8 * LIGHT  # pairs (0, 2) and (1, 3) no longer cross


def test_without_the_switch_the_library_decides(pympi: Install) -> None:
    assert run(pympi, "aabb", UNDERTOW_MPI_REORDER="0") == run(pympi, "aabb")


def test_an_order_that_is_good_already_is_kept(pympi: Install) -> None:
    assert run(pympi, "abab", UNDERTOW_MPI_REORDER="1") == (8 * LIGHT, 8 * LIGHT)


def test_heavy_neighbours_meet_on_one_socket_of_a_host(pympi: Install) -> None:
    places = ["host/0", "host/0", "host/1", "host/1"]
    before, after = run(pympi, places, UNDERTOW_MPI_REORDER="1")
    assert before >= 4 * HEAVY and after <= 8 * LIGHT
