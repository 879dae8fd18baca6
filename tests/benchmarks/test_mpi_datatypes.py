"""The benchmark of datatypes judges itself, makes the shipped tables from samples, and feeds the halo's model."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from undertow.benchmarks import halo3d, mpi_datatypes
from undertow.mpi_interpose import build, policy
from undertow.mpi_interpose.samples import Cell, text


def cell(use: str, name: str, size: int, block: int, cls: str = "strided", held: bool = False, **arms: float) -> Cell:
    ns = {"library": 1e5, "again": 1e5, "auto": 1e5, **arms}
    return Cell(use, cls, name, block, 2 * block, size, held, 0, 1, {arm: (t,) * 7 for arm, t in ns.items()})


OPENMPI = SimpleNamespace(version="Open MPI v9.8.7, package", flavour="openmpi")


def test_it_names_losing_cells_and_missed_targets() -> None:
    cells = [
        cell("pack", "indexed_block-b4", 65536, 4, "table", forced=1e4, auto=1e4),
        cell("pack", "indexed_block-b8", 65536, 8, "table", forced=1e4, auto=4e4),
        cell("unpack", "vector-b16-s32", 65536, 16, forced=2e5, auto=2e5),
        cell("call-pack", "predefined", 4, 4, "contiguous", library=20, again=20, forced=90, auto=90),
    ]
    found = {goal.text: goal for goal in mpi_datatypes.goals(cells, OPENMPI)}  # type: ignore[arg-type]
    slower = found["no cell slower in mode auto (interval below 0.95, over 2 us)"]
    assert (slower.measured, slower.met) == ("1 of 3", False)
    indexed = found["MPI_Pack of indexed 4 and 8 B blocks, 64 KiB: 5x"]
    assert indexed.measured.startswith("2.50x [2.50, 2.50], least of 2: pack indexed_block-b8") and not indexed.met
    passed = found["passed through, pack (predefined): 50 ns"]
    assert (passed.measured, passed.met) == ("+70 ns [+70, +70]", False)
    assert found["choice of packs right in 95%, judged by other rounds"].met
    lines = mpi_datatypes.judge(cells, OPENMPI)  # type: ignore[arg-type]
    assert lines[0].split() == ["goal", "measured", "met"] and lines[1].endswith("NO")
    assert any(line.startswith("  unpack vector-b16-s32 65536: 0.50") for line in lines)


def test_a_choice_is_judged_by_rounds_that_did_not_fit_it() -> None:
    ways = {"send": 9e4, "recv": 9e4, "both": 2e4, "forced": 9e4}
    steady = cell("message", "indexed_block-b4", 65536, 4, "table", **ways)
    arms = {**steady.arms, "both": tuple(2e4 if k % 2 == 0 else 3e5 for k in range(7))}
    lucky = replace(steady, name="indexed_block-b8", block=8, arms=arms)
    (good,) = mpi_datatypes.halves([steady])
    assert (good.chosen, good.best, good.right) == ("both", "both", True)
    (bad,) = mpi_datatypes.halves([lucky])
    assert bad.chosen == "both" and bad.best in ("send", "recv") and not bad.right and bad.regret > 2
    found = {goal.text: goal for goal in mpi_datatypes.goals([steady, lucky], OPENMPI)}  # type: ignore[arg-type]
    assert not found["mean regret of messages at most 2%"].met
    assert found["none as half the rounds choose, by the others (interval below 0.95, over 2 us)"].measured == "1 of 2"
    assert not found["messages of indexed 4 and 8 B blocks, 64 KiB: 3x"].met  # as chosen, not as auto does


def test_a_gain_that_no_packing_could_bring_is_told_from_one_that_is_missed() -> None:
    mpich = SimpleNamespace(version="MPICH Version: 9.8.7", flavour="mpich")
    missed = cell("message", "vector-b16-s32", 65536, 16, send=1e5, recv=1e5, both=4e4, dense=2e4)
    had = cell("message", "vector-b32-s64", 65536, 32, send=1e5, recv=1e5, both=2.5e4, dense=2e4)
    beyond = cell("message", "vector-b64-s128", 65536, 64, send=1e5, recv=1e5, both=9e4, dense=8e4)
    found = {goal.text: goal for goal in mpi_datatypes.goals([missed, had, beyond], mpich)}  # type: ignore[arg-type]
    goal = found["messages of 64 KiB vectors with blocks up to 256 B: 3x"]
    assert goal.measured.startswith("1.11x") and not goal.met
    assert goal.measured.endswith("packing for nothing gives 1.25x there, and 3x in 2, of which 1 have it")


def test_results_hold_what_the_promise_needs() -> None:
    (row,) = json.loads(json.dumps(mpi_datatypes.as_data([cell("pack", "x", 1024, 16, forced=5e4)])))
    assert row["arms"]["forced"]["library_over_arm"] == [2, 2, 2] and not row["breaks"]


def test_shipped_tables_have_rows_per_version_and_processor_and_the_least_gains_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "POLICY", tmp_path)
    for major, kind, forced in ((4, "a", 2e4), (5, "a", 5e4), (5, "b", 1e4)):
        lines = text([cell("pack", "v", 4096, 16, forced=forced), cell("pack", "v", 1024, 16, held=True, forced=1e3)])
        with gzip.open(tmp_path / f"{major}{kind}.gz", "wt") as file:
            file.write(f"Open MPI v{major}.0.1\nsome processor\n{kind}\n{lines}")
    mpi_datatypes.ship(sorted(tmp_path.glob("*.gz")))
    shipped = (tmp_path / "openmpi.txt").read_text()
    for version, kind, gain in (
        ("Open MPI v4.1.4", "a", 5),
        ("Open MPI v4.1.4", "b", 5),
        ("Open MPI v5.0.9", "a", 2),
        ("Open MPI v5.0.9", "b", 10),
        ("Open MPI v5.0.9", "c", 2),
        ("Open MPI v6.0.0", "b", 2),
        ("Spectrum 5", "b", 2),
    ):
        table = policy.Policy(shipped, version, kind)
        assert table.rows == 2, version  # cells that were held from fitting are shipped, too
        assert table.ask("pack", "strided", 16, 32, 4096)[0] == pytest.approx(gain, rel=0.01), (version, kind)


def test_a_table_that_is_kept_counts_as_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "POLICY", tmp_path)

    def shipped(major: int, kind: str, ours_ns: float, keep: bool) -> list[float]:
        lines = text([cell("pack", "v", 4096, 16, forced=ours_ns)])
        with gzip.open(tmp_path / "run.gz", "wt") as file:
            file.write(f"Open MPI v{major}.0.1\nprocessor {ours_ns:.0f}\n{kind}\n{lines}")
        mpi_datatypes.ship([tmp_path / "run.gz"], keep)
        found = (tmp_path / "openmpi.txt").read_text()
        tables = [policy.Policy(found, f"Open MPI v{k}.1.4", of) for k, of in ((4, "a"), (5, "a"), (5, "b"))]
        return [table.ask("pack", "strided", 16, 32, 4096)[0] for table in tables]

    assert shipped(4, "a", 5e4, keep=False) == pytest.approx([2, 2, 2], rel=0.01)
    assert shipped(5, "a", 2e4, keep=True) == pytest.approx([2, 5, 5], rel=0.01)
    assert shipped(5, "b", 1e4, keep=True) == pytest.approx([2, 5, 10], rel=0.01)
    assert shipped(5, "a", 4e4, keep=True) == pytest.approx([2, 2.5, 10], rel=0.01)
    assert shipped(5, "a", 1e4, keep=True) == pytest.approx([2, 2.5, 10], rel=0.01)
    assert (tmp_path / "openmpi.txt").read_text().count("# 5.0.1 on processor ") == 4
    assert shipped(5, "b", 1e4, keep=False) == pytest.approx([10, 10, 10], rel=0.01)


@pytest.mark.parametrize("version", ["Open MPI v4.1.4", "Open MPI v5.0.11", "MPICH Version: 5.0.2", "MPICH Version: 9"])
def test_what_is_shipped_reads_and_never_takes_a_message_blindly(version: str) -> None:
    table = policy.Policy(build.builtin_model("openmpi" if "Open" in version else "mpich"), version)
    assert table.rows > 100
    assert table.ask("send_remote", "strided", 16, 32, 65536) == (0, 0)  # other hosts were not measured
    assert table.ask("pack", "strided", 1 << 20, 1 << 21, 1 << 24)[0] < policy.GAIN


def test_the_modelled_halo_is_the_ranks_work_or_the_wire() -> None:
    rows = [cell("message", f"face-{axis}", 65536, 4, both=5e4) for axis in "zyx"]
    data = mpi_datatypes.as_data(rows)
    found = halo3d.faces(data, 128, "library")
    assert found is not None and found.local_s == pytest.approx(6e-4)
    assert halo3d.faces(data, 64, "library") is None
    slow = halo3d.Cluster(3072, 4, 1e9, 0.0)
    assert slow.exchange_s(found) == pytest.approx(96 * 65536 / 1e9)  # 16 faces of 6 sides through 1 GB/s
    assert halo3d.Cluster(64, 4, 1e9, 0.0).exchange_s(found) == pytest.approx(6e-4)  # one node: no wire
