"""The example programs: every ghost cell right, in Python and C, plain and under the preload."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from mpis import Install, environment, start

import undertow.examples

pytestmark = pytest.mark.slow  # on the checkout only

EXAMPLES = Path(undertow.examples.__file__).parent


@pytest.mark.parametrize("mode", [None, "auto", "force"])
def test_python_halo(pympi: Install, mode: str | None) -> None:
    out = start(pympi, 4, [str(pympi.python), str(EXAMPLES / "halo3d.py"), "--cells", "9", "--steps", "3"], mode)
    result = json.loads(next(line for line in out.splitlines() if line.startswith("{")))
    assert result["wrong"] == 0 and result["ranks"] == 4 and result["median_s"] > 0


def test_c_halo(mpi: Install, tmp_path: Path) -> None:
    program = tmp_path / "halo3d"
    command = [mpi.mpicc, "-O2", str(EXAMPLES / "halo3d.c"), "-o", str(program)]
    subprocess.run(command, check=True, env=environment(mpi))
    report = tmp_path / "report"
    assert "0 wrong ghosts" in start(mpi, 4, [str(program), "12", "30"], "force", report)
    data = json.loads(Path(f"{report}.0.json").read_text())
    assert data["functions"]["MPI_Isend"] == {"calls": 180, "taken": 180}
