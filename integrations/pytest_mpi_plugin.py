"""Tests on MPI ranks from plain `pytest`: a test marked `mpi_ranks(n)` runs again on n ranks under mpirun.

The test process itself never initialises MPI; it starts mpirun on this one test, gathers what the ranks say, and ends
all of them when time is up. A rank that fails says why and aborts the others, which would otherwise wait for it in
their next collective. Loaded by `undertow.integrations.pytest_plugin`; pytest-mpi's marks and options are left alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

CHILD = "UNDERTOW_MPI_RANKS_CHILD"  # set in the ranks
SKIPPED = "undertow-skipped: "
MARK = "mpi_ranks(n, timeout_s=60): run the test on n MPI ranks, started by mpirun from plain pytest"


class MpiFailure(AssertionError):
    """A rank failed, died or hung; the message carries what the ranks said."""


def launcher() -> str | None:
    """The mpirun beside this Python, whose MPI its mpi4py uses; else the one on PATH."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


def run_again(item: pytest.Function, n: int, timeout_s: float = 60.0) -> None:
    """Run `item` on `n` ranks. `MpiFailure` with their output; skips without mpirun or mpi4py, and when they skip."""
    mpirun = launcher()
    if mpirun is None or find_spec("mpi4py") is None:
        pytest.skip("needs mpirun and mpi4py: pip install 'undertow[mpi]'")
    config = item.config
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "undertow.integrations.pytest_plugin",
        "-p",
        "no:cacheprovider",
    ]
    words += ["-o", "addopts=", f"--import-mode={config.getoption('importmode')}", f"--rootdir={config.rootpath}"]
    words += ["-c", str(config.inipath)] if config.inipath else []
    words += ["--with-mpi"] if config.pluginmanager.hasplugin("pytest_mpi") else []
    name = item.nodeid.split("::", 1)[1]
    env = {**os.environ, CHILD: str(n), "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    if os.geteuid() == 0:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            [mpirun, "-n", str(n), *words, f"{item.path}::{name}"],
            cwd=config.invocation_params.dir,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        text = said.read()
    if code is None:
        raise MpiFailure(f"{n} ranks gave no result within {timeout_s:g} s:\n{text[-5000:]}")
    if code:
        raise MpiFailure(f"mpirun -n {n} ended with {code}:\n{text[-5000:]}")
    reasons = [line.split(SKIPPED, 1)[1] for line in text.splitlines() if SKIPPED in line]
    if reasons:
        pytest.skip(reasons[0])


def tell(report: pytest.TestReport) -> None:
    """In a rank: say what happened, and take the other ranks along when it was a failure."""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        os.write(2, f"{SKIPPED}{reason}\n".encode())
    elif report.failed:
        from mpi4py import MPI

        rank, world = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
        os.write(2, f"rank {rank} of {world} failed:\n{report.longreprtext}\n".encode())
        MPI.COMM_WORLD.Abort(1)
