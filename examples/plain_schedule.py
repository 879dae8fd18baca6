"""A collective as data: printed, proved, executed.   torchrun --nproc-per-node 2 -m undertow.examples.plain_schedule"""

import os

import torch
import torch.distributed as dist

from undertow.comms.builders.reduce_scatter import ring_reduce_scatter
from undertow.comms.check import check
from undertow.comms.p2p import P2P

if "RANK" not in os.environ and not dist.is_initialized():
    raise SystemExit("start it by: torchrun --nproc-per-node 2 -m undertow.examples.plain_schedule")
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
schedule = ring_reduce_scatter(world, rows=2, row_shape=[3])  # each rank keeps two rows of three
check(schedule, rendezvous=True)  # proved for every interleaving
x = torch.full((2 * world, 3), float(rank))
with P2P(timeout_s=60) as executor:
    out = executor.run(schedule, {"x": x})["out"]
assert torch.equal(out, torch.full((2, 3), float(sum(range(world)))))
if rank == 0:
    print(schedule)
dist.destroy_process_group()
