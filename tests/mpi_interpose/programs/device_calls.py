"""The calls that the rules of device_messages leave out: every mode of sending, matched receives, requests that are
tested or freed, the other neighbour collectives, local reductions, intercommunicators. Buffers are device memory.

Each function is one rule, kept by all ranks; device_messages runs them. Together the two programs make every call that
the preload takes, which the test holds against the table of signatures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parent))

from device_buffers import Mine, blank, comm, data, expect, peer, rank, size, strided


def every_mode_of_sending() -> None:
    """Buffered, synchronous and ready sends, blocking, nonblocking and persistent; the receive is there first."""
    t = strided()
    room = MPI.Alloc_mem(1 << 20)
    MPI.Attach_buffer(room)
    for name in ("Send", "Bsend", "Ssend", "Rsend"):
        nonblocking = {"Send": "Isend"}.get(name, f"I{name.lower()}")
        for how in (name, nonblocking, f"{name}_init"):
            got, mine = Mine(blank()), Mine(data(rank))
            request = comm.Irecv([got.mpi(), 1, t], peer, 30)
            comm.Barrier()
            sent: MPI.Request | None = getattr(comm, how)([mine.mpi(), 1, t], peer, 30)
            if isinstance(sent, MPI.Prequest):
                sent.Start()
            if sent:
                sent.Wait()
            request.Wait()
            if isinstance(sent, MPI.Prequest):
                sent.Free()
            assert np.array_equal(got.read(), expect(peer)), how
    MPI.Detach_buffer()
    MPI.Free_mem(room)
    t.Free()


def matched_receives() -> None:
    t = strided()
    for how in ("Recv", "Irecv"):
        got, mine = Mine(blank()), Mine(data(rank))
        sent = comm.Isend([mine.mpi(), 1, t], peer, 31)
        message = comm.Mprobe(peer, 31)
        if how == "Recv":
            message.Recv([got.mpi(), 1, t])
        else:
            message.Irecv([got.mpi(), 1, t]).Wait()
        sent.Wait()
        assert np.array_equal(got.read(), expect(peer)), how
    t.Free()


def requests_tested_and_freed() -> None:
    t, n = strided(), 3
    for how in ("test", "testany", "testsome", "start"):
        got, mine = [Mine(blank()) for _ in range(n)], Mine(data(rank))
        if how == "start":
            requests = [comm.Recv_init([g.mpi(), 1, t], peer, 40 + k) for k, g in enumerate(got)]
            for request in requests:
                request.Start()
        else:
            requests = [comm.Irecv([g.mpi(), 1, t], peer, 40 + k) for k, g in enumerate(got)]
        for k in range(n):
            comm.Isend([mine.mpi(), 1, t], peer, 40 + k).Free()  # freed while it may be under way
        left = n
        while left:
            if how == "testany":
                index, done = MPI.Request.Testany(requests)
                left -= done and index >= 0
            elif how == "testsome":
                left -= len(MPI.Request.Testsome(requests) or ())
            else:
                left = n - sum(request.Test() for request in requests)
        for request in requests:
            if how == "start":
                request.Free()
        assert all(np.array_equal(g.read(), expect(peer)) for g in got), how
        comm.Barrier()  # all that was freed has arrived
    t.Free()


def other_neighbours() -> None:
    """On a ring of all ranks: left and right neighbour, by blocks of five numbers."""
    ring, n = comm.Create_cart([size], [True]), 5
    left, right = (rank - 1) % size, (rank + 1) % size
    mine = Mine(data(rank, 2 * n))
    counts, places = [n, n], [n, 0]

    def check(call: str, sends: list, receives: list, want: np.ndarray) -> None:
        got = Mine(blank(2 * n))
        getattr(ring, call)([mine.mpi(), *sends, MPI.INT], [got.mpi(), *receives, MPI.INT])
        assert np.array_equal(got.read(), want), call

    def part(r: int, k: int) -> np.ndarray:
        return data(r, 2 * n)[n * k : n * k + n]

    check("Neighbor_allgather", [n], [n], np.concatenate([part(left, 0), part(right, 0)]))
    check("Neighbor_allgatherv", [n], [counts, places], np.concatenate([part(right, 0), part(left, 0)]))
    if size > 2:  # with two ranks both neighbours are the same one, and which block comes first is the library's choice
        check("Neighbor_alltoall", [n], [n], np.concatenate([part(left, 1), part(right, 0)]))
    for call, blocks in (("Neighbor_alltoall", [n]), ("Neighbor_alltoallv", [counts, places])):
        got = Mine(blank(2 * n))
        getattr(ring, call)([mine.mpi(), *blocks, MPI.INT], [got.mpi(), *blocks, MPI.INT])
        seen = {tuple(got.read()[:n]), tuple(got.read()[n:])}
        assert seen <= {tuple(part(r, k)) for r in (left, right) for k in (0, 1)} and len(seen) == 2, call
    ring.Free()


def local_reduction() -> None:
    a, b = Mine(data(rank)), Mine(data(rank) + 5)
    MPI.SUM.Reduce_local([a.mpi(), 400, MPI.INT], [b.mpi(), 400, MPI.INT])
    assert np.array_equal(b.read(), 2 * data(rank) + 5) and np.array_equal(a.read(), data(rank))


RULES = [every_mode_of_sending, matched_receives, requests_tested_and_freed, other_neighbours, local_reduction]
