"""The overlap engine: what it computes with late, poisoned and reused memory, when it sends, and how it fails."""

from __future__ import annotations

import multiprocessing
import os
import queue
import random
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from undertow.comms.actions import Compute, Send
from undertow.comms.chunk_plan import ChunkPlan, chunk_rows, panels, waves
from undertow.comms.cost import overlapped_columns_seconds, overlapped_scatter_seconds
from undertow.comms.link import Bucket, LinkModel
from undertow.comms.output_map import OutputMap
from undertow.comms.overlap_engine import OverlapEngine
from undertow.comms.placement import Placement
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


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("whole", [False, True])
def test_pieces_of_columns_make_every_number_once_in_memory_of_their_own(world, whole):
    """What one rank sends in a hop is what the other receives in it, and no two pieces share memory."""
    for rows, columns in ((0, 5), (1, 5), (7, 300), (24, 1030)):
        sizes = chunk_rows(rows, world)
        plans = [ChunkPlan(rank, sizes, 3, columns=columns, whole=whole, processors=2) for rank in range(world)]
        for rank, plan in enumerate(plans):
            y = torch.full((rows, columns), -1.0)
            place, made = Placement(plan, y), torch.zeros(rows, columns)
            for block in (*(block for hop in plan.hops for block in hop.blocks), *plan.kept):
                made[block.low : block.high, block.left : block.right] += 1
                assert place.block(block).shape == (block.high - block.low, block.right - block.left)
            assert bool((made == 1).all())
            for number, piece in enumerate(plan.scatter_order):
                mine = place.made(piece)
                assert mine.is_contiguous() or piece.owner == rank
                assert bool((mine == -1).all())
                mine.fill_(number)
            assert bool((y != -1).all())
            assert len(plan.kept) == (not whole and plan.own[0] < plan.own[1])
            assert all(len(hop.blocks) <= 1 for hop in plan.hops) or not whole
            sent = [(part, p.owner, p.left, p.right) for part, hop in enumerate(plan.hops) for p in hop.sends]
            for owner, other in enumerate(plans):
                came = [(part, owner, p.left, p.right) for part, h in enumerate(other.hops) for s, p in h.receives
                        if s == rank]  # fmt: skip
                assert came == [each for each in sent if each[1] == owner]
    # growing by 0.95 · 8 / 7 and by 1.9, in tiles of 256; in steps of 8; and where there is hardly one for each
    assert [right // 256 for _, right in panels(8192, 8, 8)] == [3, 6, 10, 13, 17, 22, 27, 32]
    assert [right // 256 for _, right in panels(8192, 4, 2)] == [2, 7, 16, 32]
    assert panels(100, 4, 8) == ((0, 24), (24, 48), (48, 72), (72, 100)) and panels(3, 4, 2) == ((0, 1), (1, 3))
    assert panels(0, 4, 2) == () and panels(300, 1, 2) == ((0, 300),)
    with pytest.raises(UserError, match="pieces of columns"):
        plans[0].schedule(4, 6)


def test_pieces_with_the_own_rows_end_with_full_rounds_of_the_processors():
    """132 processors, tiles of 128×256: 33 columns of 4 tiles are one round, 16 of 8 nearly one, 33 of 8 two."""
    widths = {parts: [(right - left) // 256 for left, right in waves(28672, parts, 512, 132)] for parts in (2, 4, 8)}
    assert widths == {2: [66, 46], 4: [33, 33, 33, 13], 8: [33, 33, 33, 13]}
    assert [(right - left) // 256 for left, right in waves(28672, 8, 1000, 132)] == [16] * 7
    assert [(right - left) // 256 for left, right in waves(28672, 4, 1024, 132)] == [33, 33, 33, 13]
    assert [right // 256 for _, right in waves(8192, 4, 2048, 132)] == [8, 16, 24, 32]
    even = [(0, 2048), (2048, 4096), (4096, 6144), (6144, 8192)]
    assert [list(waves(8192, 4, rows, 132)) for rows in (512, 0)] == [even] * 2
    assert [right for _, right in waves(512, 4, 132 * 128, 132)] == [256, 512]
    assert [right for _, right in waves(512, 4, 133 * 128, 132)] == [128, 256, 384, 512]
    assert waves(100, 4, 4096, 132) == ((0, 24), (24, 48), (48, 72), (72, 100)) and waves(0, 4, 4096, 132) == ()
    plans = [ChunkPlan(rank, (128,) * 4, 4, columns=28672, whole=True, processors=132) for rank in range(4)]
    assert [plan.edges for plan in plans] == [(0, 8448, 16896, 25344, 28672)] * 4
    assert plans[1].reads(10, 28672) == 4 * 512 * 10 + 10 * 28672  # the second operand once
    assert plans[0].among is plans[0] and ChunkPlan(1, (4, 4), 2, columns=6).among.whole


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
    by_columns = [engine.plan(plan.sizes, 3, 5, whole=whole) for whole in (False, True)]
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
        y.fill_(torch.nan)

        def panel(
            first: int, last: int, left: int, right: int, into: torch.Tensor, mine: torch.Tensor = everyone[rank]
        ) -> None:
            if delays.random() < 0.2:
                time.sleep(delays.random() * 1e-3)
            into.copy_(mine[first:last, left:right])

        for each in by_columns:
            y.fill_(torch.nan)
            assert torch.equal(engine.reduce_scatter(each, product, y, panel=panel), out)
        seen = torch.zeros(rows, 5)

        def use(first: int, last: int, seen: torch.Tensor = seen) -> None:
            seen[first:last] = whole[first:last]

        engine.all_gather(plan, out, whole, use)
        assert torch.equal(seen, everyone.sum(0))
        y.fill_(torch.nan)
        assert torch.equal(engine.all_reduce(plan, product, y), everyone.sum(0))
    engine.close()


@pytest.mark.parametrize(("world", "rows"), [(1, 4), (2, 7), (3, 10), (3, 1)])
def test_late_and_poisoned_pieces_sum_bit_for_bit(ranks, seed, world, rows):
    ranks(world, _storm, seed, 40, rows)


@pytest.mark.slow
def test_a_thousand_calls_reuse_their_buffers(ranks, seed):
    ranks(2, _storm, seed, 1000, 13)


def _order_of_sums(rank: int, world: int) -> list[float]:
    """1e8, 1, -1e8: in float32 the sum depends on the order, which must be that of the ranks for every owner."""
    engine = OverlapEngine()
    y = torch.full((6, 1), [1e8, 1.0, -1e8][rank])
    out = engine.reduce_scatter(engine.plan((2, 2, 2)), lambda low, high: None, y)
    half = torch.full((6, 1), [256.0, 1.0, 1.0][rank], dtype=torch.bfloat16)
    rounded = engine.all_reduce(engine.plan((2, 2, 2)), lambda low, high: None, half)
    engine.close()
    assert rounded.unique().tolist() == [258.0]  # bfloat16 has 256 and 258 but not 257: it was rounded once
    return out.flatten().tolist()


def test_sums_are_in_rank_order_whoever_owns_them_and_rounded_once(ranks):
    assert ranks(3, _order_of_sums) == [[0.0, 0.0]] * 3  # rank 0 and 2 first would give 1


class _Virtual:
    """One rank of a world of threads on a virtual clock: products take `tile_s` per row, links a token bucket."""

    def __init__(self, rank: int, world: int, mail: Any, bytes_per_s: float) -> None:
        self.rank, self.world, self.mail = rank, world, mail
        self.now_s, self.made_s, self.link = 0.0, dict[int, float](), Bucket(bytes_per_s)  # made: by place in memory

    def post_send(self, rows: torch.Tensor, to: int, tag: int) -> Any:
        made_s = self.made_s[int(rows.storage_offset())]
        gone_s = self.link.take(made_s, rows.numel() * rows.element_size())
        self.mail[self.rank, to, tag].put((rows.clone(), gone_s))
        return None, gone_s

    def post_recv(self, rows: torch.Tensor, source: int, tag: int) -> Any:
        return rows, (source, self.rank, tag)

    def wait(self, handle: Any, timeout_s: float) -> None:
        rows, at = handle
        if rows is not None:
            came, at = self.mail[at].get(timeout=timeout_s)
            rows.copy_(came)
        self.now_s = max(self.now_s, at)

    def close(self) -> None: ...


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("subchunks", [1, 4])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_the_engine_takes_the_closed_form_on_a_virtual_clock(world, subchunks, ratio):
    """The real engine, all ranks as threads: max(g, g / (W T) + s) by rows, exactly; g + s when it does not overlap. By
    columns the slowest rank takes its form: ranks in the middle make a piece by two products, and begin to send early.
    With the own rows in each piece all take it.
    """
    width, each = 120, 12
    nbytes, gemm_s = (world - 1) * each * width * 4, 1.0
    times: dict[str, list[float]] = {way: [0.0] * world for way in ("rows", "columns", "panels", "sequential")}
    for way in times:
        ranks = range(world)  # all queues are made before: two threads that asked at once would get one each
        mail = {(src, to, tag): queue.Queue[Any]() for src in ranks for to in ranks for tag in range(subchunks)}

        def one(rank: int, way: str = way, mail: Any = mail) -> None:
            clock = _Virtual(rank, world, mail, nbytes / (ratio * gemm_s))
            engine = OverlapEngine(messenger=clock, timeout_s=240)
            columns = width if way in ("columns", "panels") else 0
            plan = engine.plan((each,) * world, subchunks, columns, whole=way == "panels")
            y = torch.ones(each * world, width)

            def takes(numbers: int, start: int) -> None:
                clock.now_s += gemm_s * numbers / y.numel()
                clock.made_s.update(dict.fromkeys(range(start, start + numbers), clock.now_s))

            def product(low: int, high: int) -> None:
                takes((high - low) * width, low * width)

            def panel(low: int, high: int, left: int, right: int, into: torch.Tensor) -> None:
                takes(into.numel(), int(into.storage_offset()))

            out = engine.reduce_scatter(plan, product, y, overlap=way != "sequential", panel=panel)
            assert torch.equal(out, torch.full((each, width), float(world)))
            times[way][rank] = clock.now_s
            engine.close()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(240)
    by_rows = overlapped_scatter_seconds(world, gemm_s, ratio, subchunks)
    shares = [(right - left) / width for left, right in panels(width, subchunks, world)]
    by_columns = overlapped_columns_seconds(world, gemm_s, ratio, shares)
    assert times["rows"] == pytest.approx([by_rows] * world, rel=1e-9)
    assert max(times["columns"]) == pytest.approx(by_columns, rel=1e-9)
    by_panels = overlapped_columns_seconds(world, gemm_s, ratio, shares, whole=True)
    assert times["panels"] == pytest.approx([by_panels] * world, rel=1e-9)
    assert times["sequential"] == pytest.approx([gemm_s + ratio] * world, rel=1e-9)


@pytest.mark.parametrize("world", [2, 3])
def test_a_plan_and_its_schedule_are_the_same_exchange(world):
    """What is simulated is what the engine does: products and sends, in order."""
    plans = [ChunkPlan(rank, chunk_rows(13, world), 2) for rank in range(world)]
    schedule = plans[0].schedule(4, 6)
    for rank, plan in enumerate(plans):
        actions = [action for r, _, _, action in schedule.actions() if r == rank]
        made = [(a.writes[0].start, a.writes[0].stop) for a in actions if isinstance(a, Compute) and a.op == "gemm"]
        sent = [(a.to, a.reads[0].start, a.reads[0].stop) for a in actions if isinstance(a, Send)]
        assert made == [(piece.low, piece.high) for piece in plan.scatter_order]
        rules = OutputMap.reduce_scatter(plan).rules
        assert sent == [(rule.dst, rule.piece.low, rule.piece.high) for rule in rules]


def _through_a_slow_link(rank: int, world: int) -> tuple[float, float]:
    """4 × 100 bytes at 4000 bytes/s, one way: never earlier than 0.1 s. When it began and ended."""
    engine = OverlapEngine(link=LinkModel(4000.0))
    began_s = time.monotonic()
    out = engine.reduce_scatter(engine.plan((4, 4), 2), lambda low, high: None, torch.ones(8, 25))
    ended_s = time.monotonic()
    engine.close()
    assert torch.equal(out, torch.full((4, 25), 2.0))
    return began_s, ended_s


def test_a_slow_link_is_never_early(ranks):
    times = ranks(2, _through_a_slow_link)
    first_s = min(began_s for began_s, _ in times)  # one clock: a rank that came late may itself wait for less
    assert min(ended_s for _, ended_s in times) >= first_s + 0.1


def _traced(rank: int, world: int, folder: str) -> None:
    path, made = Path(f"{folder}/{rank}.json"), 0

    def product(low: int, high: int) -> None:
        """The last ends after the first send has begun, or after a minute if that waits for all products."""
        nonlocal made
        made += 1
        deadline_s = time.monotonic() + 60
        while made == 4 and '"name":"send' not in path.read_text().replace(" ", "") and time.monotonic() < deadline_s:
            time.sleep(0.01)

    with Trace(path, rank) as trace:
        engine = OverlapEngine(trace=trace)
        engine.reduce_scatter(engine.plan((4, 4), 2), product, torch.ones(8, 4))
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
    engine = OverlapEngine()
    if rank == 1:
        dist.barrier()  # alive until rank 0 has its answer, but never comes
        return ""
    engine.timeout_s = 1.0
    plan = engine.plan((2, 2))
    with pytest.raises(PeerLost) as caught:
        engine.reduce_scatter(plan, lambda low, high: None, torch.ones(4, 1))
    with pytest.raises(UndertowError, match="failed before"):
        engine.reduce_scatter(plan, lambda low, high: None, torch.ones(4, 1))
    dist.barrier()
    return str(caught.value)


def test_a_rank_that_does_not_come_is_named_with_its_chunk(ranks):
    message = ranks(2, _lonely)[0]
    assert "rank 0: chunk 0 part 0 (rows 0–2) did not come from rank 1" in message


def _killed(rank: int, store: str, pipe: Any) -> None:
    """Rank 1 kills itself within its second call; rank 0 reports what it is told."""
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=600)
    )
    engine = OverlapEngine(timeout_s=600)
    plan, calls = engine.plan((4, 4), 2), 0

    def product(low: int, high: int) -> None:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 6:  # its second piece of the second call
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        for _ in range(2):
            engine.reduce_scatter(plan, product, torch.ones(8, 3))
    except PeerLost as error:
        pipe.send(str(error))
    os._exit(0)


def test_a_rank_that_is_killed_is_named_with_its_chunk(tmp_path):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    processes = [context.Process(target=_killed, args=(rank, str(tmp_path / "store"), theirs)) for rank in (0, 1)]
    for process in processes:
        process.start()
    try:
        assert ours.poll(240), "told by the connection, not by the time-out"
        message = ours.recv()
    finally:
        for process in processes:
            process.join(60)
            if process.is_alive():
                process.kill()
    assert processes[1].exitcode == -signal.SIGKILL
    assert message.startswith("rank 0: chunk ") and ("from rank 1" in message or "by rank 1" in message)
