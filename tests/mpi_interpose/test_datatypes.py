"""Random nested datatypes of every combiner: our bytes are the library's bytes, in its own process."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from mpis import PROGRAMS, Install, start

pytestmark = pytest.mark.slow  # on the checkout only

KINDS = (
    "named dup contiguous vector hvector indexed hindexed indexed_block hindexed_block struct subarray darray resized "
    "pair f90_real f90_complex f90_integer"  # of value_index both MPIs make none but the named pairs
)


def test_thousands_of_random_types(pympi: Install, seed: int, tmp_path: Path) -> None:
    rounds, report = 2500, tmp_path / "report"
    program = [str(pympi.python), str(PROGRAMS / "fuzz_types.py"), str(seed % 10**6), str(rounds)]
    assert f"ok {rounds}" in start(pympi, 1, program, "force", report)
    data = json.loads(Path(f"{report}.0.json").read_text())
    functions = {name.removesuffix("_c"): counts for name, counts in data["functions"].items()}
    # A few types are passed through, because the library's own bytes or bounds are not those of the type.
    assert functions["MPI_Pack"]["taken"] > 0.97 * rounds
    assert sum(data["refused"].values()) < 0.03 * rounds
    hit = {name for row in data["types"] if row.get("pack", {}).get("taken") for name in row["combiners"]}
    assert set(KINDS.split()) <= hit


def test_check_mode_finds_nothing_to_complain_about(pympi: Install, seed: int, tmp_path: Path) -> None:
    program = [str(pympi.python), str(PROGRAMS / "fuzz_types.py"), str(seed % 10**6), "300"]
    out = start(pympi, 1, program, "check", tmp_path / "report")
    assert "ok 300" in out and "differs" not in out
    assert json.loads((tmp_path / "report.0.json").read_text())["mismatches"] == 0


def test_a_library_that_reads_outside_a_type_ends_no_program(pympi: Install, tmp_path: Path) -> None:
    """With nothing mapped beside the memory in which types are compared with the library."""
    guard = tmp_path / "guard_pages.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", guard, PROGRAMS / "guard_pages.c"], check=True)
    program = ["env", f"LD_PRELOAD={guard} {pympi.preload}", str(pympi.python), str(PROGRAMS / "stray_reads.py")]
    assert "the same" in start(pympi, 1, program, "check")
