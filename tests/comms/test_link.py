"""The emulated link: arithmetic that can be stated exactly, and real messages that are never early."""

from __future__ import annotations

import time

import pytest
import torch

from undertow.comms import local
from undertow.comms.builders.all_gather import ring_all_gather
from undertow.comms.link import Bucket, LinkModel
from undertow.comms.p2p import P2P


def test_a_bucket_queues_messages_and_forgets_idle_time():
    bucket = Bucket(100.0)
    assert bucket.take(1.0, 50) == 1.5
    assert bucket.take(1.0, 50) == 2.0
    assert bucket.take(9.0, 100) == 10.0
    assert bucket.carried_bytes == 200


def _gather(rank, world, per):
    schedule = ring_all_gather(world, 8, [4])
    x = torch.full((8, 4), float(rank))
    with P2P(timeout_s=240, link=LinkModel(128 / 0.05, 0.01, per)) as executor:
        executor.prepare(schedule)
        start = time.monotonic()
        out = executor.run(schedule, {"x": x})["out"]
        end = time.monotonic()
        transport = executor.link
        assert transport is not None
        return out.tolist(), (start, end), dict(transport.sent_bytes), dict(transport.received_bytes)


@pytest.mark.parametrize("per", ["port", "pair"])
def test_messages_take_at_least_as_long_as_the_link_says(per, ranks):
    world = 3
    schedule = ring_all_gather(world, 8, [4])
    wanted = local.run(schedule, [{"x": torch.full((8, 4), float(r))} for r in range(world)])
    results = ranks(world, _gather, per)
    first_start = min(start for _, (start, _), _, _ in results)  # one machine, one monotonic clock
    for rank, (out, (_, end), sent, received) in enumerate(results):
        assert out == wanted[rank]["out"].tolist()
        assert sent == {(rank + 1) % world: 256} and received == {(rank - 1) % world: 256}
        # Two hops, one after the other, from when the first rank began: one that came late may itself wait for less.
        assert end - first_start >= 2 * (0.05 + 0.01)
