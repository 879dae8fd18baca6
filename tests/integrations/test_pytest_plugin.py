"""The multi-rank fixture: results in order, failures named, deaths and hangs cut short."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from undertow.integrations.pytest_plugin import RankFailure, _collect


def total(rank, world):
    value = torch.tensor([rank + 1.0])
    dist.all_reduce(value)
    return value.item()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_rank_returns(ranks, world):
    assert ranks(world, total) == [world * (world + 1) / 2] * world


def test_failing_rank_is_named_while_the_others_wait(ranks):
    def fn(rank, world):
        if rank == 1:
            raise ValueError("one bad rank")
        dist.barrier()

    with pytest.raises(RankFailure, match="rank 1 of 3 failed(.|\n)*one bad rank"):
        ranks(3, fn, timeout_s=3600)  # waiting for the others would take longer than pytest allows
    assert not multiprocessing.active_children()


def test_killed_rank_is_named(ranks):
    def fn(rank, world):
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3600)

    with pytest.raises(RankFailure, match="rank 0 of 2 died"):
        ranks(2, fn, timeout_s=3600)
    assert not multiprocessing.active_children()


def test_hang_is_cut(ranks):
    with pytest.raises(RankFailure):  # on a slow machine the ranks themselves may be the first to say so
        ranks(2, lambda rank, world: time.sleep(3600), timeout_s=2)
    assert not multiprocessing.active_children()


def test_who_hangs_is_named():
    (ours, theirs), (silent, _open) = (multiprocessing.Pipe(duplex=False) for _ in range(2))
    theirs.send(("ok", 7))
    with pytest.raises(RankFailure, match=r"rank\(s\) \[1\] of 2 gave no result within 0.1 s"):
        _collect(2, [ours, silent], 0.1)


MPI_TESTS = """
import time
import pytest
from mpi4py import MPI


@pytest.mark.mpi_ranks(3, timeout_s=300)
def test_sum(tmp_path):
    assert MPI.COMM_WORLD.allreduce(MPI.COMM_WORLD.rank) == 3 and MPI.COMM_WORLD.size == 3


@pytest.mark.mpi_ranks(2, timeout_s=300)
def test_one_fails_while_the_other_waits():
    assert MPI.COMM_WORLD.rank == 0, "one bad rank"
    MPI.COMM_WORLD.barrier()


@pytest.mark.mpi_ranks(2, timeout_s=10)
def test_a_hang_is_cut():
    while True:
        time.sleep(1)


@pytest.mark.mpi_ranks(2, timeout_s=300)
def test_skipped():
    pytest.skip("not on two ranks")


def test_alone():
    assert MPI.COMM_WORLD.size == 1
"""


@pytest.mark.slow
def test_mpi_ranks_from_plain_pytest(tmp_path):
    if not (Path(sys.executable).parent / "mpirun").exists():
        pytest.skip("needs an MPI beside this Python: pip install 'undertow[mpi]'")
    (tmp_path / "test_it.py").write_text(MPI_TESTS)
    words = ["-m", "pytest", "-q", "-rs", "-p", "undertow.integrations.pytest_plugin", "-p", "no:cacheprovider"]
    done = subprocess.run([sys.executable, *words, "test_it.py"], cwd=tmp_path, capture_output=True, text=True)
    said = done.stdout
    assert "2 failed, 2 passed, 1 skipped" in said, said + done.stderr
    assert "rank 1 of 2 failed" in said and "one bad rank" in said
    assert "2 ranks gave no result within 10 s" in said and "not on two ranks" in said
