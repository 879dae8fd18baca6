"""mpi4py's own tests of datatypes, packing and point-to-point, with every possible call forced through our path.

The tests are in mpi4py's source distribution, which pip brings once into the cache. The wheel's version is asked for,
so that the tests fit the module. The result must be a plain OK, and thousands of calls must have been ours.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from mpis import Install, environment

from undertow.benchmarks import mpi4py_suite
from undertow.benchmarks.mpi4py_suite import COMBINERS, Outcome, broken, read_outcome, sources
from undertow.mpi_interpose.errors import InterposeError

SUBSET = r"test_(datatype|pack|p2p_buf|request|status)\b"


@pytest.mark.slow
def test_mpi4py_agrees_with_itself(pympi: Install, tmp_path: Path) -> None:
    report = tmp_path / "report"
    env = environment(pympi, LD_PRELOAD=pympi.preload, UNDERTOW_MPI_MODE="force", UNDERTOW_MPI_REPORT=report)
    command = [str(pympi.python), "test/main.py", "-q", "-i", SUBSET]
    try:
        folder = sources(str(pympi.python))
    except InterposeError as error:
        pytest.skip(str(error))
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and "\nOK" in done.stderr, done.stderr[-3000:]
    data = json.loads(Path(f"{report}.0.json").read_text())
    taken = {name.removesuffix("_c"): counts["taken"] for name, counts in data["functions"].items()}
    assert taken["MPI_Pack"] > 1000 and taken["MPI_Unpack"] > 1000 and taken["MPI_Sendrecv"] > 100
    assert data["mismatches"] == 0


def test_the_benchmark_names_what_differs() -> None:
    """Counts that differ, tests that fail on one side only, mismatches, and a combiner without a taken plan."""
    words = """FAIL: testPack (test_pack.TestPack.testPack)\nERROR: testOld (test_old.TestOld)
Ran 2127 tests in 3.2s\n\nFAILED (failures=1, errors=1, skipped=160)\n"""
    run, skipped, failed = read_outcome(words)
    assert (run, skipped) == (2127, 160)
    assert failed == ("test_old.TestOld.testOld", "test_pack.TestPack.testPack")
    hits = dict.fromkeys(COMBINERS, 3)
    plain = Outcome("mpich-9", 1, "off", run, skipped, failed, 1.0, "yes")
    good = replace(plain, mode="force", intercepted=9, taken=5, combiners=hits, planned=hits)
    assert broken([plain, good]) == []
    unlike = {"combiners": {**hits, "struct": 0}, "planned": {**hits, "darray": 0}}
    found = "\n".join(broken([plain, replace(good, failed=failed[:1], run=2126, **unlike)]))
    assert "2126 run, 160 skipped, not 2127 and 160" in found
    assert "no plan made of darray" in found and "no plan taken of struct" in found
    assert "test_pack.TestPack.testPack fails only without the preload" in found
    found = "\n".join(broken([plain, replace(good, mode="check", intercepted=0, mismatches=2)]))
    assert "no call was intercepted" in found and "2 results differ" in found


def test_the_benchmark_goes_on_where_it_was_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that ended are kept for the same commit only; the file of the first day goes on, also on the next."""
    facts = dict.fromkeys(("mpi4py", "python", "system", "load before"), "x") | {"hardware": "2 cores of a thing"}
    made: list[tuple[int, str]] = []
    stop_at = 3

    def suite(mpi: object, library: Path, python: str, ranks: int, mode: str) -> Outcome:
        if len(made) == stop_at:
            raise KeyboardInterrupt
        made.append((ranks, mode))
        hits: dict[str, int] = dict.fromkeys(COMBINERS, 1)
        ended = "not within 900 s" if made == [(1, "off"), (1, "auto")] else "yes"
        return Outcome("mpich-9", ranks, mode, 7, 0, (), 1.0, ended, 5, 5, 0, hits, hits)

    mpi = SimpleNamespace(mpicc="/a/mpicc", version="MPICH 9")
    for name, value in {"suite": suite, "installed": lambda: [mpi], "label": lambda _: "mpich-9"}.items():
        monkeypatch.setattr(mpi4py_suite, name, value)
    monkeypatch.setattr(mpi4py_suite, "python_of", lambda _: "python")
    monkeypatch.setattr(mpi4py_suite, "openmpi_python", lambda: "python")
    monkeypatch.setattr(mpi4py_suite.build, "library", lambda _: Path("lib"))

    def start(commit: str, day: str) -> None:
        made.clear()
        now = {**facts, "undertow": f"0.1.0, {commit}", "date": day}
        monkeypatch.setattr(mpi4py_suite, "facts", lambda packages: dict(now))
        mpi4py_suite.run(False, None, "", tmp_path)

    with pytest.raises(KeyboardInterrupt):
        start("commit abc", "2026-01-01")
    stop_at = 99
    start("commit abc", "2026-01-02")
    assert made == [(1, "auto"), (1, "check"), *((2, mode) for mode in mpi4py_suite.MODES)]  # auto had not ended
    (file,) = tmp_path.glob("*.json")
    data = json.loads(file.read_text())
    assert "2026-01-01" in file.name and data["facts"]["continued"].startswith("2026-01-02")
    assert len({(row["ranks"], row["mode"]) for row in data["runs"]}) == len(data["runs"]) == 8
    assert all(row["ended"] == "yes" for row in data["runs"])
    for commit in ("commit def", "commit abc, dirty", "no git metadata"):
        start(commit, "2026-01-03")
        assert len(made) == 8, commit
