"""A graph workload whose boundary rows travel by MPI datatypes under the preload trains as on one rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mpis import find, start

from undertow.__main__ import main


@pytest.mark.slow
def test_boundary_rows_by_datatypes(tmp_path: Path) -> None:
    words = ["workloads", "train", "graphgps", "--set", "steps=6", "--set", "checkpoint_every=3", "--set", "batch=4"]
    install = find("mpich-wheel")  # the MPI of this Python, which has torch
    assert install is not None and install.python is not None
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    out, report = tmp_path / "two", tmp_path / "report"
    command = [install.python, "-m", "undertow", *words, "--halo", "mpi", "--out", str(out)]
    start(install, 2, command, "force", report)
    one, two = (json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "one", out))
    assert two["final_loss"] == pytest.approx(one["final_loss"], rel=2e-4)
    assert two["evidence"]["halo"]["bytes"] > 0 and two["ranks"] == 2
    functions = json.loads(Path(f"{report}.0.json").read_text())["functions"]
    assert sum(counts["taken"] for name, counts in functions.items() if name.startswith("MPI_Isend")) >= 3 * 6
