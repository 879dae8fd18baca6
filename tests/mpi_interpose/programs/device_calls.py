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


def intercommunicators() -> None:
    """Each of two groups gets what the other sends, or what the other's root has."""
    mine_is_first, n = rank % 2 == 0, 6
    half = comm.Split(rank % 2, rank)
    across = half.Create_intercomm(0, comm, 1 if mine_is_first else 0, 7)
    others, place = list(range(1 if mine_is_first else 0, size, 2)), half.rank
    few = MPI.INT.Create_vector(n, 1, 2).Commit()
    mine = Mine(data(rank, n * size))
    for first_is_root in (True, False):
        in_roots_group = first_is_root == mine_is_first
        root = (MPI.ROOT if half.rank == 0 else MPI.PROC_NULL) if in_roots_group else 0
        chief = 0 if first_is_root else 1
        both = Mine(data(rank, 2 * n) if in_roots_group else blank(2 * n))
        across.Bcast([both.mpi(), 1, few], root)
        want = data(rank, 2 * n) if in_roots_group else blank(2 * n)
        if not in_roots_group:
            want[::2] = data(chief, 2 * n)[::2]
        assert np.array_equal(both.read(), want)
        all_of, part, want = Mine(blank(n * size)), Mine(blank(n)), blank(n * size)
        counts, places = [n] * len(others), [n * k for k in range(len(others))]
        if root == MPI.ROOT:
            for k, r in enumerate(others):
                want[n * k : n * k + n] = data(r, n * size)[:n]
        across.Gather([mine.mpi(), n, MPI.INT], [all_of.mpi(), n, MPI.INT], root)
        assert np.array_equal(all_of.read(), want)
        all_of = Mine(blank(n * size))
        across.Gatherv([mine.mpi(), n, MPI.INT], [all_of.mpi(), counts, places, MPI.INT], root)
        assert np.array_equal(all_of.read(), want)
        want = blank(n) if in_roots_group else data(chief, n * size)[n * place : n * place + n]
        across.Scatter([mine.mpi(), n, MPI.INT], [part.mpi(), n, MPI.INT], root)
        assert np.array_equal(part.read(), want)
        part = Mine(blank(n))
        across.Scatterv([mine.mpi(), counts, places, MPI.INT], [part.mpi(), n, MPI.INT], root)
        assert np.array_equal(part.read(), want)
        total = Mine(blank(n))
        across.Reduce([mine.mpi(), n, MPI.INT], [total.mpi(), n, MPI.INT], root=root)
        sums = sum(data(r, n * size)[:n] for r in others)
        assert np.array_equal(total.read(), sums if root == MPI.ROOT else blank(n))
    total = Mine(blank(n))
    across.Allreduce([mine.mpi(), n, MPI.INT], [total.mpi(), n, MPI.INT])
    assert np.array_equal(total.read(), sums)
    counts, places = [n] * len(others), [n * k for k in range(len(others))]
    first = np.concatenate([data(r, n * size)[:n] for r in others] + [blank(n * (size - len(others)))])
    mixed = np.concatenate(
        [data(r, n * size)[n * place : n * place + n] for r in others] + [blank(n * (size - len(others)))]
    )
    vector = [counts, places, MPI.INT]
    typed = [counts, [4 * at for at in places], [MPI.INT] * len(others)]
    for call, sends, receives, want in (
        ("Allgather", [n, MPI.INT], [n, MPI.INT], first),
        ("Allgatherv", [n, MPI.INT], vector, first),
        ("Alltoall", [n, MPI.INT], [n, MPI.INT], mixed),
        ("Alltoallv", vector, vector, mixed),
        ("Alltoallw", typed, typed, mixed),
    ):
        got = Mine(blank(n * size))
        getattr(across, call)([mine.mpi(), *sends], [got.mpi(), *receives])
        assert np.array_equal(got.read(), want), call
    few.Free()
    across.Free()
    half.Free()


RULES = [
    every_mode_of_sending,
    matched_receives,
    requests_tested_and_freed,
    other_neighbours,
    local_reduction,
    intercommunicators,
]
