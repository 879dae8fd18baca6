"""Starts the ranks that measure links, when the probe itself is a single process, and ends them whatever happens.

The workers are this interpreter running `probe_links` (gloo, NCCL) or, under the mpiexec that lies beside it,
`probe_mpi`. A transport that fails costs its own numbers only; the last line of its output says why.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from .launch import free_port
from .machine import Link
from .measure import Measurement, Skipped

_TIMEOUT_S = 180.0
_LAUNCHER_PREFIXES = ("OMPI_", "PMI_", "PMIX_", "MPI_LOCAL", "SLURM_", "TORCHELASTIC_", "GROUP_", "ROLE_")


def plan(ranks: int, *, cuda: bool, quick: bool) -> list[Measurement]:
    """The links that `ranks` processes on this host can measure; the processes start at the first measurement."""
    spawned = _Spawned(ranks, quick)
    keys = ["gloo", *(["gloo_ring"] if ranks > 2 else [])]
    if cuda:
        keys += ["nccl", *(["nccl_ring"] if ranks > 2 else [])]
    measurements = [Measurement("links", key, lambda key=key: spawned.link(key)) for key in keys]
    measurements.append(Measurement("links", "mpi", lambda: mpi_link(quick)))
    return measurements


class _Spawned:
    """The links of one set of ranks, measured once and handed out by name."""

    def __init__(self, ranks: int, quick: bool) -> None:
        self._ranks, self._quick = ranks, quick
        self._links: dict[str, Link] | None = None
        self._failure = "not measured (one device per rank is needed)"

    def link(self, key: str) -> Link:
        if self._links is None:
            self._links = {}
            base = clean_environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            base |= {"WORLD_SIZE": str(self._ranks), "LOCAL_WORLD_SIZE": str(self._ranks)}
            base.setdefault("OMP_NUM_THREADS", "1")
            command = [*_python_module("probe_links"), *(["--quick"] if self._quick else [])]
            environments = [base | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(self._ranks)]
            try:
                for record in run_workers(command, environments):
                    self._links[record["link"]] = to_link(record)
            except Skipped as skipped:
                self._failure = str(skipped)
        if key not in self._links:
            raise Skipped(self._failure)
        return self._links[key]


def mpi_link(quick: bool) -> Link:
    """The link of MPI on this host; `Skipped` when there is no mpi4py or no mpiexec."""
    if find_spec("mpi4py") is None:
        raise Skipped("mpi4py is not installed: pip install 'undertow[mpi]'")
    beside = Path(sys.executable).with_name("mpiexec")  # of the MPI that mpi4py finds, not the system's
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise Skipped("there is no mpiexec: pip install 'undertow[mpi]'")
    environment = clean_environment()
    if os.geteuid() == 0:  # Open MPI refuses root, also in a container that has no other user
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment |= {"OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    command = [mpiexec, "-n", "2", *_python_module("probe_mpi"), *(["--quick"] if quick else [])]
    records = run_workers(command, [environment])
    if not records:
        raise Skipped("the MPI processes did not find each other: mpi4py and mpiexec are of different MPIs")
    return to_link(records[0])


def to_link(record: dict[str, Any]) -> Link:
    return Link.fit([(int(n), float(s)) for n, s in record["samples"]], duplex=bool(record["duplex"]))


def clean_environment() -> dict[str, str]:
    """This process's environment without what any launcher set."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in names and not k.startswith(_LAUNCHER_PREFIXES)}


def run_workers(
    command: list[str], environments: list[dict[str, str]], timeout_s: float = _TIMEOUT_S
) -> list[dict[str, Any]]:
    """Run `command` once per environment; return the JSON records that the first process printed.

    The first failure, or the time limit, ends all of them with their children; `Skipped` then carries the last line of
    what the failed one wrote.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        processes = [
            subprocess.Popen(
                command, env=env, stdout=out if i == 0 else err, stderr=err, text=True, start_new_session=True
            )
            for i, env in enumerate(environments)
        ]
        try:
            _wait(processes, err, timeout_s)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        return [json.loads(line) for line in out if line.startswith("{")]


def _wait(processes: list[subprocess.Popen[str]], err: IO[str], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            break
        if time.monotonic() > deadline:
            raise Skipped(f"no result within {timeout_s:g} s")
        time.sleep(0.02)
    if any(process.returncode for process in processes):
        err.seek(0)
        lines = [line.strip() for line in err if line.strip()] or ["no output"]
        raise Skipped(next((line for line in reversed(lines) if "Error" in line or "error" in line), lines[-1])[:300])


def _python_module(name: str) -> list[str]:
    return [sys.executable, "-m", f"{__package__}.{name}"]
