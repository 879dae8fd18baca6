"""The clock: the measured offset is within its own error bound, whatever the delays."""

from __future__ import annotations

import random
import time

import torch.distributed as dist

from undertow.dist import clock


def shifted(rank: int, world: int, seed: int) -> tuple[float, float, float, tuple[float, float]]:
    """Rank r's clock is r seconds ahead, its answers are delayed at random; the measured clock, and the epoch within
    bounds that hold however long the process was not scheduled."""
    rng = random.Random(seed + rank)

    def now_ns() -> int:
        if rank == 0 and rng.random() < 0.5:
            time.sleep(rng.random() * 2e-3)  # an unequal way
        return time.monotonic_ns() + rank * 10**9

    def epoch_bounds() -> tuple[float, float]:
        before_ns, wall_s, after_ns = now_ns(), time.time(), now_ns()
        return wall_s - after_ns / 1e9, wall_s - before_ns / 1e9

    measured = clock.measure(rounds=12, now_ns=now_ns, identity=f"kernel {rank}")
    bounds = [epoch_bounds() for _ in range(50)]
    return measured.offset_s, measured.error_s, measured.to_wall_s, min(bounds, key=lambda pair: pair[1] - pair[0])


def test_offsets_are_within_their_bounds(ranks, seed):
    results = ranks(3, shifted, seed)
    for rank, (offset_s, error_s, to_wall_s, (low_s, high_s)) in enumerate(results):
        assert abs(offset_s + rank) <= error_s + 1e-6  # microsecond: rounding of float64 seconds
        slack_s = error_s + 0.2  # ranks are a second apart; the wall clock itself may be adjusted meanwhile
        assert low_s - slack_s <= to_wall_s <= high_s + slack_s
    assert results[0][:2] == (0.0, 0.0)


def shared(rank: int, world: int) -> clock.Clock:
    return clock.measure()


def test_one_kernel_has_one_clock(ranks):
    measured = ranks(3, shared)
    assert {(c.offset_s, c.error_s) for c in measured} == {(0.0, 0.0)}
    assert len({c.epoch_s for c in measured}) == 1
    assert abs(measured[0].to_wall_s + clock.now_s() - time.time()) < 60  # and not the years from the boot to the epoch


def in_subgroup(rank: int, world: int) -> tuple[float, float] | None:
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    found = clock.measure(group, now_ns=lambda: time.monotonic_ns() + rank * 10**9, identity=str(rank))
    return found.offset_s, found.error_s


def test_a_subgroup_measures_against_its_own_first_rank(ranks):
    offsets = ranks(3, in_subgroup)
    assert offsets[1] == (0.0, 0.0) and abs(offsets[2][0] + 1) <= offsets[2][1] + 1e-6
