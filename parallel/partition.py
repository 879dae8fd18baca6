"""Which tokens of a sequence each rank keeps: contiguous, zigzag, striped, or zigzag within each packed document.

A rank's shard is a list of `Span`s, runs of positions in the order in which the rank stores them. Every length works:
chunks differ by a token, and a rank may have none. Under a causal mask contiguous shards give the last rank P times
the work of the first; zigzag pairs an early chunk with a late one (Llama 3, section 3.3.2) and striped deals tokens
out one by one (Brandon et al. 2023), so that all have nearly the same.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..comms.mpi_group import MpiGroup
from ..dist.errors import UserError
from .agreement import agree

Group = dist.ProcessGroup | MpiGroup | None  # whose ranks share a sequence; None: all of torch.distributed's
LAYOUTS = ("contiguous", "zigzag", "striped", "zigzag_documents")


@dataclass(frozen=True)
class Span:
    """Positions `start`, `start + stride`, … : `count` of them."""

    start: int
    count: int
    stride: int = 1

    def positions(self) -> range:
        return range(self.start, self.start + self.count * self.stride, self.stride)


def shards(
    length: int, world: int, layout: str = "zigzag", cu_seqlens: Sequence[int] | None = None
) -> tuple[tuple[Span, ...], ...]:
    """The spans of each rank. `cu_seqlens` (0, …, length) is what 'zigzag_documents' cuts by."""
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r}", expected=f"one of {', '.join(LAYOUTS)}")
    if length < 0 or world < 1:
        raise UserError(f"{length} tokens over {world} ranks", expected="at least 0 tokens and 1 rank")
    if layout == "striped":
        return tuple((Span(r, len(range(r, length, world)), world),) if r < length else () for r in range(world))
    if layout == "contiguous":
        return tuple(_spans([(length * r // world, length * (r + 1) // world)]) for r in range(world))
    documents = [(0, length)]
    if layout == "zigzag_documents":
        if cu_seqlens is None:
            raise UserError("layout 'zigzag_documents' without cu_seqlens", remedy="pass the documents' bounds")
        documents = document_bounds(cu_seqlens, length)
    found: list[list[tuple[int, int]]] = [[] for _ in range(world)]
    for a, b in documents:
        edges = [a + (b - a) * c // (2 * world) for c in range(2 * world + 1)]
        for r in range(world):
            found[r] += [(edges[r], edges[r + 1]), (edges[2 * world - 1 - r], edges[2 * world - r])]
    return tuple(_spans(runs) for runs in found)


def document_bounds(cu_seqlens: Sequence[int], length: int) -> list[tuple[int, int]]:
    """(start, stop) of each document; `UserError` unless they ascend from 0 to `length`."""
    ends = [int(x) for x in cu_seqlens]
    if not ends or ends[0] != 0 or ends[-1] != length or any(a > b for a, b in zip(ends, ends[1:])):
        raise UserError(f"cu_seqlens {ends} for {length} tokens", expected=f"0, …, {length}, never descending")
    return list(zip(ends, ends[1:]))


def _spans(runs: Sequence[tuple[int, int]]) -> tuple[Span, ...]:
    """Runs as spans; empty ones are left out, and one that continues the last joins it."""
    done: list[Span] = []
    for a, b in runs:
        if a < b and done and done[-1].start + done[-1].count == a:
            done[-1] = Span(done[-1].start, done[-1].count + b - a)
        elif a < b:
            done.append(Span(a, b - a))
    return tuple(done)


def rows_of(spans: Sequence[Span]) -> int:
    return sum(span.count for span in spans)


def positions_of(spans: Sequence[Span]) -> Tensor:
    """[rows] int64: the position of each row of a shard."""
    return torch.tensor([p for span in spans for p in span.positions()], dtype=torch.int64)


def shard_sequence(
    x: Tensor,
    *,
    group: Group | DeviceMesh = None,
    layout: str = "zigzag",
    dim: int = 1,
    cu_seqlens: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """This rank's part of `x`, which every rank of `group` holds whole. No communication; differentiable.

    For inputs, position ids and labels alike; shift labels *before* sharding, because neighbours end up on other ranks.
    """
    _check_dim(x, dim)
    rank, world = place(group)
    mine = shards(x.shape[dim], world, layout, as_list(cu_seqlens))[rank]
    return x.index_select(dim, positions_of(mine).to(x.device))


def unshard_sequence(
    x: Tensor,
    *,
    group: Group | DeviceMesh = None,
    layout: str = "zigzag",
    dim: int = 1,
    length: int,
    cu_seqlens: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """The whole sequence of `length` from all ranks' parts, on every rank; collective.

    Differentiable: the gradient of a shard is the sum of what all ranks ask of it. `UserError` on every rank where
    arguments differ between ranks, or where a shard does not fit.
    """
    _check_dim(x, dim)
    rank, world = place(group)
    bounds, refused, spans = None, None, ()
    try:
        bounds = as_list(cu_seqlens)
        spans = shards(length, world, layout, bounds)
        if x.shape[dim] != rows_of(spans[rank]):
            raise UserError(
                f"a shard of {x.shape[dim]} rows on rank {rank}",
                expected=f"{rows_of(spans[rank])}: its part of {length} in layout {layout!r}",
                remedy="pass the length=, layout= and cu_seqlens= that shard_sequence was given",
            )
    except UserError as error:
        refused = error
    others = list(x.shape[: dim % x.dim()] + x.shape[dim % x.dim() + 1 :])
    given = {"length": length, "layout": layout, "dim": dim % x.dim(), "cu_seqlens": bounds, "dtype": x.dtype,
             "the shape beside the sequence": others}  # fmt: skip
    agree("unshard_sequence", rank, given, refused, partial(_gather_small, group=group_of(group), device=x.device))
    whole: Tensor = _Gather.apply(x.movedim(dim, 0), spans, group_of(group))  # pyright: ignore[reportAssignmentType]
    return whole.movedim(0, dim)


def _gather_small(mine: Tensor, *, group: Group, device: torch.device) -> list[Tensor]:
    """Every rank's CPU tensor of one shape, through the backend that `group` has for `device`; collective."""
    if isinstance(group, MpiGroup):
        return group.gather(mine)
    if place(group)[1] == 1:
        return [mine]
    found = [torch.empty_like(mine, device=device) for _ in range(place(group)[1])]
    dist.all_gather(found, mine.to(device), group=group)
    return list(torch.stack(found).cpu())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spans: tuple[tuple[Span, ...], ...], group: Any) -> Tensor:
        ctx.spans, ctx.group = spans, group
        places = [positions_of(part).to(x.device) for part in spans]
        if len(spans) == 1:
            return x.clone()
        most = max(len(p) for p in places)
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: x.shape[0]] = x
        if isinstance(group, MpiGroup):
            found = group.gather(padded)
        else:
            found = [torch.empty_like(padded) for _ in spans]
            dist.all_gather(found, padded, group=group)
        whole = x.new_empty(sum(len(p) for p in places), *x.shape[1:])
        for part, at in zip(found, places):
            whole[at] = part[: len(at)]
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.clone(memory_format=torch.contiguous_format)
        sum_over(grad, ctx.group)
        rank, _ = place(ctx.group)
        return grad.index_select(0, positions_of(ctx.spans[rank]).to(grad.device)), None, None


def _check_dim(x: Tensor, dim: int) -> None:
    if not isinstance(x, Tensor):
        raise UserError(f"a {type(x).__name__} to cut", expected="a tensor", remedy="torch.as_tensor makes one")
    if not -x.dim() <= dim < x.dim():
        raise UserError(f"dim {dim} of a tensor of {x.dim()} dims", expected="the dim of the sequence (default 1)")


def group_of(group: Group | DeviceMesh) -> Group:
    """What a caller passes as `group`: a group, an `MpiGroup`, None for all ranks, or a mesh of one axis."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise UserError(
                f"a mesh with the axes {group.mesh_dim_names or group.ndim} as group",
                expected="a mesh of one axis, the one that shares the sequence",
                remedy="pass mesh['context'], by the name of your axis",
            )
        return group.get_group()
    if group is not None and not isinstance(group, (dist.ProcessGroup, MpiGroup)):
        raise UserError(
            f"group {group!r}",
            expected="a process group (torch.distributed.new_group), a DeviceMesh of one axis, an MpiGroup, or None",
        )
    return group


def place(group: Group | DeviceMesh) -> tuple[int, int]:
    """(rank, size) within `group`; (0, 1) where torch.distributed is not initialised."""
    group = group_of(group)
    if isinstance(group, MpiGroup):
        return group.rank, group.world
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def sum_over(x: Tensor, group: Group | DeviceMesh) -> None:
    """Replace `x` by its sum over `group`; collective."""
    group = group_of(group)
    if isinstance(group, MpiGroup):
        group.sum_into(x)
    elif place(group)[1] > 1:
        dist.all_reduce(x, group=group)


def as_list(cu_seqlens: Sequence[int] | Tensor | None) -> list[int] | None:
    if cu_seqlens is None:
        return None
    found = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    try:
        return [operator.index(x) for x in found]
    except TypeError as error:
        raise UserError(
            f"cu_seqlens {found}", expected="whole numbers in one dim: the global bounds of the documents"
        ) from error
