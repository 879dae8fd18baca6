"""Two ranks exchange two datatypes each way, over and over; the word says how the requests are completed.

`waitall`: all of a round by one Waitall; `wait`: one by one; `late`: each Waitall completes the round before, so that
its time is not that of the messages just started. Prints "ok" when every byte arrived.
"""

from __future__ import annotations

import sys

import numpy as np
from mpi4py import MPI

comm, how = MPI.COMM_WORLD, sys.argv[1]
peer = comm.rank ^ 1
types = [MPI.INT.Create_vector(n, 1, 4).Commit() for n in (512, 1024)]
before: list[MPI.Request] = []
slots = [[np.empty(4096, "i") for _ in range(4)] for _ in range(2)]
for step in range(1024):
    sent, got = slots[step % 2][:2], slots[step % 2][2:]
    for k in range(2):
        sent[k][:] = np.arange(4096, dtype="i") + 10 * step + comm.rank
        got[k][:] = -1
    requests = [comm.Irecv([got[k], 1, types[k]], peer, k) for k in range(2)]
    requests += [comm.Isend([sent[k], 1, types[k]], peer, k) for k in range(2)]
    if how == "waitall":
        MPI.Request.Waitall(requests)
    elif how == "wait":
        for request in requests:
            request.Wait()
    else:
        MPI.Request.Waitall(before)
        before, requests = requests, before
    if how != "late":
        for k, n in enumerate((512, 1024)):
            want = np.full(4096, -1, "i")
            want[: 4 * n : 4] = (np.arange(4096, dtype="i") + 10 * step + peer)[: 4 * n : 4]
            assert np.array_equal(got[k], want), (step, k)
MPI.Request.Waitall(before)
for t in types:
    t.Free()
comm.Barrier()
if comm.rank == 0:
    print("ok")
