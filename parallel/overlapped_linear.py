"""Matrix products whose collective runs meanwhile: GEMM → reduce-scatter, GEMM → all-reduce, all-gather → GEMM.

T3 (Pati et al., ASPLOS 2024) in software: the producer works in the order in which its rows are wanted elsewhere, and
every finished piece leaves at once. Argument order, results and strides are those of `torch.ops.symm_mem.fused_*`,
which exist on CUDA with symmetric memory only and have no backward; these run on gloo and NCCL. Reduce-scatter and
all-gather are each other's backward, and the rows gathered there serve the weight's gradient as well. Partial sums are
added in rank order whoever owns the rows, in float32 at least, and rounded once.

`group` is a process group, its name, None for all ranks, or a `Team`. A size that the world does not divide is cut as
torch.chunk and DTensor cut it. All ranks call alike. Under autocast they are matrix products like any other: operands
are cast first, so 16 bits are sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..comms.chunk_plan import chunk_rows
from ..dist.errors import UserError
from .overlap_team import Team
from .overlap_teams import team_for
from .overlap_ways import GATHER, SCATTER, SUM

Group = Team | dist.ProcessGroup | str | None
_casts: Callable[[], bool] = torch._C._is_any_autocast_enabled  # on any device; a tenth of asking for one by its name


def matmul_reduce_scatter(
    A: Tensor, B: Tensor, reduce_op: str = "sum", scatter_dim: int = 0, group: Group = None
) -> Tensor:
    """reduce_scatter(A @ B) along `scatter_dim`, contiguous as torch's. A: [..., K], B: [K, N], each rank's own.

    `reduce_op`: 'sum' or 'avg'. Differentiable.
    """
    if scatter_dim == 0 and reduce_op == "sum" and (found := _settled(SCATTER, A, B, group)) is not None:
        return found
    A, B = _cast(A, B)
    _fits(A, B)
    team, dim, average = team_for(group, A), _dim(scatter_dim, A.ndim), _average(reduce_op)
    if dim == 0 and A.ndim == 2:  # a view costs the host as much as a short product
        out = _scattered(A, B, team, chunk_rows(A.shape[0], team.world))
        return out / team.world if average else out
    if dim == A.ndim - 1:  # columns of the product are rows of its transpose
        flat = A.reshape(torch.Size(A.shape[:-1]).numel(), A.shape[-1])
        part = _scattered(B.t(), flat.t(), team, chunk_rows(B.shape[1], team.world))
        out = part.t().unflatten(0, A.shape[:-1])
    else:
        first = A.movedim(dim, 0)
        sizes, rest = chunk_rows(first.shape[0], team.world), torch.Size(first.shape[1:-1]).numel()
        rows = first.reshape(first.shape[0] * rest, A.shape[-1])
        flat = _scattered(rows, B, team, tuple(size * rest for size in sizes))
        out = flat.reshape(sizes[team.rank], *first.shape[1:-1], B.shape[1]).movedim(0, dim)
    out = out / team.world if average else out
    return out if dim == 0 else out.clone(memory_format=torch.contiguous_format)  # also where a dimension is 1


def all_gather_matmul(
    A_shard: Tensor,
    Bs: Sequence[Tensor],
    gather_dim: int = 0,
    group: Group = None,
    *,
    return_A: bool = True,
    total: int | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """(all_gather(A_shard) along `gather_dim`, its product with each of `Bs`), with the strides of torch's fallback.

    A_shard: [..., K], `gather_dim` not the last; Bs: [K, N] each. `total`: the gathered size, when W does not divide
    it. Differentiable, except through the gathered A.
    """
    if gather_dim == 0 and total is None and len(Bs) == 1 and _as_it_is(A_shard, Bs[0]) and A_shard.is_contiguous():
        team = team_for(group, A_shard)
        way = team.ways.get((GATHER, A_shard.shape, Bs[0].shape, A_shard.dtype, Bs[0].dtype))
        if way is not None:
            found = way(A_shard, Bs)
            return found if return_A else (None, found[1])
    A_shard, *Bs = _cast(A_shard, *Bs)
    for B in Bs:
        _fits(A_shard, B)
    team, dim = team_for(group, A_shard), _dim(gather_dim, A_shard.ndim)
    if dim == A_shard.ndim - 1:
        raise UserError(f"gather_dim {gather_dim} of {A_shard.ndim} dimensions", expected="not the last: it is summed")
    if A_shard.ndim == 2:
        sizes = chunk_rows(total if total is not None else A_shard.shape[0] * team.world, team.world)
        whole, *outs = _gathered(A_shard.contiguous(), team, sizes, Bs)
        return whole if return_A else None, outs
    first = A_shard.movedim(dim, 0).contiguous()
    whole_rows, rest = total if total is not None else first.shape[0] * team.world, first.shape[1:-1].numel()
    sizes = tuple(size * rest for size in chunk_rows(whole_rows, team.world))
    whole, *outs = _gathered(first.flatten(0, -2), team, sizes, Bs)
    shape = (whole_rows, *first.shape[1:-1])
    results = [out.reshape(*shape, out.shape[-1]).movedim(0, dim) for out in outs]
    return (whole.reshape(*shape, first.shape[-1]).movedim(0, dim) if return_A else None), results


def matmul_all_reduce(A: Tensor, B: Tensor, reduce_op: str = "sum", group: Group = None) -> Tensor:
    """all_reduce(A @ B), the same bits on all ranks. A: [..., K], B: [K, N], each rank's own.

    Differentiable where all ranks go on alike: the gradient of the result must be equal on all ranks, and is not summed
    over them (Megatron's g).
    """
    if reduce_op == "sum" and (found := _settled(SUM, A, B, group)) is not None:
        return found
    A, B = _cast(A, B)
    _fits(A, B)
    team, average = team_for(group, A), _average(reduce_op)
    rows = A.reshape(A.shape[:-1].numel(), A.shape[-1])
    out = _summed(rows, B, team).reshape(*A.shape[:-1], B.shape[1])
    return out / team.world if average else out


def _settled(kind: str, A: Tensor, B: Tensor, group: Group) -> Tensor | None:
    """A reduction of a product that has settled and has nothing to cast and no gradient, else None.

    A GPU may wait for what the host does before the product, so no more than this is asked, in one frame, and where the
    way may be guessed to be plain (`Team.firsts`), its look-up comes behind the product. Shapes and types were checked
    before it settled.
    """
    if _casts() or ((A.requires_grad or B.requires_grad) and torch.is_grad_enabled()):
        return None
    team = group if type(group) is Team else team_for(group, A)
    try:
        y = A @ B if A.numel() in team.firsts and A.dim() == 2 else None
    except RuntimeError:  # what does not fit has not settled either, and is named by the caller
        return None
    way = team.ways.get((kind, A.shape, B.shape, A.dtype, B.dtype))
    if way is None:
        return None
    return way(A, B) if y is None else way(A, B, y)


def _scattered(a: Tensor, b: Tensor, team: Team, sizes: tuple[int, ...]) -> Tensor:
    """Of two-dimensional operands; recorded for a backward only where one is wanted."""
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _ReduceScatter.apply(a, b, team, sizes)
    return team.reduce_scatter(a, b, sizes)


def _gathered(a: Tensor, team: Team, sizes: tuple[int, ...], bs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The whole of `a` and its products, likewise."""
    if torch.is_grad_enabled() and (a.requires_grad or any(b.requires_grad for b in bs)):
        return _AllGather.apply(a, team, sizes, *bs)
    whole, outs = team.all_gather(a, bs, sizes)
    return whole, *outs


def _summed(a: Tensor, b: Tensor, team: Team) -> Tensor:
    """The product's sum over the ranks, likewise."""
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _AllReduce.apply(a, b, team)
    return team.all_reduce(a, b, chunk_rows(a.shape[0], team.world))


def _as_it_is(a: Tensor, b: Tensor) -> bool:
    """Whether there is nothing to cast and no gradient: all that must be asked at every call of a product that has
    settled, because a GPU waits for what the host does before it. Shapes and types were checked before it settled."""
    return not (_casts() or ((a.requires_grad or b.requires_grad) and torch.is_grad_enabled()))


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, team: Team, sizes: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(a, b)
        ctx.how = team, sizes
        return team.reduce_scatter(a, b, sizes)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        team, sizes = ctx.how
        whole, (da,) = team.all_gather(dout.contiguous(), [b.t()], sizes)
        return da, _weight_grad(a, whole, b) if ctx.needs_input_grad[1] else None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, team: Team, sizes: tuple[int, ...], *bs: Tensor) -> Any:  # type: ignore[override]
        whole, outs = team.all_gather(a, bs, sizes)
        ctx.save_for_backward(whole, *bs)
        ctx.how = team, sizes
        ctx.mark_non_differentiable(whole)
        return whole, *outs

    @staticmethod
    def backward(ctx: Any, _: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        whole, *bs = ctx.saved_tensors
        team, sizes = ctx.how
        dout, b = douts[0].contiguous(), bs[0].t()
        if len(bs) > 1:  # one sum over all products, and one message for each piece
            dout, b = torch.cat(douts, dim=1), torch.cat([b.t() for b in bs])
        da = team.reduce_scatter(dout, b, sizes)
        wanted = ctx.needs_input_grad[3:]
        return da, None, None, *(_weight_grad(whole, d, b) if want else None for d, b, want in zip(douts, bs, wanted))


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, team: Team) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(a, b)
        return team.all_reduce(a, b, chunk_rows(a.shape[0], team.world))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        da = dout @ b.t() if ctx.needs_input_grad[0] else None
        return da, _weight_grad(a, dout, b) if ctx.needs_input_grad[1] else None, None


def _weight_grad(a: Tensor, dout: Tensor, b: Tensor) -> Tensor:
    """aᵀ @ dout in the memory layout of `b`, so that a weight given as its transpose takes it without a copy."""
    return (dout.t() @ a).t() if b.stride(0) == 1 and b.stride(1) != 1 else a.t() @ dout


def _cast(*operands: Tensor) -> Sequence[Tensor]:
    """As autocast casts those of torch's own matrix products, if it is on: anything but float64."""
    device = "cuda" if operands[0].is_cuda else operands[0].device.type  # a device's type takes five times as long
    if not torch.is_autocast_enabled(device):
        return operands
    dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in operands]


def _fits(a: Tensor, b: Tensor) -> None:
    if a.ndim < 2 or b.ndim != 2 or a.shape[-1] != b.shape[0] or a.dtype != b.dtype:
        raise UserError(
            f"a product of {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}", expected="[..., K] and [K, N]"
        )


def _average(reduce_op: str) -> bool:
    if reduce_op not in ("sum", "avg"):
        raise UserError(f"reduce_op {reduce_op!r}", expected="'sum' or 'avg'")
    return reduce_op == "avg"


def _dim(dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise UserError(f"dimension {dim} of {ndim}", expected=f"{-ndim} to {ndim - 1}")
    return dim % ndim
