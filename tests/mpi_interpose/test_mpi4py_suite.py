"""mpi4py's own tests of datatypes, packing and point-to-point, with every possible call forced through our path.

The tests are in mpi4py's source distribution, which pip brings once into the cache. The wheel's version is asked for,
so that the tests fit the module. The result must be a plain OK, and thousands of calls must have been ours.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from mpis import Install, environment

from undertow.mpi_interpose.compile import cache_folder

SUBSET = r"test_(datatype|pack|p2p_buf|request|status)\b"


def suite(install: Install) -> Path:
    """Folder with mpi4py's unpacked sources."""
    ask = [str(install.python), "-c", "import mpi4py; print(mpi4py.__version__)"]
    version = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    folder = cache_folder() / "test-mpi4py"
    target = folder / f"mpi4py-{version}"
    if not (target / "test" / "main.py").exists():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
        ]
        done = subprocess.run(
            [*pip, f"mpi4py=={version}", "-d", str(folder)], capture_output=True, text=True, check=False
        )
        archives = list(folder.glob(f"mpi4py-{version}*.tar.gz"))
        if not archives:
            pytest.skip(f"pip cannot bring mpi4py's sources: {done.stderr[-200:]}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(folder, filter="data")
    return target


@pytest.mark.slow
def test_mpi4py_agrees_with_itself(pympi: Install, tmp_path: Path) -> None:
    report = tmp_path / "report"
    env = environment(pympi, LD_PRELOAD=pympi.preload, UNDERTOW_MPI_MODE="force", UNDERTOW_MPI_REPORT=report)
    command = [str(pympi.python), "test/main.py", "-q", "-i", SUBSET]
    done = subprocess.run(command, env=env, cwd=suite(pympi), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0 and "\nOK" in done.stderr, done.stderr[-3000:]
    data = json.loads(Path(f"{report}.0.json").read_text())
    taken = {name.removesuffix("_c"): counts["taken"] for name, counts in data["functions"].items()}
    assert taken["MPI_Pack"] > 1000 and taken["MPI_Unpack"] > 1000 and taken["MPI_Sendrecv"] > 100
    assert data["mismatches"] == 0
