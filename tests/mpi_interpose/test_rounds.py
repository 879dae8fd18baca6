"""Messages that one MPI_Waitall completes are timed as a round, and only where the time is the round's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mpis import PROGRAMS, Install, start

from undertow.mpi_interpose import launch, measure

TABLE = "".join(f"{use}_local strided 4 16 {size} 9 1 1\n" for use in ("send", "recv") for size in (2048, 4096))


def checked(install: Install, how: str, folder: Path) -> tuple[list[dict], dict]:
    """What the timed calls and rounds of a run said, and the whole report."""
    table, report = folder / "table.txt", folder / how
    table.write_text(TABLE)
    program = [str(install.python), str(PROGRAMS / "rounds.py"), how]
    assert "ok" in start(install, 2, program, "auto", report, UNDERTOW_MPI_MODEL=str(table))
    merged = launch.merge(sorted(folder.glob(f"{how}.[01].json")), folder / f"{how}-merged.json")
    for row in merged["types"]:
        assert sum(row[use]["taken"] + row[use]["passed"] for use in ("send", "recv")) == 2 * 2 * 1024
    return [one for row in merged["types"] for one in row["checked"]], merged


@pytest.mark.slow
def test_rounds_that_one_waitall_completes_are_timed_both_ways(pympi: Install, tmp_path: Path) -> None:
    found, merged = checked(pympi, "waitall", tmp_path)
    assert {(one["use"], one["of"]) for one in found} == {("send", "rounds"), ("recv", "rounds")}
    # 1,023 rounds after the first; one in 64 of either path, rarer by and by once both have six samples
    assert all(6 <= one["samples"][0] <= 16 and 6 <= one["samples"][1] <= 16 for one in found), found
    assert all(min(one["ps_per_byte"]) > 0 for one in found)
    # What is timed goes one way as a whole: on each rank the sends and the receives have as many samples.
    for rank in (0, 1):
        types = json.loads((tmp_path / f"waitall.{rank}.json").read_text())["types"]
        assert len({tuple(one["samples"]) for row in types for one in row["checked"]}) == 1
    assert any("send in rounds" in line for line in measure.corrections(merged, merged["types"][0]["plan"]))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["wait", "late"])
def test_other_completions_are_not_timed(pympi: Install, how: str, tmp_path: Path) -> None:
    found, _ = checked(pympi, how, tmp_path)
    assert found == []
