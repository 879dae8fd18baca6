"""Two ranks: rounds of messages that pass come again and again, and now and then something else comes between.

So scripts begin, and end with another message in a round, another order, a commit, other completions and the death of a
datatype, whose handle the next one may get. Prints "ok" and how many messages a rank started with either kind of type.
"""

from __future__ import annotations

import sys

import numpy as np
from mpi4py import MPI

comm = MPI.COMM_WORLD
peer, STEPS = comm.rank ^ 1, 80
BLOCKS = {4 * 16 * n: (16, 64) for n in (8, 12, 16)} | {4 * 512: (1, 2)}  # size -> length of a block and stride
sent = [np.arange(1024, dtype="i") + 10_000 * comm.rank + 1000 * k for k in range(3)]
started = 0


def exchange(kinds: list[MPI.Datatype], order: list[int], how: str) -> None:
    """One round of the messages `order`, two calls each."""
    global started
    got = [np.full(1024, -1, "i") for _ in sent]
    requests = [comm.Irecv([got[k], 1, kinds[k]], peer, k) for k in order]
    if how == "commit":
        MPI.INT.Create_vector(3, 1, 2).Commit().Free()
    requests += [comm.Isend([sent[k], 1, kinds[k]], peer, k) for k in order]
    if how == "one by one":
        for request in requests:
            request.Wait()
    elif how == "in parts":
        MPI.Request.Waitall(requests[:1])
        MPI.Request.Waitall(requests[1:])
    else:
        MPI.Request.Waitall(requests)
    started += 2 * len(order)
    for k in order:
        where = np.zeros(1024, bool)
        for start in range(0, kinds[k].extent // 4, BLOCKS[kinds[k].size][1]):
            where[start : start + BLOCKS[kinds[k].size][0]] = True
        assert np.array_equal(got[k], np.where(where, sent[k] + 10_000 * (peer - comm.rank), -1)), (order, how, k)


large = [MPI.INT.Create_vector(n, 16, 64).Commit() for n in (8, 12, 16)]
beside = comm.Recv_init([np.empty(4, "i"), MPI.INT], peer, 9), comm.Send_init([np.empty(4, "i"), MPI.INT], peer, 9)
for other, (order, how) in enumerate(
    [
        ([0, 1, 2], "all"),
        ([1, 0], "all"),
        ([0], "all"),
        ([0, 1], "commit"),
        ([0, 1], "one by one"),
        ([0, 1], "in parts"),
    ]
):
    for step in range(STEPS):
        if step == STEPS - 1:
            exchange(large, order, how)
        else:
            exchange(large, [0, 1], "all")
        if other == 0:  # another completion between two rounds
            MPI.Prequest.Startall(list(beside))
            MPI.Request.Waitall(list(beside))
for request in beside:
    request.Free()
left, started = started, 0
for turn in range(8):
    small = [MPI.INT.Create_vector(512, 1, 2).Commit(), large[1]]
    exchange([small[0], small[0]], [0, 1], "all")
    small[0].Free()
    again = [MPI.INT.Create_vector(8, 16, 64).Commit(), large[1]]
    if turn < 4:
        for _ in range(20):
            exchange([again[0], again[0]], [0, 1], "all")
        left += 20 * 4
        started -= 20 * 4
    again[0].Free()
for kind in large:
    kind.Free()
comm.Barrier()
if comm.rank == 0:
    sys.stdout.write(f"ok {left} {started}\n")
