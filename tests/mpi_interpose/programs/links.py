"""What the model says of peers in different places, and what samples of messages change; four ranks, two in each place.

Each question is asked with a datatype of its own, so that the report answers it: the test reads there which sends were
taken. The samples are given to the preload, not taken by a clock. Prints how rank 0 sees the others.
"""

from __future__ import annotations

import ctypes

import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
rank = comm.rank
preload = ctypes.CDLL(None)
preload.undertow_measure_link.restype = ctypes.c_char_p
handle = ctypes.c_int if MPI._sizeof(MPI.Datatype) == 4 else ctypes.c_void_p


def exchange(over: MPI.Comm, peer: int, n: int, times: int = 1) -> None:
    """`times` Isends of n blocks of 4 bytes to `peer`, which sends as many; a blocking pair would be timed."""
    t = MPI.INT.Create_vector(n, 1, 4).Commit()
    mine, got = np.arange(4 * n, dtype="i") + over.rank, np.full(4 * n, -1, "i")
    for _ in range(times):
        request = over.Irecv([got, 1, t], peer, 1)
        over.Isend([mine, 1, t], peer, 1).Wait()
        request.Wait()
    assert np.array_equal(got[::4], (mine - over.rank + peer)[::4])
    t.Free()


def sample(t: MPI.Datatype, n: int, ours: bool, ns: int, times: int) -> None:
    for _ in range(times):
        assert preload.undertow_measure_sample(handle(t.handle), 2, rank ^ 1, ctypes.c_long(4 * n), int(ours), ns)


def corrected(n: int) -> None:
    """Sends are taken by the table, given up when samples say that they lose, taken again when they win."""
    t = MPI.INT.Create_vector(n, 1, 4).Commit()
    mine, got = np.arange(4 * n, dtype="i"), np.empty(4 * n, "i")

    def send(times: int) -> None:
        for _ in range(times):
            request = comm.Irecv([got, 4 * n, MPI.INT], rank ^ 1, 2)
            comm.Isend([mine, 1, t], rank ^ 1, 2).Wait()
            request.Wait()

    send(3)  # taken
    sample(t, n, True, 9000, 1)
    for _ in range(11):  # four of either path make a pair, and three that lose so much are enough
        sample(t, n, False, 1000, 1)
        sample(t, n, True, 9000, 1)
    send(10)  # taken: one sample is missing
    sample(t, n, False, 1000, 1)
    send(100)  # passed
    for _ in range(200):  # the program has changed: ours is fast now
        sample(t, n, True, 100, 1)
        sample(t, n, False, 1000, 1)
    send(1000)  # taken
    t.Free()


def main() -> None:
    seen = [preload.undertow_measure_link(other).decode() for other in range(comm.size)]
    if rank == 0:
        print(f"rank 0 sees {' '.join(seen)}", flush=True)
    exchange(comm, rank ^ 1, 1024)
    exchange(comm, rank ^ 2, 1025)
    mirrored = comm.Split(0, -rank)  # other ranks, the same processes
    exchange(mirrored, mirrored.rank ^ 1, 1026)
    exchange(mirrored, mirrored.rank ^ 2, 1027)
    half = comm.Split(rank % 2, rank)  # one process of each place
    exchange(half, half.rank ^ 1, 1028)
    low, high = comm.Split(rank // 2, rank), comm.Dup()
    inter = low.Create_intercomm(0, high, 2 - 2 * (rank // 2), 7)
    exchange(inter, low.rank, 1029)  # between the places
    for one in (mirrored, half, low, high, inter):
        one.Free()
    for turn in range(6):  # a library may give the handle of one that was freed to the next
        pair = comm.Split(rank // 2 if turn % 2 else rank % 2, rank)
        exchange(pair, pair.rank ^ 1, 1030)
        pair.Free()
    corrected(2048)
    if rank == 0:
        print("ok")


if __name__ == "__main__":
    main()
