"""What carries the pieces of a product that a GPU makes: NCCL between GPUs, or copy engines to pinned host memory.

Both work on streams of their own behind an event of the product, and hand back events: no thread, and no wait by the
host. Exchanges are complete in the order in which they were started. NCCL's send and receive of one step are one group,
so that every rank issues the same steps in the same order. Pinned host memory stands for a peer where there is one GPU:
real copy engines, at the rate of the host's bus, in both directions at once; it carries what a rank of a larger world
would send and receive, and nobody is at the other end.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..dist.errors import UndertowError
from . import cuda_driver
from .cuda_events import Call
from .spans import Memory, Span, Spans


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

    def memory(self) -> Hashable:
        """Which memory of its own its exchanges use now, for who records them; None: they cannot be replayed, or not by
        one rank while another queues them anew."""
        return None

    def recording(self) -> Callable[[tuple[int, int] | None], Callable[[], None]]:
        """What is exchanged from now on is captured and not done. Calling what this returns ends that: with the handles
        of the graph and of its instance, for what must be called before each launch; with None if there is no graph."""
        return lambda graph: lambda: None

    def landings(self, like: torch.Tensor) -> list[torch.Tensor]:
        """Memory like `like` for what each other rank, in their order, sends in this call without `pull`, until
        `finish`."""
        return list(like.new_empty(self.world - 1, *like.shape).unbind(0))

    def finish(self, stream: Any) -> None:
        """What has landed is no longer needed behind what is queued on `stream`."""

    def exchange(
        self, call: Call, after: Any, sends: Spans, receives: Spans, *, pull: bool = False
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
        self, call: Call, after: Any, sends: Spans, receives: Spans, *, pull: bool = False
    ) -> tuple[Any | None, Any | None]:
        operations = [dist.P2POp(dist.isend, span.numbers(), self._ranks[to], self._group) for span, to in sends]
        operations += [
            dist.P2POp(dist.irecv, span.numbers(), self._ranks[source], self._group) for span, source in receives
        ]
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

    `theirs`: pinned memory, which lies as that into which it comes: what comes to byte x of a storage is its byte x.
    What is sent lands in one pinned mirror of the tensor that it is part of, whoever it is for. `copies` and `pinned`
    stand in for the driver and for pinned memory in tests.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        device: torch.device,
        theirs: torch.Tensor,
        *,
        copies: Callable[[Any, Sequence[cuda_driver.Copy]], None] = cuda_driver.copies,
        pinned: bool = True,
    ) -> None:
        self.rank, self.world, self.device, self._theirs = rank, world, device, Memory(theirs)
        self._come = theirs.numel() * theirs.element_size()
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._copies, self._pinned = copies, pinned
        self._mirror = torch.empty(0, dtype=torch.uint8)
        self._mirror_at = self._mirrored = 0  # its address, its bytes

    def memory(self) -> Hashable:
        return self._mirror_at, self._theirs.address

    def exchange(
        self, call: Call, after: Any, sends: Spans, receives: Spans, *, pull: bool = False
    ) -> tuple[Any | None, Any | None]:
        if sends:
            after.wait(self._out)
            places = list(map(_place, sends))
            self._reflect(sends, places)
            there = self._mirror_at
            self._copies(self._out, [(there + low, address, nbytes) for low, address, nbytes in places])
        if receives:
            after.wait(self._in)
            places, there = list(map(_place, receives)), self._theirs.address
            if (most := max(low + nbytes for low, _, nbytes in places)) > self._come:
                raise UndertowError(f"{most} bytes come of {self._come}")
            self._copies(self._in, [(address, there + low, nbytes) for low, address, nbytes in places])
        return call.event(self._out) if sends else None, call.event(self._in) if receives else None

    def sent(self, rows: torch.Tensor) -> torch.Tensor:
        """What went out from where `rows` lie in their storage, once it has: bytes."""
        span = Span(Memory(rows), 0, rows.numel()), 0
        self._reflect([span], [found := _place(span)])
        low, _, nbytes = found
        return self._mirror[low : low + nbytes]

    def forget(self) -> None:
        """Overwrite all that went out, when nothing is on its way: what is asked for next has been sent since."""
        self._mirror.fill_(255)

    def _reflect(self, sends: Spans, places: Sequence[tuple[int, int, int]]) -> None:
        """See to it that the mirror has room for them."""
        if max(low + nbytes for low, _, nbytes in places) > self._mirrored:
            self._out.synchronize()  # what is on its way to the old mirror
            self._mirrored = max(span.memory.tensor.untyped_storage().nbytes() for span, _ in sends)
            self._mirror = torch.empty(self._mirrored, dtype=torch.uint8, pin_memory=self._pinned)
            self._mirror_at = self._mirror.data_ptr()

    def close(self) -> None:
        self._out.synchronize()
        self._in.synchronize()
        self._mirror, self._mirrored = torch.empty(0, dtype=torch.uint8), 0


def _place(message: tuple[Span, int]) -> tuple[int, int, int]:
    """(where it lies in its storage, its address, bytes)."""
    (memory, start, count), _ = message
    at = start * memory.size
    return memory.offset + at, memory.address + at, count * memory.size
