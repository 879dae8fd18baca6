"""Sequence-parallel attention over MPI, without torch.distributed; mpiexec starts this file as its program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from undertow.comms.mpi_group import MpiGroup
from undertow.dist.errors import PeerLost
from undertow.parallel import shard_sequence, token_ring_attention, unshard_sequence
from undertow.parallel.context_parallel import ContextParallel
from undertow.parallel.token_ring.executors import home

LENGTH = 45
PAIRS = [("ring_kv", "token_ring"), ("token_ring_bookended", "ring_kv_bookended"), ("ulysses", "need_only_q"),
         ("auto", "auto")]  # fmt: skip


def _wanted(q, k, v, causal):
    """Full attention in float64 by the formula, with its log-sum-exp."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[3] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("bhlm,bmhe->blhe", scores.softmax(-1), v), scores.logsumexp(-1).transpose(1, 2)


def program() -> None:
    """Forward, backward and the gradient through a gather against the formula; then a rank that does not come."""
    torch.set_num_threads(1)
    assert not torch.distributed.is_initialized()
    group = MpiGroup()
    for forward, backward in PAIRS:
        for causal in (True, False):
            torch.manual_seed(0)
            q, k, v = (torch.randn(2, LENGTH, h, 8, dtype=torch.float64, requires_grad=True) for h in (8, 4, 4))
            out, lse = _wanted(q, k, v, causal)
            (out.sin().sum() + lse.cos().sum()).backward()
            mine = [shard_sequence(x.detach(), group=group).requires_grad_() for x in (q, k, v)]
            options: Any = dict(schedule=forward, backward_schedule=backward, return_lse=True)
            got, got_lse = token_ring_attention(*mine, group=group, causal=causal, **options)
            whole = unshard_sequence(got, group=group, length=LENGTH)
            torch.testing.assert_close(whole, out, atol=1e-10, rtol=0)
            (whole.sin().sum() / group.world + got_lse.cos().sum()).backward()
            for x, part in zip((q, k, v), mine):
                assert x.grad is not None
                wanted = shard_sequence(x.grad, group=group)
                torch.testing.assert_close(part.grad, wanted, atol=1e-9, rtol=0)
    share = torch.tensor(group.rank + 1.0, requires_grad=True)
    assert ContextParallel(group, LENGTH).loss(share).item() == sum(range(group.world + 1))
    executor = home(group, torch.device("cpu")).executor
    assert executor is not None
    executor.timeout_s = 0.5
    if group.rank != group.world - 1:
        try:
            token_ring_attention(*mine, group=group, causal=True, schedule="ring_kv", lengths=(LENGTH, LENGTH))
        except PeerLost as error:
            print(f"rank {group.rank} was told: {error}", flush=True)
    print(f"rank {group.rank} of {group.world} is done", flush=True)
    from mpi4py import MPI

    MPI.COMM_WORLD.Barrier()
    MPI.COMM_WORLD.Abort(0) if group.rank == 0 else os._exit(0)  # messages of the broken call are left


@pytest.mark.slow
@pytest.mark.parametrize("world", [4])
def test_attention_over_mpi_is_the_formulas(world):
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip(f"no mpiexec beside {sys.executable}: pip install mpich")
    command = [mpiexec, "-n", str(world), sys.executable, __file__]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert found.stdout.count(f"of {world} is done") == world, found.stdout + found.stderr
    assert "rank 0 was told" in found.stdout


if __name__ == "__main__":
    program()
