"""Latency and rate between two MPI processes by mpi4py, as `mpiexec -n 2 python -m undertow.dist.probe_mpi` prints it.

Alone in its file because it alone needs mpi4py, and because importing mpi4py.MPI starts MPI in the process.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from .pingpong import both_ways, is_duplex, play


class MpiWire:
    """A rank's side of blocking MPI_Send, MPI_Recv and MPI_Sendrecv of bytes."""

    def __init__(self, communicator, peer: int) -> None:
        self._communicator, self._peer = communicator, peer

    def message(self, nbytes: int) -> np.ndarray:
        return np.zeros(nbytes, dtype=np.uint8)

    def send(self, message: np.ndarray) -> None:
        self._communicator.Send(message, self._peer)

    def receive(self, message: np.ndarray) -> None:
        self._communicator.Recv(message, self._peer)

    def both(self, outgoing: np.ndarray, incoming: np.ndarray) -> None:
        self._communicator.Sendrecv(outgoing, self._peer, recvbuf=incoming, source=self._peer)


def worker(quick: bool) -> None:
    """Measure between ranks 0 and 1; rank 0 prints one line of JSON."""
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.Get_rank()
    if rank > 1 or MPI.COMM_WORLD.Get_size() < 2:
        return
    wire = MpiWire(MPI.COMM_WORLD, 1 - rank)
    samples = list(play(wire, rank == 0, quick))
    _, both_s = both_ways(wire, quick)
    if rank == 0:
        duplex = is_duplex(samples[-1][1], both_s)
        library = MPI.Get_library_version().splitlines()[0].strip()
        sys.stdout.write(json.dumps({"link": "mpi", "duplex": duplex, "samples": samples, "library": library}) + "\n")


if __name__ == "__main__":
    worker(sys.argv[1:] == ["--quick"])
