"""Two ranks: types that the table leaves alone and types that it takes, in turn; and many requests at once.

Types are freed before the next is made, so an MPI may give the next one the same handle. Sends that complete at once
share a request on most MPIs: here forty are open together, completed by every call there is for that. Prints "ok" and,
of rank 0, how many messages of either type it sent and received.
"""

from __future__ import annotations

import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
peer, CALLS, TURNS = comm.rank ^ 1, 7, 30
left = taken = 0


def fresh(n: int) -> np.ndarray:
    return np.arange(n, dtype="i") + 1000 * comm.rank


def exchange(kind: MPI.Datatype, where: np.ndarray, turn: int) -> None:
    sent, got = fresh(4096), np.full(4096, -1, "i")
    want = np.full(4096, -1, "i")
    want[where] = (fresh(4096) + 1000 * (peer - comm.rank))[where]
    if turn % 3 == 0:
        requests = [comm.Irecv([got, 1, kind], peer), comm.Isend([sent, 1, kind], peer)]
        for request in requests:
            request.Wait()
    elif turn % 3 == 1:
        comm.Sendrecv([sent, 1, kind], peer, 0, [got, 1, kind], peer, 0)
    else:
        for turn_of in (0, 1):
            if comm.rank == turn_of:
                comm.Ssend([sent, 1, kind], peer)
            else:
                comm.Recv([got, 1, kind], peer)
    assert np.array_equal(got, want), turn


for turn in range(TURNS):
    for block, count in ((1, 512), (16, 16)) if turn % 2 else ((16, 16), (1, 512)):
        kind = MPI.INT.Create_vector(count, block, 4 * block).Commit()
        for _ in range(CALLS):
            where = (np.arange(count)[:, None] * 4 * block + np.arange(block)).ravel()
            exchange(kind, where, turn)
        if block == 1:
            taken += 2 * CALLS
        else:
            left += 2 * CALLS
        kind.Free()

kind = MPI.INT.Create_vector(8, 1, 2).Commit()
for how in range(6):
    sent = [np.arange(16, dtype="i") + 100 * k + comm.rank for k in range(40)]
    got = [np.full(16, -1, "i") for _ in range(40)]
    requests = [comm.Isend([sent[k], 1, kind], peer, k) for k in range(40)]
    requests += [comm.Irecv([got[k], 1, kind], peer, k) for k in range(40)]
    if how == 0:
        MPI.Request.Waitall(requests)
    elif how == 1:
        while not MPI.Request.Testall(requests):
            pass
    elif how == 2:
        while MPI.Request.Waitsome(requests):
            pass
    elif how == 3:
        for _ in requests:
            MPI.Request.Waitany(requests)
    elif how == 4:
        for request in requests[:40]:
            request.Free()
        MPI.Request.Waitall(requests[40:])
        comm.Barrier()
    else:
        for request in reversed(requests):
            while not request.Test():
                pass
    for k in range(40):
        want = np.full(16, -1, "i")
        want[::2] = np.arange(0, 16, 2) + 100 * k + peer
        assert np.array_equal(got[k], want), (how, k)
kind.Free()
comm.Barrier()
if comm.rank == 0:
    print(f"ok {left} {taken}")
