"""torch's fused products on any backend: the argument order, results and strides of `torch.ops.symm_mem.fused_*`.

torch has kernels for these operations on CUDA with symmetric memory only. Here they run on `comms.overlap_engine`, on
gloo too, and have a backward: each is the other's, and the rows that it gathers serve the weight's gradient as well.
`engine` is made once per group by the caller; `subchunks` is how finely a rank's chunk is cut (0: sequentially).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..comms.chunk_plan import even_rows
from ..comms.overlap_engine import OverlapEngine
from ..dist.errors import UserError


def fused_matmul_reduce_scatter(
    a: Tensor, b: Tensor, reduce_op: str, scatter_dim: int, engine: OverlapEngine, *, subchunks: int = 4
) -> Tensor:
    """reduce_scatter(a @ b) along `scatter_dim`, contiguous as torch's. a: [..., K], b: [K, N], differentiable.

    Unlike torch's it also takes a size that the world does not divide: the first ranks then get one row more.
    """
    if reduce_op not in ("sum", "avg"):
        raise UserError(f"reduce_op {reduce_op!r}", expected="'sum' or 'avg'")
    _fits(a, b)
    dim = _dim(scatter_dim, a.ndim)
    if dim == a.ndim - 1:  # columns of the product are rows of its transpose
        flat = a.reshape(torch.Size(a.shape[:-1]).numel(), a.shape[-1])
        part = _ReduceScatter.apply(b.t(), flat.t(), engine, subchunks)
        out = part.t().unflatten(0, a.shape[:-1])
    else:
        first = a.movedim(dim, 0)
        sizes = even_rows(first.shape[0], engine.world)
        rest = torch.Size(first.shape[1:-1]).numel()
        flat_sizes = tuple(size * rest for size in sizes)
        flat = _ReduceScatter.apply(first.reshape(first.shape[0] * rest, a.shape[-1]), b, engine, subchunks, flat_sizes)
        out = flat.reshape(sizes[engine.rank], *first.shape[1:-1], b.shape[1]).movedim(0, dim)
    out = out / engine.world if reduce_op == "avg" else out
    return out if dim == 0 else out.clone(memory_format=torch.contiguous_format)  # also where a dimension is 1


def fused_all_gather_matmul(
    a_shard: Tensor,
    bs: Sequence[Tensor],
    gather_dim: int,
    engine: OverlapEngine,
    *,
    return_A: bool = True,  # torch's name
    subchunks: int = 4,
) -> tuple[Tensor | None, list[Tensor]]:
    """(all_gather(a_shard) along `gather_dim`, its product with each of `bs`), with the strides of torch's fallback.

    `a_shard`: equally large on all ranks, `gather_dim` not the last. Differentiable, except through the gathered a.
    """
    for b in bs:
        _fits(a_shard, b)
    dim = _dim(gather_dim, a_shard.ndim)
    if dim == a_shard.ndim - 1:
        raise UserError(f"gather_dim {gather_dim} of {a_shard.ndim} dimensions", expected="not the last: it is summed")
    first = a_shard.movedim(dim, 0).contiguous()
    shape = (first.shape[0] * engine.world, *first.shape[1:-1])
    whole, *outs = _AllGather.apply(first.flatten(0, -2), engine, subchunks, *bs)
    results = [out.reshape(*shape, out.shape[-1]).movedim(0, dim) for out in outs]
    return (whole.reshape(*shape, first.shape[-1]).movedim(0, dim) if return_A else None), results


def _scattered(a: Tensor, b: Tensor, engine: OverlapEngine, subchunks: int, sizes: tuple[int, ...]) -> Tensor:
    y = a.new_empty(a.shape[0], b.shape[1])
    plan = engine.plan(sizes, max(subchunks, 1))
    return engine.reduce_scatter(plan, _rows_of(a, b, y), y, overlap=subchunks > 0)


def _gathered(
    a: Tensor, bs: Sequence[Tensor], engine: OverlapEngine, subchunks: int, sizes: tuple[int, ...]
) -> tuple[Tensor, list[Tensor]]:
    whole = a.new_empty(sum(sizes), a.shape[1])
    outs = [a.new_empty(sum(sizes), b.shape[1]) for b in bs]
    products = [_rows_of(whole, b, out) for b, out in zip(bs, outs)]

    def use(low: int, high: int) -> None:
        for product in products:
            product(low, high)

    engine.all_gather(engine.plan(sizes, max(subchunks, 1)), a, whole, use, overlap=subchunks > 0)
    return whole, outs


def _rows_of(a: Tensor, b: Tensor, y: Tensor):
    def product(low: int, high: int) -> None:
        torch.mm(a[low:high], b, out=y[low:high])

    return product


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, a: Tensor, b: Tensor, engine: OverlapEngine, subchunks: int, sizes: tuple[int, ...] | None = None
    ) -> Tensor:
        sizes = sizes or even_rows(a.shape[0], engine.world)
        ctx.save_for_backward(a, b)
        ctx.how = engine, subchunks, sizes
        return _scattered(a.detach(), b.detach(), engine, subchunks, sizes)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        whole, (da,) = _gathered(dout.contiguous(), [b.t()], *ctx.how)
        return da, a.t() @ whole, None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, engine: OverlapEngine, subchunks: int, *bs: Tensor) -> Any:  # type: ignore[override]
        sizes = (a.shape[0],) * engine.world
        whole, outs = _gathered(a.detach(), [b.detach() for b in bs], engine, subchunks, sizes)
        ctx.save_for_backward(whole, *bs)
        ctx.how = engine, subchunks, sizes
        ctx.mark_non_differentiable(whole)
        return whole, *outs

    @staticmethod
    def backward(ctx: Any, _: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        whole, *bs = ctx.saved_tensors
        dout = torch.cat(douts, dim=1)  # one sum over all products, one message per piece
        da = _scattered(dout, torch.cat([b.t() for b in bs]), *ctx.how)
        return da, None, None, *(whole.t() @ d for d in douts)


def _fits(a: Tensor, b: Tensor) -> None:
    if a.ndim < 2 or b.ndim != 2 or a.shape[-1] != b.shape[0] or a.dtype != b.dtype:
        raise UserError(
            f"a product of {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}", expected="[..., K] and [K, N]"
        )


def _dim(dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise UserError(f"dimension {dim} of {ndim}", expected=f"{-ndim} to {ndim - 1}")
    return dim % ndim
