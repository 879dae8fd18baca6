"""The core's trials and running comparisons on a machine that a test makes up: times in, decisions out."""

from __future__ import annotations

import ctypes

import numpy as np

from undertow.mpi_interpose import core

LIBRARY, TABLED, ALL = 0, 1, 2  # the ways of a round


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


class Trial:
    """One trial of the core; `tables`: the table takes some of the messages."""

    def __init__(self, tables: bool = True) -> None:
        self._lib = core.load()
        self._lib.undertow_core_trial.restype = ctypes.c_void_p
        self._at, self._tables = ctypes.c_void_p(self._lib.undertow_core_trial()), int(tables)

    def __del__(self) -> None:
        self._lib.undertow_core_trial_free(self._at)

    def series(self, ns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(way, timed) of each round; `ns` has a row for each round, what it takes in each of the three ways."""
        ns = np.ascontiguousarray(ns, np.int64)
        seen = np.zeros(len(ns), np.uint8)
        self._lib.undertow_core_trial_series(
            self._at, self._tables, ctypes.c_int64(len(ns)), _pointer(ns), _pointer(seen)
        )
        return seen & 3, seen >> 2 > 0

    def run(self, times: int, ns: tuple[int, int, int], first_ns: int = 0) -> list[tuple[int, bool]]:
        """The same where nothing varies, but the first round after a change of way takes `first_ns` longer."""
        seen: list[tuple[int, bool]] = []
        for _ in range(times):
            last = seen[-1][0] if seen else -1
            way, timed = self.series(np.array([[t + first_ns * (w != last) for w, t in enumerate(ns)]]))
            seen.append((int(way[0]), bool(timed[0])))
        return seen

    def forget(self) -> None:
        self._lib.undertow_core_trial_forget(self._at)

    def put_off(self, rounds: int) -> None:
        self._lib.undertow_core_trial_put_off(self._at, rounds)


class Online:
    """One running comparison of the core; `table`: what the table says of this use and size."""

    def __init__(self, message: bool, table: float) -> None:
        self._lib = core.load()
        self._lib.undertow_core_online.restype = ctypes.c_void_p
        self._at = ctypes.c_void_p(self._lib.undertow_core_online())
        self._message, self._gain, self._takes = int(message), ctypes.c_double(table), int(table >= 1.08)

    def __del__(self) -> None:
        self._lib.undertow_core_online_free(self._at)

    def series(self, ns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ours, timed) of each call; `ns` has a row for each call, what it takes by the library and by us."""
        ns = np.ascontiguousarray(ns, np.int64)
        seen = np.zeros(len(ns), np.uint8)
        self._lib.undertow_core_online_series(
            self._at,
            self._message,
            self._gain,
            self._takes,
            ctypes.c_int64(4096),
            ctypes.c_int64(len(ns)),
            _pointer(ns),
            _pointer(seen),
        )
        return seen & 1, seen >> 2 > 0

    def call(self, times: int, library_ns: int, ours_ns: int) -> tuple[np.ndarray, np.ndarray]:
        """The same where nothing varies."""
        return self.series(np.full((times, 2), (library_ns, ours_ns)))

    def takes(self) -> bool:
        return bool(self._lib.undertow_core_online_takes(self._at, self._takes))


NOISES = ("normal", "waits", "slices", "spells")


def noise(kind: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """What multiplies `n` times that follow one another.

    normal: 10 % either way; waits: exponential, 30 % more in the mean; slices: a fifth are hundredfold, because another
    program had the core; spells: periods of some 15 in which all is slower, between some 40 in which it is not.
    """
    if kind == "normal":
        return np.maximum(0.3, 1 + 0.1 * rng.standard_normal(n))
    if kind == "waits":
        return 1 + rng.exponential(0.3, n)
    if kind == "slices":
        return 1 + rng.exponential(0.1, n) + np.where(rng.random(n) < 0.2, rng.exponential(100, n), 0)
    assert kind == "spells"
    slower, at = np.zeros(n), 0
    while at < n:
        start = at + 1 + int(rng.exponential(40))
        at = start + 1 + int(rng.exponential(15))
        slower[start:at] = rng.uniform(0.2, 3)
    return 1 + slower + rng.exponential(0.1, n)
