"""Rows between all ranks: a group's own collectives, which follow a product without overlap, and single messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .chunk_plan import ChunkPlan
from .spans import Memory, Span, Spans

# since torch 2.13, which warns of the older names
all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def reduce_scatter_into(
    out: torch.Tensor, y_MN: torch.Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None
) -> torch.Tensor:
    """`out`, filled with this rank's rows of the sum. Collective."""
    if len(set(sizes)) == 1:
        reduce_scatter_single(out, y_MN, group=group)
    else:
        dist.reduce_scatter(out, list(y_MN.split(list(sizes))), group=group)
    return out


def all_gather_into(
    whole: torch.Tensor, shard: torch.Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None
) -> None:
    """Fill `whole` with all ranks' rows. Collective."""
    if len(set(sizes)) == 1:
        all_gather_single(whole, shard, group=group)
    else:
        dist.all_gather(list(whole.split(list(sizes))), shard, group=group)


def spread(plan: ChunkPlan, whole: Memory, step: int, part: int) -> tuple[Spans, Spans]:
    """One part of the own chunk to the rank `step` before this one, one of the rank `step` after it from there; rows of
    `whole`, [all ranks' rows, columns]."""
    to, source, n = (plan.rank - step) % plan.world, (plan.rank + step) % plan.world, whole.tensor.shape[1]
    sends, receives = plan.chunk(plan.rank)[part : part + 1], plan.chunk(source)[part : part + 1]
    return (
        [(Span(whole, piece.low * n, (piece.high - piece.low) * n), to) for piece in sends if n],
        [(Span(whole, piece.low * n, (piece.high - piece.low) * n), source) for piece in receives if n],
    )
