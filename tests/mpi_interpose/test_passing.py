"""What passes is remembered, counted rightly and forgotten with its datatype; many requests may share a handle."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from mpis import PROGRAMS, Install, start

# Blocks of 4 bytes are taken, those of 64 bytes left alone.
TABLE = "".join(
    f"{use}_local strided {block} {4 * block} {size} {gain} 1 1\n"
    for use in ("send", "recv")
    for block, size, gain in ((4, 2048, 9), (4, 32, 9), (64, 1024, 0.9))
)


def test_calls_that_pass_are_counted_and_forgotten_with_their_datatype(pympi: Install, tmp_path: Path) -> None:
    table = tmp_path / "table.txt"
    table.write_text(TABLE)
    program = [str(pympi.python), str(PROGRAMS / "passing.py")]
    out = start(pympi, 2, program, "auto", tmp_path / "report", UNDERTOW_MPI_MODEL=str(table))
    left, taken = map(int, out.split("ok ")[1].split()[:2])
    for rank in (0, 1):
        report = json.loads((tmp_path / f"report.{rank}.json").read_text())
        (small,) = [row for row in report["types"] if row["block"] == 4 and row["size"] == 2048]
        (large,) = [row for row in report["types"] if row["block"] == 64]
        assert small["types"] == large["types"] == 30
        assert sum(large[use]["taken"] for use in ("send", "recv")) == 0
        assert sum(large[use]["passed"] for use in ("send", "recv")) == left
        # A type whose handle was a passing one's before is asked about anew: each of its messages is taken.
        assert sum(small[use]["taken"] for use in ("send", "recv")) == taken
        calls: Counter[str] = Counter()
        for name, counts in report["functions"].items():
            calls[name.removesuffix("_c")] += counts["calls"]
        assert calls["MPI_Sendrecv"] == (left + taken) // 2 // 3
        assert calls["MPI_Isend"] == calls["MPI_Irecv"] == (left + taken) // 2 // 3 + 6 * 40


def test_rounds_served_by_a_script_are_counted_rightly_and_end_with_any_other_call(
    pympi: Install, tmp_path: Path
) -> None:
    # What passes would lose too much to be tried, so scripts begin at once.
    table = tmp_path / "table.txt"
    table.write_text(TABLE.replace("0.9", "0.3"))
    program = [str(pympi.python), str(PROGRAMS / "scripts.py")]
    out = start(pympi, 2, program, "auto", tmp_path / "report", UNDERTOW_MPI_MODEL=str(table))
    left, taken = map(int, out.split("ok ")[1].split()[:2])
    for rank in (0, 1):
        report = json.loads((tmp_path / f"report.{rank}.json").read_text())
        passed, ours = Counter[int](), Counter[int]()
        for row in report["types"]:
            for counts in (row[use] for use in ("send", "recv") if use in row):
                passed[row["block"]] += counts["passed"]
                ours[row["block"]] += counts["taken"]
        assert (passed[64], ours[64], ours[4]) == (left, 0, taken)
        calls: Counter[str] = Counter()
        for name, counts in report["functions"].items():
            calls[name.removesuffix("_c")] += counts["calls"]
        assert calls["MPI_Isend"] == calls["MPI_Irecv"] == (left + taken) // 2
        assert report["scripted_rounds"] > 100


def test_many_requests_at_once_keep_their_data(pympi: Install, tmp_path: Path) -> None:
    program = [str(pympi.python), str(PROGRAMS / "passing.py")]
    for mode in ("force", "check"):
        assert "ok" in start(pympi, 2, program, mode, tmp_path / mode)
        for rank in (0, 1):
            report = json.loads((tmp_path / f"{mode}.{rank}.json").read_text())
            assert report["mismatches"] == 0 and report["functions"]["MPI_Waitsome"]["taken"] > 0
