"""What carries the pieces of a product that a GPU makes: NCCL between GPUs, or copy engines to pinned host memory.

Both work on streams of their own behind an event of the product, and hand back events: no thread, and no wait by the
host. Exchanges are complete in the order in which they were started. NCCL's send and receive of one step are one group,
so that every rank issues the same steps in the same order. Pinned host memory stands for a peer where there is one GPU:
real copy engines, at the rate of the host's bus, in both directions at once; it carries what a rank of a larger world
would send and receive, and nobody is at the other end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..dist.errors import UndertowError
from . import cuda_driver
from .cuda_events import Call

Rows = Sequence[tuple[torch.Tensor, int]]  # (rows, the other rank)


class CudaMessenger:
    """Messages of one rank, issued by one thread.

    `group`: whose own collectives do the same in one call; None: there are none. `capturable`: into a CUDA graph.
    """

    rank: int
    world: int
    group: dist.ProcessGroup | None = None
    capturable = True

    def begin(self, nbytes: int) -> bool:
        """A call in which a rank gives each other one at most `nbytes`, as all ranks know; whether there is room."""
        return True

    def landings(self, like: torch.Tensor) -> list[torch.Tensor]:
        """Memory like `like` for what each other rank, in their order, sends in this call without `pull`, until
        `finish`."""
        return list(like.new_empty(self.world - 1, *like.shape).unbind(0))

    def finish(self, stream: Any) -> None:
        """What has landed is no longer needed behind what is queued on `stream`."""

    def exchange(
        self, call: Call, after: Any, sends: Rows, receives: Rows, *, pull: bool = False
    ) -> tuple[Any | None, Any | None]:
        """Start both behind `after`, an event or a `Counted`; events of `call` behind which all that was sent, and all
        that was received, so far is complete. None where there is neither of them here.

        `pull`: the receives are not landings, and what is sent goes to all other ranks, each in an exchange.
        """
        raise NotImplementedError

    def close(self) -> None: ...


class NcclMessenger(CudaMessenger):
    """Between the GPUs of a group; a communicator of its ranks' own, and a stream. Collective to make."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, timeout_s: float) -> None:
        self.group = group or dist.group.WORLD
        self._ranks = dist.get_process_group_ranks(self.group)
        self.rank, self.world = self._ranks.index(dist.get_rank()), len(self._ranks)
        self.device = device
        self._group = _communicator(tuple(self._ranks), device, timeout_s)
        self._stream = torch.cuda.Stream(device, priority=-1)

    def exchange(
        self, call: Call, after: Any, sends: Rows, receives: Rows, *, pull: bool = False
    ) -> tuple[Any | None, Any | None]:
        operations = [dist.P2POp(dist.isend, rows, self._ranks[to], self._group) for rows, to in sends]
        operations += [dist.P2POp(dist.irecv, rows, self._ranks[source], self._group) for rows, source in receives]
        if not operations:
            return None, None
        current = torch.cuda.current_stream(self.device)
        torch.cuda.set_stream(self._stream)
        try:
            after.wait(self._stream)
            for work in dist.batch_isend_irecv(operations):
                work.wait()  # orders this stream; the host goes on
            done = call.event(self._stream)
        finally:
            torch.cuda.set_stream(current)
        return done if sends else None, done if receives else None


_kept: dict[tuple[tuple[int, ...], str], Any] = {}


def _communicator(ranks: tuple[int, ...], device: torch.device, timeout_s: float) -> Any:
    """One for each set of ranks and device, kept until the process groups are destroyed, with the first time-out.

    torch names such a group after its ranks and the number of groups there are: a second one, made when the first has
    been destroyed, can find the address of the first in the store, where nobody listens any more.
    """
    found = _kept.get((ranks, str(device)))
    if found is None or found not in dist.distributed_c10d._world.pg_map:
        found = _kept[ranks, str(device)] = dist.new_group(
            list(ranks), timedelta(seconds=timeout_s), "nccl", use_local_synchronization=True, device_id=device
        )
    return found


class PinnedMessenger(CudaMessenger):
    """Copy engines to and from pinned host memory, one stream for each direction.

    `incoming(rows, source)`: pinned memory of as many bytes as `rows`, with what `source` would have sent; it must live
    until `close`. What is sent lands in one pinned mirror of the tensor that it is part of, whoever it is for.
    `copy` and `pinned` stand in for the driver and for pinned memory in tests.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        device: torch.device,
        incoming: Callable[[torch.Tensor, int], torch.Tensor],
        *,
        copy: Callable[[Any, int, int, int], None] = cuda_driver.copy,
        pinned: bool = True,
    ) -> None:
        self.rank, self.world, self.device, self._incoming = rank, world, device, incoming
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._copy, self._pinned = copy, pinned
        self._mirror, self._mirror_at, self._mirrored = (
            torch.empty(0, dtype=torch.uint8),
            0,
            0,
        )  # its address, its bytes

    def exchange(
        self, call: Call, after: Any, sends: Rows, receives: Rows, *, pull: bool = False
    ) -> tuple[Any | None, Any | None]:
        if sends:
            after.wait(self._out)
            for rows, _ in sends:
                address, nbytes = cuda_driver.place(rows)
                self._copy(self._out, self._reflected(rows, nbytes), address, nbytes)
        if receives:
            after.wait(self._in)
            for rows, source in receives:
                (target, nbytes), (there, found) = (
                    cuda_driver.place(rows),
                    cuda_driver.place(self._incoming(rows, source)),
                )
                if found != nbytes:
                    raise UndertowError(f"{found} bytes come from rank {source} for {nbytes}")
                self._copy(self._in, target, there, nbytes)
        return call.event(self._out) if sends else None, call.event(self._in) if receives else None

    def sent(self, rows: torch.Tensor) -> torch.Tensor:
        """What went out from where `rows` lie in their storage, once it has: bytes."""
        nbytes = rows.numel() * rows.element_size()
        low = self._reflected(rows, nbytes) - self._mirror_at
        return self._mirror[low : low + nbytes]

    def _reflected(self, rows: torch.Tensor, nbytes: int) -> int:
        """The address at which `rows` land."""
        low = int(rows.storage_offset()) * rows.element_size()
        if low + nbytes > self._mirrored:
            self._out.synchronize()  # what is on its way to the old mirror
            self._mirrored = rows.untyped_storage().nbytes()
            self._mirror = torch.empty(self._mirrored, dtype=torch.uint8, pin_memory=self._pinned)
            self._mirror_at = self._mirror.data_ptr()
        return self._mirror_at + low

    def close(self) -> None:
        self._out.synchronize()
        self._in.synchronize()
        self._mirror, self._mirrored = torch.empty(0, dtype=torch.uint8), 0
