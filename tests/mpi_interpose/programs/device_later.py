"""Nonblocking collectives and Isendrecv on device memory, against the same calls on host memory, which pass through.

Each rule makes its calls on both kinds and compares every byte, gaps included; completion goes through each of MPI's
ways in turn, and datatypes are freed while they are in use.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parent))

from device_buffers import Mine, blank, comm, data, peer, rank, size

WAYS = itertools.cycle(("wait", "test", "waitall", "testall", "waitany", "waitsome", "get_status"))
N = 6
Begin = Callable[[Callable[..., Mine]], tuple[MPI.Request, list[Mine]]]


def finished(request: MPI.Request) -> None:
    way = next(WAYS)
    if way == "test":
        while not request.Test():
            pass
    elif way == "waitall":
        MPI.Request.Waitall([request])
    elif way == "testall":
        while not MPI.Request.Testall([request]):
            pass
    elif way == "waitany":
        assert MPI.Request.Waitany([request]) == 0
    elif way == "waitsome":
        assert MPI.Request.Waitsome([request]) == [0]
    else:
        while way == "get_status" and not request.Get_status():
            pass
        request.Wait()


def alike(name: str, begin: Begin) -> None:
    """`begin` starts the operation on buffers that it makes by its argument; it returns those to be compared."""
    answers = []
    for on in (False, True):
        request, made = begin(lambda values, on=on: Mine(values, on))
        finished(request)
        answers.append([one.read().copy() for one in made])
    assert all(np.array_equal(*pair) for pair in zip(*answers)), (name, *answers)


def few() -> tuple[MPI.Datatype, MPI.Datatype]:
    """N numbers with a gap behind each, from element to element without overlap; and what it is made of."""
    row = MPI.INT.Create_vector(N, 1, 2)
    return row.Create_resized(0, 8 * N).Commit(), row


def of_all(name: str, typed: bool, *extra: Any, on: MPI.Comm = comm, sends: int = 1, receives: int = 1) -> None:
    """A call with one datatype for each side; `sends` and `receives` are the blocks of a side."""

    def begin(mine: Callable[..., Mine]) -> tuple[MPI.Request, list[Mine]]:
        t, row = few()
        given, got = mine(data(rank, 2 * N * sends)), mine(blank(2 * N * receives))
        spec = [1, t] if typed else [2 * N, MPI.INT]
        request = getattr(on, name)([given.mpi(), *spec], [got.mpi(), *spec], *extra)
        t.Free()
        row.Free()
        return request, [given, got]

    alike(name, begin)


def one_datatype_for_each_side() -> None:
    for typed in (True, False):
        for root in range(size):
            of_all("Igather", typed, root, receives=size)
            of_all("Iscatter", typed, root, sends=size)

            def bcast(
                mine: Callable[..., Mine], root: int = root, typed: bool = typed
            ) -> tuple[MPI.Request, list[Mine]]:
                t, row = few()
                both = mine(data(rank, 2 * N))
                request = comm.Ibcast([both.mpi(), *([1, t] if typed else [2 * N, MPI.INT])], root)
                t.Free()
                row.Free()
                return request, [both]

            alike("Ibcast", bcast)
        of_all("Iallgather", typed, receives=size)
        of_all("Ialltoall", typed, sends=size, receives=size)

    def in_place(mine: Callable[..., Mine]) -> tuple[MPI.Request, list[Mine]]:
        both = mine(data(rank, N * size))
        return comm.Iallgather(MPI.IN_PLACE, [both.mpi(), N, MPI.INT]), [both]

    alike("Iallgather in place", in_place)


def counts_and_places() -> None:
    counts, places = [N - r % 3 for r in range(size)], [2 * N * (size - 1 - r) for r in range(size)]
    whole = 2 * N * size

    def vectors(name: str, make: Callable[[Mine, Mine], tuple]) -> None:
        def begin(mine: Callable[..., Mine]) -> tuple[MPI.Request, list[Mine]]:
            given, got = mine(data(rank, whole)), mine(blank(whole))
            return getattr(comm, name)(*make(given, got)), [given, got]

        alike(name, begin)

    def many(buffer: Mine) -> list:
        return [buffer.mpi(), counts, places, MPI.INT]

    def own(buffer: Mine) -> list:
        return [buffer.mpi(), counts[rank], MPI.INT]

    for root in range(size):
        vectors("Igatherv", lambda given, got, root=root: (own(given), many(got), root))
        vectors("Iscatterv", lambda given, got, root=root: (many(given), own(got), root))
        vectors("Igatherv", lambda _, got, root=root: (MPI.IN_PLACE if rank == root else own(got), many(got), root))
    vectors("Iallgatherv", lambda given, got: (own(given), many(got)))
    vectors("Iallgatherv", lambda _, got: (MPI.IN_PLACE, many(got)))
    alike_counts = [N] * size
    vectors("Ialltoallv", lambda given, got: ([given.mpi(), alike_counts, places, MPI.INT],
                                              [got.mpi(), alike_counts, places[::-1], MPI.INT]))  # fmt: skip
    column = MPI.INT.Create_vector(N, 1, size).Commit()
    vectors("Ialltoallw", lambda given, got: (
        [given.mpi(), [1] * size, [4 * r for r in range(size)], [column] * size],
        [got.mpi(), alike_counts, [4 * place for place in places], [MPI.INT] * size],
    ))  # fmt: skip
    column.Free()


def neighbours() -> None:
    """On a line, whose ends have a neighbour that is none: its block stays as it is."""
    for periodic in (True, False):
        line = comm.Create_cart([size], [periodic])
        counts, places = [N, N], [0, 3 * N]
        of_all("Ineighbor_allgather", True, on=line, receives=2)
        of_all("Ineighbor_alltoall", False, on=line, sends=2, receives=2)
        byte_places = [4 * place for place in places]
        for name, sends, receives in (
            ("Ineighbor_allgatherv", [N, MPI.INT], [counts, places, MPI.INT]),
            ("Ineighbor_alltoallv", [counts, places, MPI.INT], [counts, places, MPI.INT]),
            ("Ineighbor_alltoallw", [counts, byte_places, [MPI.INT] * 2], [counts, byte_places, [MPI.INT] * 2]),
        ):
            call = getattr(line, name)

            def begin(
                mine: Callable[..., Mine],
                start: Callable[..., MPI.Request] = call,
                sends: list = sends,
                receives: list = receives,
            ) -> tuple[MPI.Request, list[Mine]]:
                given, got = mine(data(rank, 5 * N)), mine(blank(5 * N))
                return start([given.mpi(), *sends], [got.mpi(), *receives]), [given, got]

            alike(name, begin)
        line.Free()


def reductions_later() -> None:
    def reduction(name: str, make: Callable[[Mine, Mine], tuple]) -> None:
        def begin(mine: Callable[..., Mine]) -> tuple[MPI.Request, list[Mine]]:
            given = mine(np.arange(N * size, dtype="d") * (rank + 1))
            got = mine(np.arange(N * size, dtype="d") - 5 * rank)
            return getattr(comm, name)(*make(given, got)), [given, got]

        alike(name, begin)

    def whole(buffer: Mine) -> list:
        return [buffer.mpi(), N * size, MPI.DOUBLE]

    def part(buffer: Mine) -> list:
        return [buffer.mpi(), N, MPI.DOUBLE]

    for name in ("Iallreduce", "Iscan", "Iexscan"):
        reduction(name, lambda given, got: (whole(given), whole(got)))
        reduction(name, lambda _, got: (MPI.IN_PLACE, whole(got)))
    for root in range(size):
        reduction("Ireduce", lambda given, got, root=root: (whole(given), whole(got), MPI.SUM, root))
        reduction("Ireduce", lambda given, got, root=root: (
            MPI.IN_PLACE if rank == root else whole(given), whole(got), MPI.SUM, root
        ))  # fmt: skip
    reduction("Ireduce_scatter_block", lambda given, got: (part(given), part(got)))
    reduction("Ireduce_scatter", lambda given, got: (whole(given), part(got), [N] * size))
    reduction("Ireduce_scatter", lambda _, got: (MPI.IN_PLACE, whole(got), [N] * size))


def both_ways_later() -> None:
    """Isendrecv, with a receive longer than what arrives, and its replace form; libraries before MPI 4 lack them."""
    try:
        comm.Isendrecv([None, 0, MPI.INT], MPI.PROC_NULL, 0, [None, 0, MPI.INT], MPI.PROC_NULL, 0).Wait()
    except NotImplementedError:
        return
    t, row = few()
    for count in (3, 2):

        def begin(mine: Callable[..., Mine], count: int = count) -> tuple[MPI.Request, list[Mine]]:
            given, got = mine(data(rank, 6 * N)), mine(blank(6 * N))
            return comm.Isendrecv([given.mpi(), count, t], peer, 3, [got.mpi(), 3, t], peer, 3), [given, got]

        alike("Isendrecv", begin)
        both, want = Mine(data(rank, 6 * N)), data(rank, 6 * N)  # MPICH's own on host memory fills the gaps with bytes
        finished(comm.Isendrecv_replace([both.mpi(), count, t], peer, 4, peer, 4))
        want[: 2 * N * count : 2] = data(peer, 6 * N)[: 2 * N * count : 2]
        assert np.array_equal(both.read(), want), count
    t.Free()
    row.Free()


def several_at_once() -> None:
    """Requests of both kinds, on both kinds of memory, in one Waitall."""
    requests, buffers = [], []
    for k in range(5):
        both = Mine(np.full(50, rank + k, "i"), on=k % 2 == 0)
        requests.append(comm.Iallreduce(MPI.IN_PLACE, [both.mpi(), 50, MPI.INT]))
        buffers.append(both)
    got, mine = Mine(blank(50)), Mine(data(rank, 50))
    requests += [comm.Irecv([got.mpi(), 50, MPI.INT], peer, 8), comm.Isend([mine.mpi(), 50, MPI.INT], peer, 8)]
    MPI.Request.Waitall(requests)
    for k, both in enumerate(buffers):
        assert (both.read() == sum(r + k for r in range(size))).all(), k
    assert np.array_equal(got.read(), data(peer, 50))


RULES = [
    one_datatype_for_each_side, counts_and_places, neighbours, reductions_later, both_ways_later, several_at_once,
]  # fmt: skip
