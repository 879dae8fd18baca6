"""The multi-rank fixture: results in order, failures named, deaths and hangs cut short."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from undertow.integrations.pytest_plugin import RankFailure


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

    start = time.monotonic()
    with pytest.raises(RankFailure, match="rank 1 of 3 failed(.|\n)*one bad rank"):
        ranks(3, fn, timeout_s=30)
    assert time.monotonic() - start < 20


def test_killed_rank_is_named(ranks):
    def fn(rank, world):
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(20)

    with pytest.raises(RankFailure, match="rank 0 of 2 died"):
        ranks(2, fn, timeout_s=15)


def test_hang_is_cut(ranks):
    with pytest.raises(RankFailure, match=r"rank\(s\) \[1\] of 2 gave no result within 2"):
        ranks(2, lambda rank, world: time.sleep(60) if rank else dist.group.WORLD.rank(), timeout_s=2)
