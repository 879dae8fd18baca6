"""The running comparison of two paths, given samples instead of a clock: what is taken, timed, given up and begun."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from undertow.mpi_interpose import core

BYTES = 4096


class Online:
    """One running comparison of the core; `table`: what the table says of this use and size."""

    def __init__(self, message: bool, table: float) -> None:
        self._lib = core.load()
        self._lib.undertow_core_online.restype = ctypes.c_void_p
        self._at = ctypes.c_void_p(self._lib.undertow_core_online())
        self._message, self._gain, self._takes = int(message), ctypes.c_double(table), int(table >= 1.08)

    def call(self, times: int, library_ns: int, ours_ns: int) -> list[tuple[bool, bool]]:
        """(ours, timed) of that many calls on a machine where either path takes that long."""
        seen = []
        for _ in range(times):
            choice = self._lib.undertow_core_online_choose(self._at, self._message, self._gain, self._takes)
            ours, timed = bool(choice & 1), bool(choice & 2)
            seen.append((ours, timed))
            if timed:
                ns = ours_ns if ours else library_ns
                size = ctypes.c_int64(BYTES)
                self._lib.undertow_core_online_observe(
                    self._at, self._message, int(ours), size, ctypes.c_int64(ns), self._takes
                )
        return seen

    def takes(self) -> bool:
        return bool(self._lib.undertow_core_online_takes(self._at, self._takes))

    def free(self) -> None:
        self._lib.undertow_core_online_free(self._at)


@pytest.fixture
def make() -> Iterator:
    made: list[Online] = []

    def one(message: bool, table: float) -> Online:
        made.append(Online(message, table))
        return made[-1]

    yield one
    for online in made:
        online.free()


def share(calls: list[tuple[bool, bool]], which: int) -> float:
    return sum(call[which] for call in calls) / len(calls)


@pytest.mark.parametrize("message", [False, True])
def test_a_path_that_loses_is_given_up_and_begun_again_when_it_wins(make, message: bool) -> None:
    online = make(message, 2.0)
    first = online.call(64, library_ns=1000, ours_ns=3000)
    assert share(first, 0) > 0.95 and online.takes()  # too few samples yet
    online.call(1000, library_ns=1000, ours_ns=3000)
    assert not online.takes()
    later = online.call(640, library_ns=1000, ours_ns=3000)
    assert share(later, 0) <= 1 / 64  # only what is timed
    online.call(40000, library_ns=1000, ours_ns=300)
    assert online.takes()
    assert share(online.call(640, library_ns=1000, ours_ns=300), 0) >= 63 / 64


@pytest.mark.parametrize("message", [False, True])
def test_while_samples_agree_they_become_rare(make, message: bool) -> None:
    online = make(message, 2.0)
    early = online.call(1000, library_ns=1000, ours_ns=500)
    assert share(early, 1) <= 2 / 60
    late = online.call(100_000, library_ns=1000, ours_ns=500)
    assert online.takes() and share(late[50_000:], 1) <= 2 / 2000


def test_a_message_never_begins_where_the_table_does_not(make) -> None:
    for table in (-1.0, 0.9, 1.0):
        assert make(True, table).call(10_000, library_ns=1000, ours_ns=10) == [(False, False)] * 10_000
    local = make(False, -1.0)  # MPI_Pack may find out for itself
    local.call(1000, library_ns=1000, ours_ns=10)
    assert local.takes()


def test_one_interrupted_call_decides_nothing(make) -> None:
    online = make(True, 2.0)
    online.call(6400, library_ns=1000, ours_ns=500)
    for _ in range(3):
        online.call(64, library_ns=1000, ours_ns=5_000_000)
        online.call(20_000, library_ns=1000, ours_ns=500)
        assert online.takes()
