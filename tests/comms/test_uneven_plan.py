"""Plans whose products do not end where the ranks' chunks do: every row is made, sent and received once, in time."""

from __future__ import annotations

import itertools
import pickle

import pytest

from undertow.comms.chunk_plan import Block, ChunkPlan, Piece
from undertow.comms.uneven_plan import UnevenPlan
from undertow.dist.errors import UserError

PLANS = [
    (world, each, rows)
    for world, each, rows in itertools.product(range(1, 6), range(6), range(1, 12))
    if rows <= world * each + 1
]


@pytest.mark.parametrize("world, each, rows", PLANS)
def test_every_row_is_made_and_sent_once_and_all_ranks_cut_alike(world, each, rows):
    sizes = (each,) * world
    plans = [UnevenPlan(rank, sizes, product_rows=rows) for rank in range(world)]
    for plan in plans:
        made, sent = list[int](), list[int]()
        for hop in plan.hops:
            products = [row for block in hop.blocks for row in range(block.low, block.high)]
            assert 1 <= len(products) <= rows and len(hop.blocks) <= 2
            made += products
            for piece in hop.sends:
                assert plans[piece.owner].own[0] <= piece.low < piece.high <= plans[piece.owner].own[1]
                sent += range(piece.low, piece.high)
            assert len({piece.owner for piece in hop.sends}) == len(hop.sends)  # one message for a peer
            assert sent == made  # all that is made leaves behind it
        assert sent == [row % plan.rows for row in range(plan.own[1], plan.own[1] + plan.rows - each)]  # staggered
        assert [(block.low, block.high) for block in plan.kept] == ([plan.own] if each else [])
        assert [len(hop.sends) for hop in plan.hops] == [len(hop.sends) for hop in plans[0].hops]
    for rank, plan in enumerate(plans):  # what a rank gets is what the others send, hop by hop
        for at, hop in enumerate(plan.hops):
            theirs = {
                (source, piece.low, piece.high)
                for source, other in enumerate(plans)
                for piece in other.hops[at].sends
                if piece.owner == rank
            }
            assert {(source, piece.low, piece.high) for source, piece in hop.receives} == theirs


def test_the_products_of_eight_ranks_by_hand():
    plan = UnevenPlan(6, (256,) * 8, product_rows=320)
    assert [[(b.low, b.high) for b in hop.blocks] for hop in plan.hops] == [
        [(1792, 2048), (0, 64)], [(64, 384)], [(384, 704)], [(704, 1024)], [(1024, 1344)], [(1344, 1536)],
    ]  # fmt: skip
    assert plan.hops[0].sends == (Piece(7, 0, 1792, 2048), Piece(0, 0, 0, 64))
    assert plan.hops[1].sends == (Piece(0, 0, 64, 256), Piece(1, 0, 256, 384))
    assert plan.hops[1].receives == ((4, Piece(6, 0, 1600, 1792)), (3, Piece(6, 0, 1536, 1664)))
    assert plan.kept == (Block(1536, 1792, 0, 0, plan.chunk(6)),)
    assert plan.reads(16384, 8192) == 2048 * 16384 + 8 * 16384 * 8192  # seven, and one more where the rows wrap around
    assert UnevenPlan(7, plan.sizes, product_rows=320).reads(16384, 8192) == 2048 * 16384 + 7 * 16384 * 8192


def test_on_paper_products_of_320_rows_have_all_sent_sooner_than_those_of_a_chunk():
    """Microseconds of cuBLAS products by their rows (N 8192, K 16384) and of the link, from one H200."""
    product_us, row_us = {320: 116, 256: 98, 192: 84}, 617 / 1792

    def ends(plan: ChunkPlan) -> float:
        made = left = 0.0
        for hop in plan.hops:
            made += sum(product_us[block.high - block.low] for block in hop.blocks)
            for piece in hop.sends:
                left = max(left, made) + (piece.high - piece.low) * row_us
        return max(left, made + product_us[256])

    sizes = (256,) * 8
    even, uneven = ends(ChunkPlan(7, sizes)), ends(UnevenPlan(7, sizes, product_rows=320))
    assert even == pytest.approx(784) and uneven == pytest.approx(762)


def test_plans_are_told_apart_and_travel():
    sizes = (4,) * 3
    plans = {ChunkPlan(1, sizes), UnevenPlan(1, sizes, product_rows=5), UnevenPlan(1, sizes, product_rows=6)}
    assert len(plans) == 3 and UnevenPlan(1, sizes, product_rows=5) in plans
    assert pickle.loads(pickle.dumps(plans)) == plans


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(product_rows=0), "products of 0 rows"),
        (dict(product_rows=2, sizes=(4, 4, 3)), "equally many rows"),
        (dict(product_rows=2, subchunks=2), "1 subchunk"),
        (dict(product_rows=2, columns=8), "1 subchunk"),
        (dict(product_rows=2, algorithm="ring"), "direct"),
    ],
)
def test_what_cannot_be_cut_so_is_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        UnevenPlan(**{"rank": 1, "sizes": (4,) * 3, **wrong})


def test_only_a_scatter_is_cut_so():
    plan = UnevenPlan(1, (4,) * 3, product_rows=5)
    plan.expect(1, 3)
    with pytest.raises(UserError, match="products of 5 rows"):
        plan.expect(1, 3, rows=True)
    with pytest.raises(UserError, match="a ChunkPlan"):
        plan.schedule(4, 4)
