"""Shards hold each token once, and tiles hold each visible pair once, whatever the layout and the mask."""

from __future__ import annotations

import random

import pytest
import torch

from undertow.dist.errors import UserError
from undertow.parallel.masks import BACKWARDS, CAUSAL, Mask, Tile, tiles
from undertow.parallel.partition import LAYOUTS, positions_of, shards


@pytest.fixture
def visible(attention_reference):
    return attention_reference.visible


def painted(tile, lq, lk):
    rows, keys = tile.q1 - tile.q0, tile.k1 - tile.k0
    t, s = torch.arange(rows)[:, None], torch.arange(keys)[None, :]
    at = t + keys - rows
    part = torch.ones(rows, keys, dtype=torch.bool)
    if tile.kind in (CAUSAL, BACKWARDS):
        assert rows <= keys
        part = s <= at
        if tile.window is not None:
            part &= s > at - tile.window
    return part.flip(0, 1) if tile.kind == BACKWARDS else part


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_visible_pair_is_in_one_tile(layout, seed, visible):
    generator = random.Random(seed)
    for _ in range(20):
        world, lq, lk = generator.randint(1, 5), generator.randint(1, 23), generator.randint(1, 23)
        kind = generator.choice(["full", "causal", "window", "prefix", "documents"])
        cu_q = cu_k = None
        if kind == "documents" or layout == "zigzag_documents":
            n = generator.randint(1, 4)
            cu_q = (0, *sorted(generator.randint(0, lq) for _ in range(n - 1)), lq)
            cu_k = (0, *sorted(generator.randint(0, lk) for _ in range(n - 1)), lk)
        mask = Mask(
            causal=kind != "full",
            window=generator.randint(1, 9) if kind in ("window", "documents") else None,
            prefix=generator.randint(0, lk) if kind == "prefix" and cu_q is None else 0,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
        )
        q_shards, k_shards = shards(lq, world, layout, cu_q), shards(lk, world, layout, cu_k)
        assert sorted(p for s in q_shards for p in positions_of(s).tolist()) == list(range(lq))
        count = torch.zeros(lq, lk, dtype=torch.int64)
        for q in q_shards:
            for k in k_shards:
                local = torch.zeros(len(positions_of(q)), len(positions_of(k)), dtype=torch.int64)
                for tile in tiles(q, k, mask, lq, lk):
                    part = painted(tile, lq, lk)
                    assert int(part.sum()) == tile.area, tile
                    local[tile.q0 : tile.q1, tile.k0 : tile.k1] += part
                count[positions_of(q)[:, None], positions_of(k)[None, :]] += local
        assert torch.equal(count, visible(mask, lq, lk).long()), (mask, layout, world, lq, lk)


def test_causal_zigzag_gives_all_ranks_the_same_work():
    parts = shards(64, 4, "zigzag")
    areas = [sum(t.area for k in parts for t in tiles(q, k, Mask(causal=True), 64, 64)) for q in parts]
    assert len(set(areas)) == 1 and sum(areas) == 64 * 65 // 2


def test_what_can_be_one_kernel_call_is_one():
    """A zigzag shard against itself is one triangle of its rows; against another rank's it is one rectangle."""
    parts = shards(64, 4, "zigzag")
    found = {(i, j): tiles(parts[i], parts[j], Mask(causal=True), 64, 64) for i in range(4) for j in range(4)}
    assert all(len(found[pair]) == 1 for pair in found)
    assert found[2, 2] == (Tile(0, 16, 0, 16, CAUSAL),)
    assert found[2, 1] == (Tile(0, 16, 0, 8),) and found[1, 2] == (Tile(8, 16, 0, 16),)
    bounds = tuple(range(0, 801, 8))  # 100 documents
    many = tiles(*[shards(800, 2, "zigzag_documents", bounds)[0]] * 2, Mask(True, cu_seqlens_q=bounds), 800, 800)
    assert len(many) == 100


def test_wrong_requests_are_refused():
    for wrong in (dict(window=3), dict(causal=True, window=0), dict(prefix=2), dict(causal=True, window=2, prefix=1)):
        with pytest.raises(UserError):
            Mask(**wrong)
    with pytest.raises(UserError, match="cu_seqlens"):
        shards(8, 2, "zigzag_documents")
    with pytest.raises(UserError, match="layout"):
        shards(8, 2, "snake")
