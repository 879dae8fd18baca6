"""Tests marked `mpi`, started as their author does: mpirun -n 2 python -m pytest --with-mpi, under the preload."""

from __future__ import annotations

import re
import shutil
import sysconfig
from pathlib import Path

import pytest
from mpis import PROGRAMS, Install, start
from test_programs import taken

TESTS = 4


@pytest.mark.slow
def test_marked_tests_pass_under_mpirun_with_pytest_mpi(pympi: Install, tmp_path: Path) -> None:
    """On both ranks every test ran and passed, and their calls were ours. pytest is this Python's, mpi4py the MPI's."""
    pytest.importorskip("pytest_mpi")
    report = tmp_path / "report"
    site = sysconfig.get_path("purelib")
    code = f"import sys; import mpi4py, numpy; sys.path.append({site!r}); import pytest; sys.exit(pytest.main())"
    program = shutil.copy(PROGRAMS / "under_mpirun.py", tmp_path)  # away from this suite's conftest, which is not its
    options = [
        "-p",
        "pytest_mpi",
        "--with-mpi",
        "-c",
        "/dev/null",
        "--rootdir",
        str(tmp_path),
        "-p",
        "no:cacheprovider",
    ]
    same = Path(str(pympi.python)).parent == Path(sysconfig.get_path("scripts"))
    command = [str(pympi.python), *(["-m", "pytest"] if same else ["-c", code])]
    extra = {} if same else {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if same:
        options = options[2:]  # found by its entry point
    out = start(pympi, 2, [*command, "-q", *options, str(program)], "force", report, **extra)
    assert [int(n) for n in re.findall(r"(\d+) passed", out)] == [TESTS, TESTS], out
    assert not re.search(r"failed|skipped|error", out), out
    counts = taken(report, [0, 1])
    for name in ("Sendrecv", "Bcast", "Pack"):
        assert counts[f"MPI_{name}"] > 0, name
