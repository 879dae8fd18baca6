"""The product that counts its tiles: the order of its table, what it refuses, and on a GPU its bits and its counts."""

from __future__ import annotations

import pytest
import torch

from undertow.comms.chunk_plan import ChunkPlan, chunk_rows
from undertow.parallel.kernels.tracked_matmul import tile_table, tracked_matmul, unusable


@pytest.mark.parametrize("rows, n, world, subchunks", [(1, 1, 1, 1), (50, 9, 3, 2), (1000, 70, 4, 4), (2, 8, 3, 2)])
def test_tiles_cover_every_number_once_and_in_the_order_of_the_pieces(rows, n, world, subchunks):
    plan = ChunkPlan(1 % world, chunk_rows(rows, world), subchunks)
    pieces = [(piece.low, piece.high) for piece in plan.scatter_order]
    table = tile_table(pieces, n, block_m=16, block_n=8)
    made = torch.zeros(rows, n, dtype=torch.int64)
    for low, high, left, number in table.tolist():
        assert pieces[number][0] <= low < high == pieces[number][1]
        made[low : min(low + 16, high), left : left + 8] += 1
    assert bool((made == 1).all())
    numbers = table[:, 3].tolist()
    assert numbers == sorted(numbers)  # no tile of a later piece is begun before one of an earlier piece


def test_it_says_what_it_cannot_make():
    a, b = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(8, 16, dtype=torch.bfloat16)
    assert unusable(a, b) in ("no Triton", "not on a GPU")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("m, k, n", [(300, 128, 520), (1024, 4096, 1536), (129, 8, 264)])
def test_its_bits_and_its_counts(m, k, n, transposed, seed):
    """Small whole numbers, exact in float32 and rounded once."""
    a = torch.randint(-3, 4, (m, k), device="cuda").bfloat16()
    b = torch.randint(-3, 4, (k, n), device="cuda").bfloat16()
    b = b.t().contiguous().t() if transposed else b
    if reason := unusable(a, b):
        pytest.skip(f"needs a CUDA device that can: {reason}")
    plan = ChunkPlan(1, chunk_rows(m, 3), 2)
    pieces = [(piece.low, piece.high) for piece in plan.scatter_order]
    counters = torch.zeros(len(pieces), dtype=torch.int32, device="cuda")
    for call in range(1, 4):
        y = torch.full((m, n), torch.nan, dtype=torch.bfloat16, device="cuda")
        tiles = tracked_matmul(a, b, y, pieces, counters)
        assert torch.equal(y, (a.float() @ b.float()).bfloat16())
        assert counters.tolist() == [call * each for each in tiles]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_refuses_what_a_descriptor_cannot_name():
    a = torch.zeros(4, 9, dtype=torch.bfloat16, device="cuda")
    assert (
        "float32" in unusable(a.float(), a.float().t())
        or "older" in unusable(a, a.t())
        or "Triton" in unusable(a, a.t())
    )
    assert unusable(a, a.t().contiguous())
