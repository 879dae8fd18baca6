"""Messages of the overlap engine over MPI, for programs that mpirun starts and that have no torch.distributed.

``OverlapEngine(messenger=MpiMessenger())``: everything else is as on gloo. The engine posts from its communication
thread and waits in the caller's, so MPI must have been started with MPI_THREAD_MULTIPLE, which mpi4py asks for.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch

from .mpi_group import MpiGroup


class MpiMessenger:
    """CPU tensors over a duplicate of `comm` (an mpi4py communicator, default COMM_WORLD); collective to make.

    Contiguous rows of any dtype travel as bytes. A message may hold up to 2 GiB - 1 (MPI's count). Errors as of
    `MpiGroup`.
    """

    def __init__(self, comm: Any = None) -> None:
        self._group = MpiGroup(comm)
        self.rank, self.world = self._group.rank, self._group.world

    def post_send(self, rows: torch.Tensor, to: int, tag: int) -> Any:
        return self._group.post(rows, to, tag, send=True)

    def post_recv(self, rows: torch.Tensor, source: int, tag: int) -> Any:
        return self._group.post(rows, source, tag, send=False)

    def wait(self, handle: Any, timeout_s: float) -> None:
        handle.wait(timedelta(seconds=timeout_s))

    def close(self) -> None:
        self._group.close()
