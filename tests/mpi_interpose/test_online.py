"""The running comparison of two paths, given samples instead of a clock: what is taken, timed, given up and begun."""

from __future__ import annotations

import numpy as np
import pytest
from decisions import Online

OURS, TIMED = 0, 1


def share(calls: tuple[np.ndarray, np.ndarray], which: int) -> float:
    return float(calls[which].mean())


@pytest.mark.parametrize("message", [False, True])
def test_a_path_that_loses_is_given_up_and_begun_again_when_it_wins(message: bool) -> None:
    online = Online(message, 2.0)
    soon = 192 if message else 96  # three pairs, of four times each and of two, one in 16 calls
    first = online.call(soon - 16, library_ns=1000, ours_ns=3000)
    assert share(first, OURS) > 0.9 and online.takes()  # too few samples yet
    online.call(16, library_ns=1000, ours_ns=3000)
    assert not online.takes()
    later = online.call(640, library_ns=1000, ours_ns=3000)
    assert share(later, OURS) <= 1 / 64  # only what is timed
    online.call(40000, library_ns=1000, ours_ns=300)
    assert online.takes()
    assert share(online.call(640, library_ns=1000, ours_ns=300), OURS) >= 63 / 64


@pytest.mark.parametrize("message", [False, True])
def test_while_samples_agree_they_become_rare(message: bool) -> None:
    online = Online(message, 2.0)
    early = online.call(64, library_ns=1000, ours_ns=500)
    assert share(early, TIMED) <= 2 / 16 and share(early, OURS) >= 15 / 16
    assert share(online.call(1000, library_ns=1000, ours_ns=500), TIMED) <= 2 / 60
    late = online.call(100_000, library_ns=1000, ours_ns=500)
    assert online.takes() and float(late[TIMED][50_000:].mean()) <= 2 / 2000


def test_a_message_never_begins_where_the_table_does_not() -> None:
    for table in (-1.0, 0.9, 1.0):
        calls = Online(True, table).call(10_000, library_ns=1000, ours_ns=10)
        assert share(calls, OURS) == share(calls, TIMED) == 0
    local = Online(False, -1.0)  # MPI_Pack may find out for itself
    local.call(2000, library_ns=1000, ours_ns=10)
    assert local.takes()


def test_one_interrupted_call_decides_nothing() -> None:
    online = Online(True, 2.0)
    online.call(6400, library_ns=1000, ours_ns=500)
    for _ in range(3):
        online.call(64, library_ns=1000, ours_ns=5_000_000)
        online.call(20_000, library_ns=1000, ours_ns=500)
        assert online.takes()


def test_the_paths_are_timed_now_one_first_now_the_other() -> None:
    ours, timed = Online(False, 2.0).call(128, library_ns=1000, ours_ns=1000)
    paths = ours[timed].tolist()
    assert paths[:2] == [1, 0] and paths[2:4] == [0, 1] and abs(2 * sum(paths) - len(paths)) <= 1


@pytest.mark.parametrize("period", [2, 3, 32, 64])
def test_calls_that_differ_in_turn_meet_both_paths(period: int) -> None:
    # Every other spell of `period` calls takes ten times as long, by either path alike: no reason to begin.
    slow = np.arange(100_000) // period % 2
    ns = np.repeat((1000 + 9000 * slow)[:, None], 2, axis=1)
    online = Online(False, -1.0)
    online.series(ns)
    assert not online.takes()
