"""The memory that messages are packed into: a receive never gets what was sent from."""

from __future__ import annotations

import subprocess
from pathlib import Path

from mpis import PROGRAMS, Install, environment, start


def test_sends_and_receives_keep_slabs_of_their_own(mpi: Install, tmp_path: Path) -> None:
    source, between, program = str(PROGRAMS / "slabs.c"), tmp_path / "libbetween.so", tmp_path / "program"
    for options in (
        ["-DBETWEEN", "-shared", "-fPIC", source, "-o", str(between)],
        [source, "-o", str(program), str(between), f"-Wl,-rpath,{tmp_path}"],
    ):
        command = [mpi.mpicc, "-O1", *options]
        made = subprocess.run(command, env=environment(mpi), capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
    assert "ok" in start(mpi, 2, [str(program)], "force")
