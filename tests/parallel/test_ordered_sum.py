"""The sum of the ranks' parts by one kernel: the bits of the plain one, wherever the parts lie."""

from __future__ import annotations

import pytest
import torch

from undertow.comms.chunk_plan import ChunkPlan, chunk_rows
from undertow.comms.overlap_engine import add_pieces
from undertow.comms.placement import Placement
from undertow.parallel.kernels.ordered_sum import ordered_sum


def _same_bits(device: str, dtype: torch.dtype) -> None:
    """Parts of very different size, so that another order gives other bits, of rows and of columns, beside each other
    and with a place for this rank between."""
    for world, rank, rows, columns, cut in ((1, 0, 5, 7, 0), (2, 1, 5, 7, 7), (3, 1, 40, 1030, 0), (3, 0, 3, 1, 1),
                                            (4, 0, 9, 1030, 1030), (8, 2, 70, 2200, 2200),
                                            (5, 4, 20, 4096, 4096)):  # fmt: skip
        for whole in {False, cut > 0}:
            _same_bits_of(ChunkPlan(rank, chunk_rows(rows, world), 3, columns=cut, whole=whole), columns, device, dtype)


def _same_bits_of(plan: ChunkPlan, columns: int, device: str, dtype: torch.dtype) -> None:
    world, rank, rows = plan.world, plan.rank, plan.rows
    kept = plan.own[1] - plan.own[0]
    room = torch.full((world, kept * columns + 8), torch.nan, dtype=dtype, device=device)
    y = torch.randn(rows, columns).mul(3.0**rank).to(device, dtype)
    place, want = Placement(plan, y), torch.empty(kept, columns, dtype=dtype, device=device)
    sent = torch.randn(world, kept, columns).mul(3.0 ** torch.arange(world).view(-1, 1, 1)).to(device, dtype)
    here = [room[source, : kept * columns].view(kept, columns) for source in range(world) if source != rank]
    for landing, each in zip(here, sent):
        landing.copy_(each)
    pieces = plan.chunk(rank)
    add_pieces(place, here, pieces, want)
    for landings in (here, list(torch.stack([*here, want]).unbind(0))[:-1]):
        out = torch.full_like(want, torch.nan)
        for group in filter(None, (pieces[:-1], pieces[-1:])):
            ordered_sum(place, landings, group, out)
        assert torch.equal(out, want), plan
    if plan.whole:  # sums that lie as the product does
        among = Placement(plan, y, alike=True)
        found, wanted = (torch.full_like(y, torch.nan) for _ in range(2))
        for piece in pieces:
            ordered_sum(among, here, [piece], found)
            add_pieces(among, here, [piece], wanted)
        assert torch.equal(found.nan_to_num(-1.0), wanted.nan_to_num(-1.0)), plan
        assert int(wanted.isnan().sum()) == (rows - kept) * columns
    for piece in pieces:
        parts = [place.landed(landing, piece).double() for landing in here]
        parts.insert(rank, place.made(piece).double())
        total = torch.stack(parts).sum(0)
        error = (place.summed(want, piece).double() - total).abs() / torch.stack(parts).abs().sum(0)
        # each of the float32 sums, and the one rounding, is within half a unit of what it rounds
        assert float(error.max()) <= world * 2**-24 + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_a_gpu_it_is_the_plain_sum(seed, dtype):
    _same_bits("cpu", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_kernel_gives_the_same_bits(seed, dtype):
    _same_bits("cuda", dtype)
