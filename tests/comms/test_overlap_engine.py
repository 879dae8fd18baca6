"""The overlap engine: what it computes with late, poisoned and reused memory, when it sends, and how it fails."""

from __future__ import annotations

import random
import time

import pytest
import torch

from undertow.comms.chunk_plan import ChunkPlan, chunk_rows
from undertow.comms.output_map import OutputMap
from undertow.comms.overlap_engine import OverlapEngine
from undertow.comms.tracker import Tracker, TrackerStopped
from undertow.dist.errors import PeerLost, UndertowError, UserError
from undertow.dist.trace import Trace


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_plan_makes_every_row_once_and_its_own_last(world):
    for rows in (0, 1, 7, 24):
        for rank in range(world):
            plan = ChunkPlan(rank, chunk_rows(rows, world), subchunks=3)
            for order in (plan.scatter_order, plan.gather_order):
                covered = sorted(row for piece in order for row in range(piece.low, piece.high))
                assert covered == list(range(rows))
            own = [piece for piece in plan.scatter_order if piece.owner == rank]
            assert list(plan.scatter_order[len(plan.scatter_order) - len(own) :]) == own
            assert list(plan.gather_order[: len(own)]) == own


@pytest.mark.parametrize("world", [2, 3, 4])
def test_at_every_step_each_rank_is_sent_to_once(world):
    plans = [ChunkPlan(rank, (6,) * world, 2) for rank in range(world)]
    for maps in ([OutputMap.reduce_scatter(p) for p in plans], [OutputMap.all_gather(p) for p in plans]):
        for step in zip(*(m.rules for m in maps), strict=True):
            assert sorted(rule.dst for rule in step) == list(range(world))


def test_a_tracker_counts_epochs_without_a_reset():
    tracker = Tracker({"a": 2})
    for epoch in (1, 2, 3):
        assert tracker.begin() == epoch
        tracker.bump("a")
        assert not tracker.done("a", epoch)
        with pytest.raises(TrackerStopped, match="1 of 2 tiles"):
            tracker.wait("a", epoch, timeout_s=0.001)
        tracker.bump("a")
        tracker.wait("a", epoch, timeout_s=0.001)
    tracker.fail(ValueError("broken"))
    with pytest.raises(TrackerStopped, match="broken"):
        tracker.wait("a", 4)


def test_a_map_refuses_a_piece_that_leaves_twice():
    piece = ChunkPlan(0, (4, 4)).scatter_order[0]
    rules = OutputMap().remote_map(piece, 1)
    assert rules.rules[0].remote and not rules.by_dma().rules[0].remote
    with pytest.raises(UserError, match="twice"):
        rules.dma_map(piece, 1)


def _storm(rank: int, world: int, seed: int, iterations: int, rows: int) -> None:
    """Whole numbers in poisoned memory, with a random delay before each piece: equal to the sum, bit for bit."""
    engine = OverlapEngine()
    delays, numbers = random.Random(seed + rank), torch.Generator().manual_seed(seed)
    plan = engine.plan(chunk_rows(rows, world), 3)
    low, high = plan.own
    y, whole = torch.empty(rows, 5), torch.empty(rows, 5)
    for _ in range(iterations):
        everyone = torch.randint(-9, 9, (world, rows, 5), generator=numbers).float()
        y.fill_(torch.nan)
        whole.fill_(torch.nan)

        def product(first: int, last: int, mine: torch.Tensor = everyone[rank]) -> None:
            if delays.random() < 0.2:
                time.sleep(delays.random() * 1e-3)
            y[first:last] = mine[first:last]

        out = engine.reduce_scatter(plan, product, y)
        assert torch.equal(out, everyone.sum(0)[low:high])
        seen = torch.zeros(rows, 5)

        def use(first: int, last: int, seen: torch.Tensor = seen) -> None:
            seen[first:last] = whole[first:last]

        engine.all_gather(plan, out, whole, use)
        assert torch.equal(seen, everyone.sum(0))
    engine.close()


@pytest.mark.parametrize(("world", "rows"), [(1, 4), (2, 7), (3, 10), (3, 1)])
def test_late_and_poisoned_pieces_sum_bit_for_bit(ranks, seed, world, rows):
    ranks(world, _storm, seed, 40, rows)


@pytest.mark.slow
def test_a_thousand_calls_reuse_their_buffers(ranks, seed):
    ranks(2, _storm, seed, 1000, 13, timeout_s=120)


def _order_of_sums(rank: int, world: int) -> list[float]:
    """1e8, 1, -1e8: in float32 the sum depends on the order, which must be that of the ranks for every owner."""
    engine = OverlapEngine()
    y = torch.full((6, 1), [1e8, 1.0, -1e8][rank])
    out = engine.reduce_scatter(engine.plan((2, 2, 2)), lambda low, high: None, y)
    engine.close()
    return out.flatten().tolist()


def test_sums_are_in_rank_order_whoever_owns_them(ranks):
    assert ranks(3, _order_of_sums) == [[0.0, 0.0]] * 3  # rank 0 and 2 first would give 1


def _traced(rank: int, world: int, folder: str) -> None:
    with Trace(f"{folder}/{rank}.json", rank) as trace:
        engine = OverlapEngine(trace=trace)
        y = torch.ones(8, 4)
        engine.reduce_scatter(engine.plan((4, 4), 2), lambda low, high: time.sleep(0.02), y)
        engine.close()


def test_the_first_send_starts_before_the_last_tile_ends(ranks, tmp_path):
    import json

    ranks(2, _traced, str(tmp_path))
    for rank in range(2):
        events = json.loads((tmp_path / f"{rank}.json").read_text().rstrip().rstrip(",") + "]")
        spans = [event for event in events if event["ph"] in "BE"]
        first_send = min(e["ts"] for e in spans if e["ph"] == "B" and e["name"].startswith("send"))
        made, open_name = [], ""
        for event in spans:  # an end carries its begin's name
            open_name = event["name"]
            if event["ph"] == "E" and open_name.startswith("product"):
                made.append(event["ts"])
        assert len(made) == 4 and first_send < max(made)


def _lonely(rank: int, world: int) -> str:
    engine = OverlapEngine(timeout_s=1.0)
    if rank == 1:
        time.sleep(3.0)  # alive, but never comes
        return ""
    plan = engine.plan((2, 2))
    with pytest.raises(PeerLost) as caught:
        engine.reduce_scatter(plan, lambda low, high: None, torch.ones(4, 1))
    with pytest.raises(UndertowError, match="failed before"):
        engine.reduce_scatter(plan, lambda low, high: None, torch.ones(4, 1))
    return str(caught.value)


def test_a_rank_that_does_not_come_is_named_with_its_chunk(ranks):
    message = ranks(2, _lonely)[0]
    assert "rank 0: chunk 0 part 0 (rows 0–2) did not come from rank 1" in message
