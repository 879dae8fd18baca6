"""The timing program on two ranks: it runs, its bytes are right, and its cells say what the model needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from mpis import Install

from undertow.mpi_interpose import measure, policy
from undertow.mpi_interpose.toolchain import probe


@pytest.mark.slow
@pytest.mark.parametrize("mpi", ["mpich-wheel", "debian-openmpi"], indirect=True)
def test_the_program_measures_packs_and_messages(mpi: Install, tmp_path: Path) -> None:
    table = tmp_path / "table.txt"
    table.write_text("send_local table 16 32 65536 9 1 1\nrecv_local table 16 32 65536 9 1 1\n")
    titles: list[str] = []
    cells = measure.measure(
        probe(mpi.mpicc), mpi.preload, mpi.mpirun, rounds=6, quick=True, only="indexed_block-b16", table=table,
        progress=lambda done, title: titles.append(title),
    )  # fmt: skip
    assert [cell.title for cell in cells] == titles
    assert {(cell.use, cell.size) for cell in cells} == {
        (use, size) for use in ("pack", "unpack", "message") for size in (4096, 65536)
    }
    for cell in cells:
        assert (cell.cls, cell.block, cell.wrong) == ("table", 16, 0) and 30 <= cell.step <= 34
        ways = ["send", "recv", "both", "dense"] if cell.use == "message" else ["forced"]
        assert list(cell.arms) == ["library", "again", *ways, "auto"]
        assert all(len(samples) == 6 and min(samples) > 0 for samples in cell.arms.values())
        assert (0.5 < cell.taken <= 1) if cell.use == "message" else (0 <= cell.taken <= 1)  # a few calls compare
    assert len(policy.rows(cells)) == 8  # pack, unpack, and two sides of messages, at two sizes
