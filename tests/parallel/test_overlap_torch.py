"""Fused products beside torch's own fallbacks: values, strides and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric

from undertow.comms.overlap_engine import OverlapEngine
from undertow.dist.errors import UserError
from undertow.parallel.overlap_torch import fused_all_gather_matmul, fused_matmul_reduce_scatter

SHAPES = [((12,), 5, 3), ((12, 6), 7, 6), ((6, 12, 6), 1, 6), ((12, 6), 0, 12)]  # leading dims, K, N


def _whole(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _like_torch(rank: int, world: int, seed: int) -> None:
    """Zeros and ones: every order of sums gives the same bits."""
    engine, name = OverlapEngine(), dist.distributed_c10d._get_default_group().group_name
    generator = torch.Generator().manual_seed(seed + rank)
    for (lead, k, n), dtype, subchunks in itertools.product(SHAPES, (torch.float32, torch.bfloat16), (0, 1, 4)):
        a = _whole(*lead, k, dtype=dtype, generator=generator)
        b = _whole(k, n, dtype=dtype, generator=generator)
        b = b.t().contiguous().t() if subchunks else b  # not contiguous either
        for dim in range(len(lead) + 1):
            if dim < len(lead) or n % world == 0:
                want = symmetric._fused_matmul_reduce_scatter_fallback(a, b, "sum", dim, name)
                got = fused_matmul_reduce_scatter(a, b, "sum", dim, engine, subchunks=subchunks)
                assert torch.equal(got, want) and got.stride() == want.stride(), (lead, k, n, dim)
        for dim in range(len(lead)):
            want_a, wants = symmetric._fused_all_gather_matmul_fallback(a, [b, b], dim, name)
            got_a, gots = fused_all_gather_matmul(a, [b, b], dim, engine, subchunks=subchunks)
            assert got_a is not None and want_a is not None and torch.equal(got_a, want_a), (lead, k, n, dim)
            assert world == 1 or got_a.stride() == want_a.stride()  # torch returns a view of its input then
            for got, want in zip(gots, wants, strict=True):
                assert torch.equal(got, want) and got.stride() == want.stride(), (lead, k, n, dim)
    engine.close()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_values_and_strides_are_those_of_torch(ranks, seed, world):
    ranks(world, _like_torch, seed)


def _gradients(rank: int, world: int, seed: int) -> None:
    """An MLP split over ranks against the whole one, in float64: 1e-12 is rounding of sums of some tens of products."""
    engine = OverlapEngine()
    generator = torch.Generator().manual_seed(seed)
    x, up, down = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4 * world, 3, 6), (6, 24), (24, 6))
    )
    target = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    whole = [t.clone().requires_grad_() for t in (x, up, down)]
    ((whole[0] @ whole[1]).relu() @ whole[2] * target).sum().backward()
    parts = [x.chunk(world)[rank], up.chunk(world, 1)[rank], down.chunk(world)[rank]]
    x_r, up_r, down_r = (part.clone().requires_grad_() for part in parts)
    _, (hidden,) = fused_all_gather_matmul(x_r, [up_r], 0, engine, subchunks=2)
    out = fused_matmul_reduce_scatter(hidden.relu(), down_r, "sum", 0, engine, subchunks=2)
    (out * target.chunk(world)[rank]).sum().backward()
    for mine, full, dim in ((x_r, whole[0], 0), (up_r, whole[1], 1), (down_r, whole[2], 0)):
        assert full.grad is not None
        torch.testing.assert_close(mine.grad, full.grad.chunk(world, dim)[rank], rtol=1e-12, atol=1e-12)
    engine.close()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_gradients_of_a_split_mlp_are_those_of_the_whole(ranks, seed, world):
    ranks(world, _gradients, seed)


def _ragged(rank: int, world: int) -> None:
    engine = OverlapEngine()
    a, b = torch.ones(7, 2) * (rank + 1), torch.ones(2, 3)
    got = fused_matmul_reduce_scatter(a, b, "avg", 0, engine)
    assert torch.equal(got, torch.full(((3, 2, 2)[rank], 3), 4.0))
    with pytest.raises(UserError, match="'sum' or 'avg'"):
        fused_matmul_reduce_scatter(a, b, "max", 0, engine)
    with pytest.raises(UserError, match="not the last"):
        fused_all_gather_matmul(a, [b], 1, engine)
    engine.close()


def test_rows_that_the_world_does_not_divide(ranks):
    ranks(3, _ragged)
