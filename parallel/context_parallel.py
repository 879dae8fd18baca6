"""Training with the sequence spread over ranks: shards, positions, attention and the loss, for any model and for HF.

A rank computes on its tokens only; attention is the one place where they meet. Two things go wrong easily, so they are
done here: labels are shifted *before* sharding, and the loss is a sum over the axis. `ContextParallel.loss` returns the
same number on every rank, and a gradient that is right once parameter gradients are *averaged* over all data- and
context-parallel ranks together, which is what DDP, FSDP and `comms.gradients.GradientAverage` do. transformers is
imported only when `enable_context_parallel` is called; it patches no model file (see `context_parallel_hf`).

Shapes: B batch, T tokens of this rank, H query heads, G key heads, D and E head dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..comms.mpi_group import MpiGroup
from .partition import Group, as_list, group_of, place, positions_of, shard_sequence, shards, sum_over, unshard_sequence
from .token_ring.api import token_ring_attention

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .context_parallel_hf import Enabled


@dataclass(frozen=True)
class ContextParallel:
    """How one sequence of `length` tokens lies on the ranks of `group`, the same on all of them.

    `cu_seqlens`: bounds of packed documents; `layout`, the schedules, `wire_dtype` and `kernel` as in
    `token_ring_attention`.
    """

    group: Group
    length: int
    layout: str = "zigzag"
    cu_seqlens: tuple[int, ...] | None = None
    schedule: str = "auto"
    backward_schedule: str = "auto"
    wire_dtype: torch.dtype | None = None
    kernel: str = "auto"

    @property
    def size(self) -> int:
        return place(self.group)[1]

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of what every rank holds whole (tokens, shifted labels, position ids)."""
        return shard_sequence(x, group=self.group, layout=self.layout, dim=dim, cu_seqlens=self.cu_seqlens)

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole from all parts, on every rank; collective."""
        return unshard_sequence(
            x, group=self.group, layout=self.layout, dim=dim, length=self.length, cu_seqlens=self.cu_seqlens
        )

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """[1, T]: the position of each of this rank's tokens, counted within its document."""
        rank, world = place(self.group)
        at = positions_of(shards(self.length, world, self.layout, self.cu_seqlens)[rank])
        if self.cu_seqlens is not None:
            bounds = torch.tensor(self.cu_seqlens)
            at = at - bounds[torch.searchsorted(bounds, at, right=True) - 1]
        return at.to(device)[None]

    def attend(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, *, causal: bool = True, window: int | None = None,
        scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of the whole sequence: [B, H, T, E]; collective."""
        out = token_ring_attention(
            *(x.transpose(1, 2) for x in (q_BHTD, k_BGTD, v_BGTE)),
            group=self.group,
            causal=causal,
            window=window,
            cu_seqlens=self.cu_seqlens,
            layout=self.layout,
            lengths=(self.length, self.length),
            scale=scale,
            schedule=self.schedule,
            backward_schedule=self.backward_schedule,
            wire_dtype=self.wire_dtype,
            kernel=self.kernel,
        )
        return out.transpose(1, 2)

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers, on every rank; collective."""
        rank, world = place(self.group)
        nccl = not isinstance(self.group, MpiGroup) and world > 1 and "nccl" in dist.get_backend(self.group)
        numbers = torch.zeros(world, dtype=torch.int64, device=torch.cuda.current_device() if nccl else "cpu")
        numbers[rank] = number
        sum_over(numbers, self.group)
        return int(numbers.min())

    def loss(self, share: Tensor) -> Tensor:
        """The whole loss, on every rank, from this rank's share (its sum divided by the number of *all* targets).

        Its gradient is `size` times the share's, so that the mean of parameter gradients over data × context ranks is
        the gradient of the whole. Where gradients are summed over the axis instead, divide them by `size`.
        """
        whole: Tensor = _AxisLoss.apply(share, self.group)  # pyright: ignore[reportAssignmentType]
        return whole

    def with_length(self, length: int, cu_seqlens: Sequence[int] | Tensor | None = None) -> ContextParallel:
        """The same for another sequence."""
        bounds = as_list(cu_seqlens)
        return replace(self, length=length, cu_seqlens=None if bounds is None else tuple(bounds))


class _AxisLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, group: Any) -> Tensor:
        ctx.size = place(group)[1]
        total = share.detach().clone()
        sum_over(total, group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * ctx.size, None


def enable_context_parallel(
    model: nn.Module,
    group: Group | DeviceMesh = None,
    *,
    layout: str = "zigzag",
    schedule: str = "auto",
    backward_schedule: str = "auto",
    wire_dtype: torch.dtype | None = None,
    kernel: str = "auto",
) -> Enabled:
    """Spread every training step of a transformers model over `group` (a group, or a one-axis mesh; None: all ranks).

    Every rank calls the model with the same whole batch, as without; it computes its part of the tokens, and
    `output.loss` is the whole loss. Average parameter gradients over all ranks (DDP and FSDP do). `output.logits` are
    this rank's; the returned handle has `unshard` for them, and `disable()`. Padding must stand on the right; packed
    documents are told by `position_ids` that begin anew, in a batch of 1. The options are those of
    `token_ring_attention`. `UserError` names what cannot be done.
    """
    from .context_parallel_hf import Enabled

    context = ContextParallel(group_of(group), 0, layout, None, schedule, backward_schedule, wire_dtype, kernel)
    return Enabled(model, context)
