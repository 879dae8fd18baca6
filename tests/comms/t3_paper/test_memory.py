"""The DRAM server against hand-worked timelines; 1 GB/s, so that a byte takes a nanosecond."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from undertow.comms.t3_paper.clock import Clock
from undertow.comms.t3_paper.hardware import Hardware
from undertow.comms.t3_paper.memory import Memory, Policy, Stream

GPU = replace(Hardware(), dram_bytes_per_s=1e9, unarbitrated_share=0.5, mca_share=0.2, interference=4.0)


def finish_times(policy: Policy, requests: list[tuple[float, Stream, float, float]]) -> list[float]:
    """Nanoseconds at which each of (submitted ns, stream, bytes, cost) is served."""
    clock, ends = Clock(), [0.0] * len(requests)
    memory = Memory(clock, GPU, policy)

    def end(i: int) -> None:
        ends[i] = clock.now_s * 1e9

    for i, (at_ns, stream, nbytes, cost) in enumerate(requests):
        clock.after(
            at_ns * 1e-9,
            lambda i=i, stream=stream, nbytes=nbytes, cost=cost: memory.submit(
                stream, "x", nbytes, lambda: end(i), cost=cost
            ),
        )
    clock.run()
    assert memory.served_bytes["x"] == sum(nbytes for _, _, nbytes, _ in requests)
    return ends


C, M = Stream.COMPUTE, Stream.COMMUNICATION


@pytest.mark.parametrize("policy", list(Policy))
def test_a_stream_alone_has_the_whole_bandwidth_and_is_served_in_order(policy):
    assert finish_times(policy, [(0, M, 100, 1), (0, M, 50, 2), (500, M, 10, 1)]) == pytest.approx([100, 200, 510])


def test_free_serves_both_at_once():
    assert finish_times(Policy.FREE, [(0, C, 100, 1), (0, M, 60, 1)]) == pytest.approx([100, 60])


def test_shared_halves_the_time_and_pays_for_the_mixture():
    # Both wait: compute gets 0.5 bytes/ns, communication 0.5 / 4. The 10 bytes take 80 ns, in which compute does 40 of
    # its 100; the other 60 it does alone.
    assert finish_times(Policy.SHARED, [(0, C, 100, 1), (0, M, 10, 1)]) == pytest.approx([140, 80])


def test_mca_leaves_communication_its_starvation_share():
    # Compute gets 0.8 bytes/ns and ends after 125 ns; by then communication did 125 * 0.2 / 4 = 6.25 of its 10 bytes.
    assert finish_times(Policy.MCA, [(0, C, 100, 1), (0, M, 10, 1)]) == pytest.approx([125, 128.75])


def test_a_request_that_comes_later_changes_the_rates_from_then_on():
    # 50 ns alone, then shared: the 10 bytes take 80 ns to 130, compute does 40 more by then and the last 10 alone.
    assert finish_times(Policy.SHARED, [(0, C, 100, 1), (50, M, 10, 1)]) == pytest.approx([140, 130])


def test_work_is_conserved_whatever_the_order(seed):
    """Without interference the server is never idle while something waits: the last end is known in advance."""
    rng = random.Random(seed)
    for _ in range(50):
        requests = [(0.0, rng.choice([C, M]), rng.uniform(1, 100), rng.choice([1.0, 2.0])) for _ in range(20)]
        work = sum(nbytes * cost for _, _, nbytes, cost in requests)
        plain = replace(GPU, interference=1.0)
        clock = Clock()
        memory = Memory(clock, plain, rng.choice([Policy.SHARED, Policy.MCA]))
        for _, stream, nbytes, cost in requests:
            memory.submit(stream, "x", nbytes, lambda: None, cost=cost)
        clock.run()
        # Each of the 20 ends is rounded to a thousandth of a byte at most.
        assert clock.now_s * 1e9 == pytest.approx(work, abs=0.02)
