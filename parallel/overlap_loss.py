"""Cross entropy over a vocabulary that is spread over ranks, without gathering the logits.

Each rank holds the logits of its part of the vocabulary (a column-parallel output layer). Three numbers per token
travel instead of the vocabulary: the largest logit, the sum of exponentials and the target's logit (Shoeybi et al.
2019, section 3). The plain definition beside it is `cross_entropy` of the concatenated logits.

Legend: N tokens, v this rank's part of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..dist.errors import UserError

IGNORE = -100


def vocab_parallel_cross_entropy(
    logits_Nv: Tensor, labels_N: Tensor, first: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Each token's loss [N] in float32, 0 where the label is -100; the same on all ranks of `group`. Collective.

    logits: this rank's, of vocabulary entries `first` to `first` + v. labels: int64, equal on all ranks. The gradient
    is that of this rank's logits; take the same mean or sum on all ranks. A label that no rank holds raises.
    """
    if logits_Nv.ndim != 2 or labels_N.shape != logits_Nv.shape[:1]:
        raise UserError(
            f"logits {tuple(logits_Nv.shape)} with labels {tuple(labels_N.shape)}", expected="[tokens, part], [tokens]"
        )
    return _CrossEntropy.apply(logits_Nv, labels_N, first, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, labels: Tensor, first: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        wide = logits.float()
        width = wide.shape[1]
        top = wide.amax(1) if width else wide.new_full((wide.shape[0],), -torch.inf)
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
        shares = (wide - top[:, None]).exp()
        place = labels - first
        here = (place >= 0) & (place < width)
        place = place.clamp(0, max(width - 1, 0))
        target = wide.gather(1, place[:, None])[:, 0] - top if width else torch.zeros_like(top)
        sums = torch.stack([shares.sum(1), target.where(here, 0.0), here.to(wide.dtype)])
        dist.all_reduce(sums, group=group)
        counted = labels != IGNORE
        if bool(((sums[2] != 1) & counted).any()):
            bad = labels[(sums[2] != 1) & counted][0].item()
            raise UserError(f"label {bad}", expected=f"a vocabulary entry that one rank holds, or {IGNORE}")
        ctx.save_for_backward(shares / sums[0][:, None], place, here, counted)
        ctx.dtype = logits.dtype
        return (sums[0].log() - sums[1]).where(counted, 0.0)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        shares, place, here, counted = ctx.saved_tensors
        grad = shares.clone()
        if grad.shape[1]:
            grad.scatter_add_(1, place[:, None], -here.to(grad.dtype)[:, None])
        grad *= dloss.where(counted, 0.0)[:, None]
        return grad.to(ctx.dtype), None, None, None
