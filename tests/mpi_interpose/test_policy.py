"""From samples to intervals, from cells to the table, and what the table answers; no MPI is started."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from undertow.dist.machine import Machine
from undertow.mpi_interpose import core, measure, policy
from undertow.mpi_interpose.errors import InterposeError
from undertow.mpi_interpose.samples import Cell, interval, parse, rank, text

OUTPUT = """noise of a launcher
cell pack strided vector 16 32 65536 0 0 3
arm library 10 11 12 13 14 15 16
arm again 10 11 12 13 14 15 16
arm forced 5 5 5 5 5 5 5
arm auto 10 11 12 13 14 15 16
complete
"""


def cell(
    use: str = "pack", held: bool = False, size: int = 65536, block: int = 16, cls: str = "strided", **arms
) -> Cell:
    """Arms by their ns, seven samples each with 1 % of seeded noise."""
    noise = random.Random(f"{use}{size}{block}")
    times = {"library": 1e5, "again": 1e5, "auto": 1e5, **arms}
    samples = {arm: tuple(ns * noise.uniform(0.99, 1.01) for _ in range(7)) for arm, ns in times.items()}
    return Cell(use, cls, "made", block, 2 * block, size, held, 0, 1, samples)


def test_intervals_are_those_of_order_statistics() -> None:
    # P(the median lies outside the extremes of n samples) = 2 / 2^n: 6 is the first n with at most 5 %.
    assert [rank(n) for n in (5, 6, 9, 31)] == [0, 1, 2, 10]
    found = interval([float(v) for v in range(31, 0, -1)])
    assert (found.low, found.median, found.high) == (10, 16, 22)


def test_the_output_reads_back() -> None:
    (got,) = parse(OUTPUT.splitlines())
    assert (got.block, got.step, got.size, got.held, got.inner) == (16, 32, 65536, False, 3)
    assert got.median_ns("forced") == 5 and got.ratio("forced").low == 2
    assert parse(text([got]).splitlines()) == [got]
    with pytest.raises(InterposeError, match="complete"):
        parse(OUTPUT.splitlines()[:-1])


@pytest.mark.parametrize("auto_ns, breaks", [(9.9e4, False), (1.04e5, False), (1.2e5, True)])
def test_the_promise_names_the_cells_that_lose(auto_ns: float, breaks: bool) -> None:
    assert cell(forced=1e5, auto=auto_ns).breaks_promise() == breaks
    short = cell(forced=1e3, library=1e3, again=1e3, auto=1e3 * auto_ns / 1e5)
    assert not short.breaks_promise()  # 0.2 us are within the slack


def test_only_a_clear_gain_enters_the_table() -> None:
    clear, slight, held = cell(forced=5e4), cell(forced=9.5e4, size=4096), cell(forced=5e4, held=True, size=1024)
    found = policy.rows([clear, slight, held], policy.shipped)
    assert [row.size for row in found] == [65536, 4096]
    assert found[0].ratio > 1.9 and found[1].ratio == 1


@pytest.mark.parametrize("use", ["pack", "message"])
def test_what_ships_of_256_kib_must_gain_more(use: str) -> None:
    for gain, taken in ((1.2, (True, False)), (1.3, (True, True))):
        ours = 1e5 / gain
        for size, ships in zip((65536, 262_128), taken, strict=True):
            one = cell(use, size=size, forced=ours, send=ours, recv=9.9e4, both=9.9e4)
            for least, wanted in ((policy.shipped, ships), (policy.own, True)):
                assert (policy.rows([one], least)[0].ratio > 1) == wanted, (gain, size, least)
            (before, *_) = policy.at_least(policy.rows([one], policy.own), policy.shipped)  # written by a laxer rule
            assert (before.ratio > 1) == ships


@pytest.mark.parametrize(
    "send, recv, both, way",
    [(5e4, 9e4, 5e4, "send"), (9e4, 5e4, 6e4, "recv"), (9e4, 9e4, 3e4, "both"), (1.2e5, 1.3e5, 1.5e5, "library")],
)
def test_a_message_takes_the_fastest_of_four_ways(send: float, recv: float, both: float, way: str) -> None:
    made = cell("message", send=send, recv=recv, both=both)
    found = policy.rows([made])
    table = policy.Policy(policy.text(found, ["a comment"]))
    assert table.rows == 2 and table.way(made) == way
    (verdict,) = policy.judge([made], table)
    assert verdict.right and verdict.chosen == way
    saved = sum(
        table.ask(f"{side}_local", "strided", 16, 32, 65536)[1]
        for side in ("send", "recv")
        if table.takes(f"{side}_local", made)
    )
    least = min(send, recv, both, 1e5)
    assert saved == pytest.approx(1e5 - least, abs=4e3)  # both sides together, once


def test_between_rows_gains_are_interpolated_and_far_away_nothing_is_known() -> None:
    rows = [
        policy.Row("pack", "strided", 16, 32, 4096, 100, 100),
        policy.Row("pack", "strided", 16, 32, 65536, 1000, 100),
    ]
    table = policy.Policy(policy.text(rows, []))
    gains = [table.ask("pack", "strided", 16, 32, size)[0] for size in (4096, 8192, 16384, 32768, 65536)]
    assert (
        gains == sorted(gains) and gains[0] == pytest.approx(1, abs=0.05) and gains[-1] == pytest.approx(10, rel=0.05)
    )
    assert table.ask("pack", "strided", 4096, 8192, 65536) == (0, 0)
    assert table.ask("unpack", "strided", 16, 32, 65536) == (0, 0)
    assert table.ask("pack", "table", 16, 32, 65536) == (0, 0)


def test_a_table_for_several_mpis_takes_the_least_gain() -> None:
    a, b = policy.rows([cell(forced=5e4), cell(forced=5e4, size=1024)]), policy.rows([cell(forced=8e4)])
    (row,) = policy.least_gains([a, b])
    assert row == b[0]


def test_of_sections_that_fit_alike_each_point_has_the_least_gain() -> None:
    at = ("pack", "strided", 16, 32)
    text_ = (
        "for 4 on a\npack strided 16 32 4096 300 100 1\npack strided 16 32 65536 900 100 1\n"
        "for 4 on b\npack strided 16 32 4096 200 100 1\n"
        "for 5 on b\npack strided 16 32 4096 700 100 1\n"
        "for 6\npack strided 16 32 4096 800 100 1\n"
    )
    own = policy.Policy(text_, "MPICH Version: 4.0", "a")
    assert own.rows == 2 and own.ask(*at, 65536)[0] == pytest.approx(9)
    for version, kind, gain in (("4.1", "c", 2), ("5.0", "a", 7), ("6.2", "a", 8), ("7", "b", 2)):
        table = policy.Policy(text_, f"MPICH Version: {version}", kind)
        assert table.rows == 1 and table.ask(*at, 4096)[0] == pytest.approx(gain, rel=0.01), version


def test_where_runs_take_other_sides_of_a_message_none_is_taken() -> None:
    """Send alone wins in one run, both sides in the other, where send alone loses: what a merge must not choose."""
    alone = policy.rows([cell("message", send=5e4, recv=9.9e4, both=9e4)])
    both = policy.rows([cell("message", send=1.5e5, recv=1.5e5, both=3e4)])
    assert [row.ratio > 1.5 for row in alone] == [True, False] and all(row.ratio > 1.5 for row in both)
    for merged in (policy.least_gains([alone, both]), policy.least_gains([both, alone])):
        assert all(row.ratio <= 1 for row in merged)
    parts = policy.sections({"5 on a": alone, "5 on b": both}, [])
    for kind, way in (("a", "send"), ("b", "both"), ("c", "library")):
        assert policy.Policy(parts, "MPICH 5.0", kind).way(cell("message")) == way
    assert policy.least_gains([both, both]) == both
    packs = policy.rows([cell(forced=5e4)])
    assert policy.least_gains([packs + both, both]) == packs + both == policy.least_gains([both, packs + both])


def test_the_processor_has_a_name_and_is_the_default() -> None:
    kind = core.processor()
    assert kind == "other" or re.fullmatch(r"(intel-6|amd-\d\d)-(avx512|avx2|sse)", kind)
    if kind != "other":
        told = Path("/proc/cpuinfo").read_text()
        assert f"cpu family\t: {kind.split('-')[1]}\n" in told and (" avx512vl " in told) == kind.endswith("avx512")
    text_ = f"for 4 on {kind}\npack strided 16 32 4096 300 100 1\nfor 4 on x\npack strided 16 32 4096 100 100 1\n"
    assert policy.Policy(text_, "Open MPI v4.1").ask("pack", "strided", 16, 32, 4096)[0] == pytest.approx(3)


def test_unreadable_rows_are_skipped() -> None:
    table = policy.Policy(
        "# x\npack strided 16 32 4096 9 0 1\npack strided 16\nwalk strided 1 1 1 1 1 1\npack strided 1 1 64 9 3 1"
    )
    assert table.rows == 1


def test_the_machine_file_keeps_the_table(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    Machine("box", copies={"host": 1e10}).dump(path)
    mpi = SimpleNamespace(version="An MPI 1.0 \n")
    rows = policy.rows([cell(forced=5e4)])
    measure.write_machine(rows, mpi, path)  # type: ignore[arg-type]
    machine = Machine.load(path)
    assert machine.copies == {"host": 1e10}
    assert [policy.Row(*row) for row in machine.datatypes["An MPI 1.0"]] == rows
    assert machine.updated(Machine("box", datatypes={"other": ()})).datatypes.keys() == {"An MPI 1.0", "other"}
    fresh = tmp_path / "new" / "machine.json"
    measure.write_machine(rows, mpi, fresh)  # type: ignore[arg-type]
    assert Machine.load(fresh).datatypes.keys() == {"An MPI 1.0"}
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(InterposeError, match="format 99"):
        measure.write_machine(rows, mpi, path)  # type: ignore[arg-type]


def test_a_table_of_another_peer_stays(tmp_path: Path) -> None:
    mpi, target = SimpleNamespace(version="An MPI"), tmp_path / "model.txt"
    made = cell("message", send=5e4, recv=9e4, both=5e4)
    measure.write([made], mpi, target)  # type: ignore[arg-type]
    measure.write([replace(made, size=1024)], mpi, target, peer="remote")  # type: ignore[arg-type]
    table = policy.Policy(target.read_text())
    assert table.rows == 4 and table.ask("send_local", "strided", 16, 32, 65536)[0] > 1.9
    measure.write([made], mpi, target)  # type: ignore[arg-type]
    assert policy.Policy(target.read_text()).rows == 4


def test_elements_of_another_size_are_another_point() -> None:
    """MPICH copies four MPI_CHAR one by one, one MPI_FLOAT at once: the same plan, and a gain for one of them only."""
    chars = replace(cell(library=1e5, again=1e5, forced=1e4, block=4), leaf=1)
    floats = replace(cell(library=1e4, again=1e4, forced=1e4, block=4), leaf=4)
    (read,) = parse(text([floats]).splitlines())
    assert read.leaf == 4
    found = policy.rows([chars, floats])
    table = policy.Policy(policy.text(found, []))
    at = ("pack", "strided", 4, 8, 65536)
    assert table.rows == 2 and table.ask(*at, 1)[0] > 8 and table.ask(*at, 4)[0] < 1.05
    assert table.takes("pack", chars) and not table.takes("pack", floats)
    assert 1.5 < table.ask(*at)[0] < 6  # not known: between them
    merged = policy.least_gains([found, policy.rows([chars, floats, replace(floats, name="the same point")])])
    assert sorted((row.leaf, row.ratio > 8) for row in merged) == [(1, True), (4, False)]
    older = policy.Policy("pack strided 4 8 65536 1000 100 1\n")  # a table without this column serves all
    assert older.ask(*at, 4)[0] == older.ask(*at, 1)[0] == pytest.approx(10)
    alone = policy.Policy("pack strided 4 8 65536 1000 100 1 1\n")  # of MPI_CHAR only: two octaves away half of it
    assert alone.ask(*at, 1)[0] == pytest.approx(10) and alone.ask(*at, 4)[0] == pytest.approx(5 / 1.04, rel=0.02)


def test_apart_each_datatype_is_measured_by_programs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cells, asked = (
        [replace(cell("message", size=s, send=9e4), name=n) for n in ("a-b1", "a-b16") for s in (64, 128)],
        [],
    )

    def found(mpi: object, library: object, mpirun: object, *, only: str, rounds: int) -> list[Cell]:
        asked.append((only, rounds))
        return [each for each in cells if only in ("message", f"message {each.name}$")]

    monkeypatch.setattr(measure, "measure", found)
    assert measure.apart(None, Path(), rounds=31) == cells  # type: ignore[arg-type]
    assert asked == [("message", 1), ("message a-b1$", 31), ("message a-b16$", 31)]


def test_a_table_takes_the_messages_that_gain_in_fresh_programs_too(tmp_path: Path) -> None:
    mpi, target = SimpleNamespace(version="MPICH 4.0", key="x"), tmp_path / "model.txt"
    pack, sent = cell(forced=5e4), cell("message", send=3e4, recv=9.9e4, both=9e4)
    for fresh, way in ((4e4, "send"), (1.2e5, "library")):
        again = cell("message", send=fresh, recv=1.3e5, both=1.3e5)
        measure.write([pack, sent], mpi, target, fresh=[again])  # type: ignore[arg-type]
        table = policy.Policy(target.read_text())
        assert table.way(sent) == way and table.way(pack) == "forced"
