"""A program of two spells: calls just after MPI_Init, a pause of so many seconds, and as many calls again.

    patience.py calls KIB PAUSE_S     two ranks: packs, messages and collectives of a datatype that reaches over KIB KiB
    patience.py kept KIB PAUSE_S      one rank: persistent messages of that datatype to itself
    patience.py rounds KIB PAUSE_S    one rank: rounds of nonblocking messages of a small datatype to itself

Without a pause there is no second spell. Rank 0 prints "ok" and how many seconds after its MPI_Init the slowest rank
was done: before a patience of that length is over, nothing may be taken, however slow the machine is.
"""

from __future__ import annotations

import sys
import time

import mpi4py

mpi4py.rc(initialize=False)
import numpy as np  # noqa: E402
from mpi4py import MPI  # noqa: E402

BLOCKS, CALLS, ROUNDS = 16384, 6, 600
what, kib, pause_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
MPI.Init()
began = time.monotonic()
comm = MPI.COMM_WORLD
stride = kib * 1024 // BLOCKS // 4
datatype = MPI.INT.Create_vector(BLOCKS, 1, stride).Commit()
few = MPI.INT.Create_vector(512, 1, 4).Commit()
mine, other = np.arange(BLOCKS * stride, dtype="i"), np.empty(BLOCKS * stride, "i")


def filled(values: np.ndarray) -> None:
    assert np.array_equal(values[::stride], mine[::stride])
    values[:] = -1


def calls() -> None:
    peer = comm.rank ^ 1
    packed = bytearray(4 * BLOCKS)
    for _ in range(CALLS):
        other[:] = -1
        assert datatype.Pack(mine, packed, 0, comm) == len(packed)
        datatype.Unpack(packed, 0, other, comm)
        filled(other)
        if comm.rank == 0:
            comm.Send([mine, 1, datatype], peer)
        else:
            comm.Recv([other, 1, datatype], peer)
            filled(other)
        comm.Sendrecv([mine, 1, datatype], peer, 0, [other, 1, datatype], peer)
        filled(other)
        comm.Bcast([mine if comm.rank == 0 else other, 1, datatype])


def kept() -> None:
    for _ in range(CALLS):
        other[:] = -1
        requests = [comm.Recv_init([other, 1, datatype], comm.rank), comm.Send_init([mine, 1, datatype], comm.rank)]
        MPI.Prequest.Startall(requests)
        MPI.Request.Waitall(requests)
        for request in requests:
            request.Free()
        filled(other)


def rounds() -> None:
    for step in range(ROUNDS):
        mine[0] = step
        requests = [comm.Irecv([other, 1, few], comm.rank), comm.Isend([mine, 1, few], comm.rank)]
        MPI.Request.Waitall(requests)
        assert other[0] == step


spell = {"calls": calls, "kept": kept, "rounds": rounds}[what]
spell()
if pause_s:
    time.sleep(max(0.0, began + pause_s - time.monotonic()))
    spell()
slowest = comm.reduce(time.monotonic() - began, op=MPI.MAX)
for made in (datatype, few):
    made.Free()
if comm.rank == 0:
    print(f"ok {slowest:.3f}")
MPI.Finalize()
