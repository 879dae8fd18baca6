"""Products that send while they run.   torchrun --nproc-per-node 2 -m undertow.examples.plain_overlap"""

import os

import torch
import torch.distributed as dist

from undertow.parallel import Team, all_gather_matmul, matmul_reduce_scatter

if "RANK" not in os.environ and not dist.is_initialized():
    raise SystemExit("start it by: torchrun --nproc-per-node 2 -m undertow.examples.plain_overlap")
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
team = Team()  # measures each product's ways on its first calls, and keeps the fastest
torch.manual_seed(0)  # every rank makes the whole weights and rows, and keeps its part
x, up, down = (
    torch.randn(*shape, dtype=torch.float64) for shape in ((64 * world, 48), (48, 32 * world), (32 * world, 48))
)
mine, my_up, my_down = x.chunk(world)[rank], up.chunk(world, 1)[rank], down.chunk(world)[rank]
for _ in range(50):
    _, (hidden,) = all_gather_matmul(mine, [my_up], 0, team)  # rows arrive while others are multiplied
    out = matmul_reduce_scatter(hidden.relu(), my_down, "sum", 0, team)  # rows leave while others are made
error = float((out - ((x @ up).relu() @ down).chunk(world)[rank]).abs().max())
if rank == 0:
    print(f"differs from one rank by at most {error:.1e}\n{team.explain()}")
team.close()
dist.destroy_process_group()
