"""What carries the pieces of a product that a GPU makes: NCCL between GPUs, or copy engines to pinned host memory.

Both work on streams of their own behind an event of the product, and hand back events: no thread, and no wait by the
host. NCCL's send and receive of one step are one group, so that every rank issues the same steps in the same order.
Pinned host memory stands for a peer where there is one GPU: real copy engines, at the rate of the host's bus, in both
directions at once; it carries what a rank of a larger world would send and receive, and nobody is at the other end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

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

    def landing(self, source: int, like: torch.Tensor) -> torch.Tensor:
        """Memory for what `source` sends in this call without `pull`, until `finish`."""
        return torch.empty_like(like)

    def finish(self, stream: Any) -> None:
        """What has landed is no longer needed behind what is queued on `stream`."""

    def exchange(self, after: Any, sends: Rows, receives: Rows, *, pull: bool = False) -> list[Any]:
        """Start both behind `after`, an event or a `Counted`; the events behind which they are complete.

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

    def exchange(self, after: Any, sends: Rows, receives: Rows, *, pull: bool = False) -> list[Any]:
        operations = [dist.P2POp(dist.isend, rows, self._ranks[to], self._group) for rows, to in sends]
        operations += [dist.P2POp(dist.irecv, rows, self._ranks[source], self._group) for rows, source in receives]
        if not operations:
            return []
        with torch.cuda.stream(self._stream):
            after.wait(self._stream)
            for work in dist.batch_isend_irecv(operations):
                work.wait()  # orders this stream; the host goes on
            return [self._stream.record_event()]


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

    `incoming(rows, source)`: a pinned tensor like `rows`, which is what `source` would have sent. `sent`: by peer and
    size, the pinned memory into which rows went; the next piece of that size and peer takes its place.
    """

    def __init__(
        self, rank: int, world: int, device: torch.device, incoming: Callable[[torch.Tensor, int], torch.Tensor]
    ) -> None:
        self.rank, self.world, self.device, self._incoming = rank, world, device, incoming
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._slots: dict[int, dict[Any, torch.Tensor]] = {}

    def exchange(self, after: Any, sends: Rows, receives: Rows, *, pull: bool = False) -> list[Any]:
        events = []
        for stream, copies in ((self._out, [(self.slot(r, to), r) for r, to in sends]),
                               (self._in, [(r, self._incoming(r, source)) for r, source in receives])):  # fmt: skip
            if copies:
                after.wait(stream)
                with torch.cuda.stream(stream):
                    for target, source in copies:
                        target.copy_(source, non_blocking=True)
                    events.append(stream.record_event())
        return events

    def slot(self, rows: torch.Tensor, to: int) -> torch.Tensor:
        """Where `rows` go in the host memory that stands for rank `to`; by their place in their storage."""
        places = self._slots.setdefault(to, {})
        key = (rows.storage_offset(), tuple(rows.shape), rows.dtype)
        if key not in places:
            places[key] = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        return places[key]

    def close(self) -> None:
        self._slots.clear()
