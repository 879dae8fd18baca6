"""What adapters of other training loops need for context parallelism: the groups, and a look at the batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..dist.errors import UserError
from ..dist.mesh import Mesh, MeshShape


def context_group(ranks: int, world_size: int, rank: int) -> tuple[Mesh, dist.ProcessGroup | None]:
    """data × context = world size, `ranks` neighbours a group, and this rank's group (None for 1); collective.

    The groups are new ones, even where one holds all ranks: the ring's messages keep apart from gradient reductions.
    """
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise UserError(f"a sequence on {ranks!r} ranks", expected="a whole number from 1")
    mesh = MeshShape.of(data=-1, context=ranks).fit(world_size)
    mine: Any = None
    for members in mesh.groups("context") if ranks > 1 else []:
        group = dist.new_group(members)
        if rank in members:
            mine = group
    return mesh, mine


def check_first_batch(root: nn.Module, group: dist.ProcessGroup | None, remedy: str) -> Any:
    """At the next forward of `root`, before anything shards it: all ranks of `group` have the same `input_ids`.

    Returns the hook's handle. The comparison is one reduction of four numbers.
    """

    def compare(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        handle.remove()
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            return
        flat = ids.flatten().double()
        places = torch.arange(1, len(flat) + 1, device=ids.device)
        digest = torch.stack([flat.new_tensor(flat.numel()), (flat * places).sum()])
        ends = torch.cat((digest, -digest))
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
        if not bool((ends[:2] == -ends[2:]).all()):
            raise UserError(
                "the ranks that share a sequence were given different batches",
                expected="the same on all of them",
                remedy=remedy,
            )

    handle = root.register_forward_pre_hook(compare, with_kwargs=True, prepend=True)
    return handle
