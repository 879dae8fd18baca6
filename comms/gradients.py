"""Averaging gradients over data-parallel ranks in an order that depends on the parameters alone.

torch's DistributedDataParallel regroups its buckets after the first step, so a run that is resumed adds in another
order and differs in the last bits from three ranks on. Here the buckets are fixed by the parameter list: a resumed run
repeats every addition. Reduction starts when backward has ended; the overlapped way belongs to the T3 layers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

BUCKET_BYTES = 32 * 2**20


class GradientAverage:
    """Averages the `.grad` of `parameters` over `group`, in flat buckets per dtype. Missing gradients count as zero."""

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        group: dist.ProcessGroup | None = None,
        *,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.group = group
        self.world = dist.get_world_size(group) if dist.is_initialized() else 1
        self.buckets: list[list[torch.nn.Parameter]] = []
        room: dict[torch.dtype, int] = {}
        current: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            nbytes = parameter.numel() * parameter.element_size()
            if room.get(parameter.dtype, 0) < nbytes:
                current[parameter.dtype] = []
                self.buckets.append(current[parameter.dtype])
                room[parameter.dtype] = max(bucket_bytes, nbytes)
            current[parameter.dtype].append(parameter)
            room[parameter.dtype] -= nbytes

    @torch.no_grad()
    def __call__(self) -> None:
        """Replace every gradient by its mean over the ranks. Collective."""
        if self.world == 1:
            return
        flats, works = [], []
        for bucket in self.buckets:
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            grads = [_local(parameter.grad) for parameter in bucket]
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            works.append(dist.all_reduce(flat, group=self.group, async_op=True))
            flats.append((flat, grads))
        for (flat, grads), work in zip(flats, works):
            assert work is not None
            work.wait()
            flat.div_(self.world)
            for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
                grad.copy_(part.view_as(grad))


def _local(grad: torch.Tensor | None) -> torch.Tensor:
    """A gradient's own memory: of a DTensor the shard of this rank, which other ranks of `group` hold alike."""
    assert grad is not None
    return grad.to_local() if isinstance(grad, DTensor) else grad
