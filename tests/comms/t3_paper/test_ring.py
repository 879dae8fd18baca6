"""The event-driven ring: against algebra, against a hand-worked timeline, one GPU for all against all of them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from undertow.comms.t3_paper import closed_form, collectives
from undertow.comms.t3_paper.gemm import Gemm, sliced_gemm
from undertow.comms.t3_paper.hardware import Hardware
from undertow.comms.t3_paper.memory import Policy
from undertow.comms.t3_paper.ring import fuse, reduce_scatter_alone
from undertow.comms.t3_paper.workloads import SubLayer, paper_rows
from undertow.dist.errors import UserError

GPU = Hardware()
# Memory so fast that only stages and links take time. Rounding: 1e18 bytes/s leave less than 1e-9 of any time here.
INSTANT = replace(GPU, dram_bytes_per_s=1e18, link_latency_s=0.0)
SHAPES = list({(row.tp, row.M, row.N, row.K): row for row in paper_rows()}.values())


def stages(count: int, compute_s: float, output_bytes: float, tiles_per_stage: int = 8) -> Gemm:
    return Gemm(count * tiles_per_stage, tiles_per_stage, compute_s, 0.0, 0.0, output_bytes)


def random_row(rng: random.Random) -> SubLayer:
    tp = rng.choice([2, 3, 4, 8, 16, 32])
    return SubLayer("any", tp, "any", rng.randint(500, 8000), rng.randint(500, 8000), rng.randint(64, 2000))


@pytest.mark.parametrize(
    "compute_s, gemm_s, reduced_s",
    [
        # Four chunks, one stage each; a chunk takes the link 1 s. Chunk 0 leaves when stage 0 ends, chunk k when stage
        # k ends and the link is free; three chunks leave. The link waits for the stages, or they for the link.
        (2.0, 8.0, 7.0),  # chunk 2 is made at 6 and arrives at 7
        (1.0, 4.0, 4.0),
        (0.5, 2.0, 3.5),  # the link is busy from 0.5 on
    ],
)
def test_hand_worked_timeline_of_one_stage_per_chunk(compute_s, gemm_s, reduced_s):
    run = fuse(stages(4, compute_s, 4 * 75e9), 4, INSTANT, Policy.SHARED)
    assert (run.gemm_s, run.reduced_s) == pytest.approx((gemm_s, max(reduced_s, gemm_s)))
    assert run.first_send_s == pytest.approx(compute_s)


@pytest.mark.parametrize("ratio", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("world, subchunks", [(2, 1), (4, 1), (4, 4), (8, 2)])
def test_staggered_schedule_against_the_coarse_closed_form(world, subchunks, ratio):
    """max(g, g / (W · T) + rs): what the running threads were compared with (docs/overlap.md), plus the last piece.

    When stages and link take equally long the last sub-chunk leaves at g · (W - 1) / W and arrives in time; where the
    GEMM limits, g alone counts.
    """
    stage_s = 1.0
    link_s = ratio * stage_s  # of one stage's bytes
    run = fuse(stages(world * subchunks, stage_s, world * subchunks * link_s * 75e9), world, INSTANT, Policy.SHARED)
    gemm_s, scatter_s = world * subchunks * stage_s, (world - 1) * subchunks * link_s
    last_s = (world - 1) * subchunks * stage_s + link_s
    assert run.seconds == pytest.approx(max(gemm_s, stage_s + scatter_s, last_s))


@pytest.mark.parametrize("row", SHAPES, ids=lambda row: row.name)
def test_without_contention_the_events_give_the_closed_form(row):
    """Within 0.2 %: the closed form leaves out the last piece's read and update, 8 tiles in thousands."""
    gemm = sliced_gemm(row, GPU, outputs_bypass=True)
    events = fuse(gemm, row.tp, GPU, Policy.FREE).seconds
    assert events == pytest.approx(closed_form.fused_s(gemm, row.tp, GPU), rel=2e-3)


def test_without_contention_and_with_instant_memory_only_whole_pieces_differ(seed):
    """A piece whose tiles end in two stages waits for the second, so the events may be late by one piece's transfer."""
    rng = random.Random(seed)
    for _ in range(20):
        row, hw = random_row(rng), replace(INSTANT, link_bytes_per_s=10 ** rng.uniform(10, 12))
        gemm = sliced_gemm(row, hw, outputs_bypass=True)
        piece_s = 1.5 * hw.piece_tiles * gemm.tile_bytes / hw.link_bytes_per_s  # a piece is up to 1.5 x piece_tiles
        late_s = fuse(gemm, row.tp, hw, Policy.FREE).seconds - closed_form.fused_s(gemm, row.tp, hw)
        assert -1e-12 <= late_s <= piece_s, (row, hw)


@pytest.mark.parametrize("policy", [Policy.SHARED, Policy.MCA])
def test_every_byte_is_sent_read_and_added_once(policy, seed):
    """Exact but for the rounding of a few thousand float additions."""
    rng = random.Random(seed)
    for _ in range(10):
        row = random_row(rng)
        gemm = sliced_gemm(row, GPU, outputs_bypass=True)
        run = fuse(gemm, row.tp, GPU, policy)
        chunk = gemm.output_bytes / row.tp
        moved = closed_form.traffic_bytes("t3", chunk, row.tp, gemm.reads_bytes)
        served = {**run.served_bytes}
        served["rs_writes"] = served.pop("rs_updates")
        assert run.sent_bytes == pytest.approx((row.tp - 1) * chunk, rel=1e-9)
        for kind, nbytes in served.items():
            assert nbytes == pytest.approx(moved[kind], rel=1e-9, abs=1e-3), (row, kind)


@pytest.mark.parametrize("policy", [Policy.SHARED, Policy.MCA])
def test_one_gpu_stands_for_all_of_an_equal_ring(policy):
    row = SubLayer("any", 4, "any", 2048, 1536, 300)
    gemm = sliced_gemm(row, GPU, outputs_bypass=True)
    one, all_four = fuse(gemm, 4, GPU, policy), fuse(gemm, 4, GPU, policy, gpus=4)
    assert all_four.seconds == pytest.approx(one.seconds, rel=1e-9)
    assert all_four.sent_bytes == pytest.approx(one.sent_bytes, rel=1e-9)


def test_one_slow_link_slows_the_ring_no_more_than_if_all_were_slow():
    row = SubLayer("any", 4, "any", 2048, 1536, 300)
    gemm = sliced_gemm(row, GPU, outputs_bypass=True)
    fast, slow = 75e9, 25e9
    times = [
        fuse(gemm, 4, GPU, Policy.MCA, gpus=4, links_bytes_per_s=links).seconds
        for links in ([fast] * 4, [fast, slow, fast, fast], [slow] * 4)
    ]
    assert times[0] < times[1] <= times[2]
    # The slow link carries three of the four chunks, whoever waits for them.
    assert times[1] >= 3 * gemm.output_bytes / 4 / slow


def test_the_first_send_starts_before_the_last_stage():
    row = SHAPES[0]
    gemm = sliced_gemm(row, GPU, outputs_bypass=True)
    run = fuse(gemm, row.tp, GPU, Policy.MCA, traced=True)
    begun = [span.begin_s for span in run.spans if span.lane == "compute"]
    assert len(begun) == gemm.stages
    assert run.first_send_s == pytest.approx(begun[1]) and run.first_send_s < begun[-1]
    links = [span for span in run.spans if span.lane == "link"]
    assert all(a.end_s <= b.begin_s * (1 + 1e-12) for a, b in zip(links, links[1:])), "one transfer at a time"
    assert sum(nbytes for _, _, _, nbytes in run.trace) == pytest.approx(sum(run.served_bytes.values()))


def test_halving_the_pieces_changes_less_than_one_percent():
    """The granularity of the simulation is no hidden constant."""
    for row in SHAPES[:6]:
        gemm = sliced_gemm(row, GPU, outputs_bypass=True)
        for policy in (Policy.SHARED, Policy.MCA):
            coarse, fine = (fuse(gemm, row.tp, replace(GPU, piece_tiles=n), policy).seconds for n in (8, 4))
            assert fine == pytest.approx(coarse, rel=0.01), (row.name, policy)


@pytest.mark.parametrize("world", [2, 3, 8, 32])
def test_collectives_alone_take_what_the_algebra_says(world):
    chunk = 1e7
    scatter, gather = collectives.reduce_scatter(chunk, world, GPU), collectives.all_gather(chunk, world, GPU)
    assert scatter.seconds == pytest.approx(closed_form.reduce_scatter_s(chunk, world, GPU), rel=1e-12)
    assert gather.seconds == pytest.approx(closed_form.all_gather_s(chunk, world, GPU), rel=1e-12)
    moved = closed_form.traffic_bytes("sequential", chunk, world, 0.0)
    assert scatter.moved_bytes == pytest.approx({"reads": moved["rs_reads"], "writes": moved["rs_writes"]})
    assert gather.moved_bytes == pytest.approx({"reads": moved["ag_reads"], "writes": moved["ag_writes"]})


def test_reduce_scatter_with_nmc_alone_keeps_the_link_busy():
    gemm = sliced_gemm(SHAPES[0], GPU, outputs_bypass=True)
    run = reduce_scatter_alone(gemm, 8, INSTANT)
    assert run.reduced_s == pytest.approx(7 * gemm.output_bytes / 8 / 75e9, rel=1e-9)
    assert run.sent_bytes == pytest.approx(gemm.output_bytes * 7 / 8)


@pytest.mark.parametrize("world, gpus, links", [(1, 1, ()), (4, 2, ()), (4, 4, (1e9,))])
def test_a_ring_that_cannot_be_is_refused(world, gpus, links):
    with pytest.raises(UserError, match="world >= 2"):
        fuse(stages(4, 1.0, 1e6), world, GPU, Policy.MCA, gpus=gpus, links_bytes_per_s=links)
