"""The overlap engine over MPI: this file is also the program that mpiexec starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from undertow.comms.chunk_plan import chunk_rows


def program(folder: Path) -> None:
    """Whole numbers through all three patterns, then a rank that does not come."""
    from undertow.comms.mpi_messenger import MpiMessenger
    from undertow.comms.overlap_engine import OverlapEngine
    from undertow.dist.errors import PeerLost

    torch.set_num_threads(1)
    engine = OverlapEngine(messenger=MpiMessenger(), timeout_s=240)
    rank, world, numbers = engine.rank, engine.world, torch.Generator().manual_seed(1)
    for call in range(30):
        rows, dtype = (7, 12, 1)[call % 3], (torch.float32, torch.bfloat16)[call % 2]
        everyone = torch.randint(-9, 9, (world, rows, 5), generator=numbers).to(dtype)
        plan, y = engine.plan(chunk_rows(rows, world), 2), torch.full((rows, 5), torch.nan, dtype=dtype)

        def product(low: int, high: int, y: torch.Tensor = y, mine: torch.Tensor = everyone[rank]) -> None:
            y[low:high] = mine[low:high]

        out = engine.reduce_scatter(plan, product, y)
        assert torch.equal(out, everyone.sum(0)[slice(*plan.own)])
        assert torch.equal(engine.all_reduce(plan, product, y), everyone.sum(0))
        whole = torch.full((rows, 5), torch.nan, dtype=dtype)
        engine.all_gather(plan, out, whole, lambda low, high: None)
        assert torch.equal(whole, everyone.sum(0))
    engine.close()
    lonely = OverlapEngine(messenger=MpiMessenger(), timeout_s=0.3)
    if rank == 0:
        try:
            lonely.reduce_scatter(lonely.plan(chunk_rows(4, world)), lambda low, high: None, torch.ones(4, 1))
        except PeerLost as error:
            (folder / "told").write_text(str(error))
    from mpi4py import MPI

    (folder / f"rank-{rank}-of-{world}").touch()  # what is printed before an abort may be lost
    MPI.COMM_WORLD.Barrier()
    MPI.COMM_WORLD.Abort(0) if rank == 0 else os._exit(0)  # the broken call's messages are never taken


@pytest.mark.slow
def test_three_ranks_of_mpiexec_agree(tmp_path):
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip(f"no mpiexec beside {sys.executable}: pip install mpich")
    command = [mpiexec, "-n", "3", sys.executable, __file__, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280)
    done = sorted(path.name for path in tmp_path.glob("rank-*"))
    assert done == [f"rank-{rank}-of-3" for rank in range(3)], found.stdout + found.stderr
    assert "rank 0: chunk 0 part 0 (rows 0–2) did not come from rank" in (tmp_path / "told").read_text()


if __name__ == "__main__":
    program(Path(sys.argv[1]))
