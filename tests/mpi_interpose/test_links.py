"""The table's rows for each link: two pairs of ranks that UNDERTOW_MPI_PLACE puts in two places, on one host."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from mpis import PROGRAMS, Install, environment

from undertow.mpi_interpose import launch, measure, policy

NEAR = "send_local strided 4 16 4096 9 1 1\nsend_local strided 4 16 8192 9 1 1\n"
FAR = NEAR.replace("local", "remote")


def run(install: Install, table: str, folder: Path, told: bool) -> dict[int, dict]:
    """Rank 0's sends by the bytes of their datatype; `told`: the ranks know that all have the preload."""
    (folder / "table.txt").write_text(table)
    words: list[str] = []
    for k, place in enumerate("AABB"):
        variables = {
            "LD_PRELOAD": install.preload,
            "UNDERTOW_MPI_MODE": "auto",
            "UNDERTOW_MPI_MODEL": folder / "table.txt",
            "UNDERTOW_MPI_REPORT": folder / "report",
            "UNDERTOW_MPI_PLACE": place,
            "UNDERTOW_MPI_REORDER": int(told),
        }
        program = [str(install.python), str(PROGRAMS / "links.py")]
        words += [*([":"] if k else []), "-n", "1", "env", *(f"{n}={v}" for n, v in variables.items()), *program]
    done = subprocess.run(
        [*install.mpirun, *words], env=environment(install), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0 and "ok" in done.stdout, done.stdout + done.stderr
    seen = "socket|host" if told else "unknown"
    assert any(f"rank 0 sees socket {near}" in done.stdout for near in seen.split("|")), done.stdout
    merged = launch.merge(sorted(folder.glob("report.[0-3].json")), folder / "merged.json")
    (row,) = (row for row in merged["types"] if row["size"] == 8192)
    if told and table == NEAR:
        (checked,) = (c for c in row["checked"] if c["use"] == "send" and c["least_bytes"] == 4096)
        assert checked["decision"] == "ours" and min(checked["samples"]) >= 200
        (line,) = (line for line in measure.corrections(merged, row["plan"]) if "send" in line)
        assert "4096 B and more" in line and "packed by us" in line
    return {row["size"]: row.get("send", {}) for row in json.loads((folder / "report.0.json").read_text())["types"]}


@pytest.mark.slow
def test_each_link_has_its_own_rows_and_samples_correct_them(pympi: Install, tmp_path: Path) -> None:
    def taken(sends: dict[int, dict]) -> list[int]:
        return [sends[4 * n]["taken"] for n in range(1024, 1031)]

    # To the neighbour and the far one, in the world and in a reversed communicator; across, plainly and between groups;
    # in communicators that are freed, near and far in turn.
    near = run(pympi, NEAR, tmp_path, told=True)
    assert taken(near) == [1, 0, 1, 0, 0, 0, 3]
    assert (near[8192]["taken"], near[8192]["passed"]) == (3 + 10 + 1000, 100)  # see `corrected` in links.py
    far = run(pympi, FAR, tmp_path, told=True)
    assert taken(far) == [0, 1, 0, 1, 1, 1, 3] and far[8192]["taken"] == 0
    assert taken(run(pympi, NEAR + FAR, tmp_path, told=True)) == [*[1] * 6, 6]


def test_without_rows_of_its_own_a_socket_uses_those_of_the_host_and_never_those_of_the_network() -> None:
    at = ("strided", 4, 16, 4096)
    local = policy.Policy(NEAR)
    assert local.ask("send_socket", *at) == local.ask("send_local", *at) != (0, 0)
    assert local.ask("send_remote", *at) == local.ask("recv_socket", *at) == (0, 0)
    socket = policy.Policy(NEAR.replace("local", "socket"))
    assert socket.ask("send_local", *at) == socket.ask("send_socket", *at) != (0, 0)
    both = policy.Policy(NEAR + NEAR.replace("local", "socket").replace(" 9 1", " 9 3"))
    assert both.ask("send_local", *at)[0] == pytest.approx(9) and both.ask("send_socket", *at)[0] == pytest.approx(3)
    assert policy.Policy(FAR).ask("send_local", *at) == (0, 0)
