"""Rendezvous: live ranks agree on one prefix whatever dead attempts left in the store."""

from __future__ import annotations

import json
import random
import threading
import time

import pytest
import torch.distributed as dist

from undertow.dist.errors import PeerLost
from undertow.dist.rendezvous import agree


def attempt(store: dist.Store, world: int, delays_s: list[float], timeout_s: float = 240.0) -> list:
    """One attempt, a thread per rank; the prefix each rank got (read through a key set by rank 0), or its error."""
    results: list = [None] * world

    def run(rank: int) -> None:
        time.sleep(delays_s[rank])
        try:
            mine = agree(store, rank, world, timeout_s=timeout_s)
            mine.set(f"rank{rank}", b"here")
            mine.wait([f"rank{other}" for other in range(world)])
            results[rank] = mine.add("sum", 1) <= world
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def epoch(store: dist.Store) -> str:
    return store.get("undertow/epoch").decode()


@pytest.mark.parametrize("world", [1, 2, 5])
def test_attempts_in_one_store_do_not_meet(world, seed):
    store = dist.HashStore()
    epochs = set()
    for _ in range(6):
        delays_s = [random.choice([0.0, 0.0, 0.01, 0.03]) for _ in range(world)]
        assert attempt(store, world, delays_s) == [True] * world
        epochs.add(epoch(store))
    assert len(epochs) == 6  # `sum` started at zero each time, too


def test_followers_who_meet_a_complete_dead_attempt_wait_for_the_new_rank_0():
    store = dist.HashStore()
    assert attempt(store, 3, [0, 0, 0]) == [True] * 3
    dead = epoch(store)
    assert attempt(store, 3, [0.2, 0, 0]) == [True] * 3  # ranks 1 and 2 read the dead epoch first
    assert epoch(store) != dead


def test_an_attempt_that_died_half_way_does_no_harm():
    store = dist.HashStore()
    store.set("undertow/epoch", "dead")  # rank 0 died while it waited
    store.set("undertow/dead/answer/1", "old")
    assert attempt(store, 2, [0.1, 0]) == [True, True]
    store.set("undertow/epoch", "dead2")  # rank 0 died after it admitted a rank 1 that is dead, too
    store.set("undertow/dead2/all", json.dumps(["", "old"]))
    assert attempt(store, 2, [0.1, 0]) == [True, True]


def test_missing_ranks_are_named():
    store = dist.HashStore()
    with pytest.raises(PeerLost, match=r"2 of 3 ranks did not arrive within 0.05 s: rank 1, 2;"):
        agree(store, 0, 3, timeout_s=0.05)
    with pytest.raises(PeerLost, match=r"1 of 40 ranks|39 of 40 ranks .* 16, …"):
        agree(store, 0, 40, timeout_s=0.05)
    with pytest.raises(PeerLost, match="rank 1 was not admitted by rank 0"):
        agree(store, 1, 2, timeout_s=0.05)
