"""Ranks that mpiexec started, in the place of a process group: the same schedules over MPI, without torch.distributed.

`P2P(MpiGroup())` executes any schedule, and `group=MpiGroup()` is what `token_ring_attention` and `shard_sequence`
take. MPI matches messages by tag, like gloo, so receives are posted early and no order between lanes is needed. Its
own wait has no time-out and would hold Python's lock, so requests are asked again and again, with short pauses.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch

from ..dist.errors import MissingPackage, UserError
from .actions import Recv, Send
from .graph import Graph
from .transport import tags_of

_LONGEST_PAUSE_S = 1e-4
_LONGEST_WAIT_S = 1800.0  # of a group's own collectives, as torch's


class MpiGroup:
    """The ranks of `comm` (an mpi4py communicator, default COMM_WORLD), for CPU tensors; making it is collective.

    Keep one and pass it on: executors and measured choices belong to the object. MPI must be started with
    MPI_THREAD_MULTIPLE, as mpi4py does. `UserError` where it was not, `MissingPackage` without mpi4py.
    """

    def __init__(self, comm: Any = None) -> None:
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise MissingPackage("mpi4py", extra="mpi", needed_for="MpiGroup") from error
        if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
            raise UserError(
                f"MPI with thread level {MPI.Query_thread()}",
                expected="MPI_THREAD_MULTIPLE, because lanes are threads",
                remedy="let mpi4py initialise MPI, or pass an MPI built with it",
            )
        self._mpi, self._comm = MPI, (comm or MPI.COMM_WORLD).Dup()
        self.rank, self.world = self._comm.Get_rank(), self._comm.Get_size()
        self._left: list[Any] = []  # memory that MPI may still write to
        self.most_tag = int(self._comm.Get_attr(MPI.TAG_UB) or 32767)  # the standard's least

    def transport(self) -> MpiTransport:
        """Messages of one executor, on a communicator of its own; collective."""
        return MpiTransport(MpiGroup(self._comm))

    def gather(self, mine: torch.Tensor, timeout_s: float = _LONGEST_WAIT_S) -> list[torch.Tensor]:
        """Every rank's tensor of one shape and dtype, in rank order; collective. `RuntimeError` when one has not come
        in time."""
        found = mine.new_empty(self.world, *mine.shape)
        if mine.numel():
            request = self._comm.Iallgather([_bytes(mine), self._mpi.BYTE], [_bytes(found), self._mpi.BYTE])
            try:
                _Request(request).wait(timedelta(seconds=timeout_s))
            except RuntimeError:
                self._left.append((mine, found))
                raise
        return list(found)

    def sum_into(self, x: torch.Tensor) -> None:
        """Replace `x` by the sum over ranks, added in rank order, so alike on all; collective."""
        x.copy_(torch.stack(self.gather(x)).sum(0))

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, pickled; collective."""
        return pickle.loads(self._comm.bcast(pickle.dumps(value) if self.rank == 0 else None))

    def post(self, rows: torch.Tensor, peer: int, tag: int, *, send: bool) -> _Request:
        """Start a message of contiguous rows; called from one thread at a time."""
        begin = self._comm.Isend if send else self._comm.Irecv
        return _Request(begin([_bytes(rows), self._mpi.BYTE], peer, tag))

    def close(self) -> None:
        self._comm.Free()


class _Request:
    """A message on its way, waited for like torch's Work."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def wait(self, timeout: timedelta) -> None:
        deadline_s, pause_s = time.monotonic() + timeout.total_seconds(), 0.0
        while not self._request.Test():
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"timed out after {timeout.total_seconds():g} s")
            time.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, pause_s + 1e-5)


class MpiTransport:
    """One rank's messages over MPI: a `Transport`."""

    prepost = True

    def __init__(self, group: MpiGroup) -> None:
        self.group = group

    def prepare(self, graph: Graph) -> Mapping[int, int]:
        tags = tags_of(graph)
        if max(tags.values(), default=0) > self.group.most_tag:
            raise UserError(
                f"a schedule of {len(tags)} messages", expected=f"tags up to {self.group.most_tag}, this MPI's limit"
            )
        return tags

    def issue(self, address: int, action: Send | Recv, rows: Sequence[torch.Tensor]) -> list[Any]:
        send = isinstance(action, Send)
        peer = action.to if isinstance(action, Send) else action.source
        return [self.group.post(part, peer, address + at, send=send) for at, part in enumerate(rows)]

    def wait(self, works: list[Any], timeout_s: float) -> None:
        for work in works:
            work.wait(timedelta(seconds=timeout_s))

    def gather(self, mine: torch.Tensor, timeout_s: float) -> list[torch.Tensor]:
        return self.group.gather(mine, timeout_s)

    def close(self) -> None:
        self.group.close()


def _bytes(rows: torch.Tensor) -> Any:
    return rows.detach().reshape(-1).view(torch.uint8).numpy()
