"""The executor on CUDA: lanes are streams. One device runs a world of one; several run NCCL between them.

Also a program, for a machine without pytest: ``torchrun --nproc-per-node 2 tests/comms/test_p2p_cuda.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from undertow.comms.builders.all_gather import ring_all_gather
from undertow.comms.builders.all_to_all import all_to_all
from undertow.comms.builders.gemm_reduce_scatter import gemm_reduce_scatter
from undertow.comms.builders.reduce_scatter import direct_reduce_scatter, ring_reduce_scatter
from undertow.comms.p2p import P2P

ROWS, COLUMNS, INNER = 256, 512, 128


def slow_add(reads, writes):
    """An addition that begins late, so that an edge that is missing on the device shows."""
    torch.cuda._sleep(2_000_000)
    torch.add(reads[0], reads[1], out=writes[0])


def compare(rank: int, world: int, rounds: int = 20) -> int:
    """Run every collective `rounds` times with fresh integers; the number of wrong answers. Ranks share a seed."""
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    generator = torch.Generator().manual_seed(7)
    wrong = 0
    plain = {
        "all_gather": ring_all_gather(world, ROWS, [COLUMNS]),
        "all_to_all": all_to_all(world, ROWS, [COLUMNS]),
        "direct": direct_reduce_scatter(world, ROWS, [COLUMNS], subchunks=2),
        "ring": ring_reduce_scatter(world, ROWS, [COLUMNS], subchunks=2),
    }
    gemms = [gemm_reduce_scatter(world, ROWS, INNER, COLUMNS, algorithm=a, subchunks=2) for a in ("direct", "ring")]
    with P2P(device=device, timeout_s=60) as executor:
        for step in range(rounds):
            ops = {"add": slow_add} if step % 2 else None
            x = torch.randint(-4, 5, (world, world * ROWS, COLUMNS), generator=generator).float()
            chunks = x.view(world, world, ROWS, COLUMNS)
            expected = {
                "all_gather": x[:, :ROWS].reshape(-1, COLUMNS),
                "all_to_all": chunks[:, rank].reshape(-1, COLUMNS),
                "direct": chunks[:, rank].sum(0),
                "ring": chunks[:, rank].sum(0),
            }
            for name, schedule in plain.items():
                mine = x[rank, :ROWS] if name == "all_gather" else x[rank]
                out = executor.run(schedule, {"x": mine.to(device)}, ops, blocking=step % 3 == 0)["out"]
                wrong += not torch.equal(out.cpu(), expected[name])
            a = torch.randint(-4, 5, (world, world * ROWS, INNER), generator=generator).float()
            b = torch.randint(-4, 5, (world, INNER, COLUMNS), generator=generator).float()
            product = torch.bmm(a, b).view(world, world, ROWS, COLUMNS)[:, rank].sum(0)
            for schedule in gemms:
                inputs = {"x": a[rank].to(device), "w": b[rank].to(device)}
                wrong += not torch.equal(executor.run(schedule, inputs, ops)["out"].cpu(), product)
    return wrong


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.device_count(), reason="needs a CUDA device")
def test_cuda_streams_and_nccl():
    """In processes of its own: CUDA cannot be used in a fork of one that has used it."""
    world = min(torch.cuda.device_count(), 4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), __file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": 0 wrong") == world


if __name__ == "__main__":
    dist.init_process_group("cpu:gloo,cuda:nccl")
    count = compare(dist.get_rank(), int(os.environ["WORLD_SIZE"]))
    print(f"rank {dist.get_rank()}: {count} wrong", flush=True)
    dist.destroy_process_group()
    sys.exit(bool(count))
