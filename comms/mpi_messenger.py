"""Messages of the overlap engine over MPI, for programs that mpirun starts and that have no torch.distributed.

``OverlapEngine(messenger=MpiMessenger())``: everything else is as on gloo. The engine posts from its communication
thread and waits in the caller's, so MPI must have been started with MPI_THREAD_MULTIPLE, which mpi4py asks for.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from ..dist.errors import MissingPackage, UserError


class MpiMessenger:
    """CPU tensors over a duplicate of `comm` (an mpi4py communicator, default COMM_WORLD); collective to make.

    Contiguous rows of any dtype travel as bytes. A message may hold up to 2 GiB - 1 (MPI's count).
    """

    def __init__(self, comm: Any = None) -> None:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise MissingPackage("mpi4py", extra="mpi", needed_for="MpiMessenger") from error
        if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
            raise UserError(
                f"MPI with thread level {MPI.Query_thread()}",
                expected="MPI_THREAD_MULTIPLE",
                remedy="let mpi4py initialise MPI, or pass an MPI built with it",
            )
        self._mpi, self._comm = MPI, (comm or MPI.COMM_WORLD).Dup()
        self.rank, self.world = self._comm.Get_rank(), self._comm.Get_size()

    def post_send(self, rows: torch.Tensor, to: int, tag: int) -> Any:
        return self._comm.Isend([_bytes(rows), self._mpi.BYTE], to, tag)

    def post_recv(self, rows: torch.Tensor, source: int, tag: int) -> Any:
        return self._comm.Irecv([_bytes(rows), self._mpi.BYTE], source, tag)

    def wait(self, handle: Any, timeout_s: float) -> None:
        """Asks again and again, with growing pauses up to 0.1 ms, because MPI's own wait has no time-out."""
        deadline_s, pause_s = time.monotonic() + timeout_s, 0.0
        while not handle.Test():
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"timed out after {timeout_s:g} s")
            time.sleep(pause_s)
            pause_s = min(1e-4, pause_s + 1e-5)

    def close(self) -> None:
        self._comm.Free()


def _bytes(rows: torch.Tensor) -> Any:
    return rows.detach().view(torch.uint8).numpy()
