"""What carries the pieces of a product between GPUs of one host: copy engines and mapped memory, no processor.

Every rank owns memory that all of them map (torch's symmetric memory): a landing for each other rank, and a shelf.
What only one rank needs is pushed into its landing and read there by what adds it up. What all need is laid on the
shelf, and each pulls it to where it belongs. Copies between two GPUs are done by copy engines; those within one GPU
take processors, which a running product does not give away, so the only one is the shelf's, before the product. A
count in the receiver's memory says how many messages are there, one in the sender's how many were taken. Streams wait
for them and write them (`stream_wait`), so the host only queues.

A wait is for something that every rank has queued earlier than whatever depends on it: for messages of this exchange,
which are queued before their receives, and for what earlier calls took. Streams that share one hardware queue
(CUDA_DEVICE_MAX_CONNECTIONS=1) therefore cost overlap and cannot deadlock.

NVLink multicast is not used, and memory is mapped without it: torch sets it up in every rendezvous unless told not to,
and fails where a GPU or its driver has it half.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ..dist.errors import UndertowError
from . import cuda_driver
from .cuda_events import Call
from .cuda_graph_counts import Recorded, places
from .cuda_messengers import CudaMessenger
from .spans import Spans
from .stream_wait import Counted, can_wait, wait_value, write_value

MOST_BYTES = 4 << 30  # of a rank's mapped memory; calls that need more are for NCCL
_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
_UNIT, _HEAD = 2 << 20, 4096  # what landings grow by; bytes before them, for the counts


@dataclass
class Mapped:
    """Memory that all ranks map, and how streams talk through it.

    `areas[r]`: of rank r, uint8 [world, bytes]: the landings by sender, at its own place the shelf. `counts[r]`: of
    rank r, int32 [2, world]: messages that have come from each rank, and own ones that each has taken.
    """

    areas: list[torch.Tensor]
    counts: list[torch.Tensor]
    owner: Any = None  # what the tensors, which own nothing, look into
    wait: Callable[[Any, torch.Tensor, int, int], None] = wait_value
    write: Callable[[Any, torch.Tensor, int, int], None] = write_value
    copy: Callable[[Any, int, int, int], None] = cuda_driver.copy


class SymmetricMessenger(CudaMessenger):
    """Between the GPUs of a group on one host. Make, begin and close it on every rank alike.

    `memory(bytes)`, `rank` and `world` stand in for the group in tests.
    """

    capturable = False  # a captured count would be true at every replay

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        *,
        rank: int = 0,
        world: int = 0,
        memory: Callable[[int], Mapped] | None = None,
    ) -> None:
        self.device = device
        if memory is None:
            self.group = group or dist.group.WORLD
            rank, world, memory = dist.get_rank(group), dist.get_world_size(group), partial(_map, self.group, device)
        self.rank, self.world, self._memory = rank, world, memory
        self._room, self._mapped, self._at = 0, Mapped([], []), list[int]()
        self._landings: dict[Any, list[torch.Tensor]] = {}
        self._out, self._in = torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device, priority=-1)
        self._sent, self._received = [0] * world, [0] * world
        self._recording = False

    def memory(self) -> Hashable:
        return self._room, *self._at

    def recording(self) -> Callable[[tuple[int, int] | None], Callable[[], None]]:
        self._recording, before = True, (list(self._sent), list(self._received))

        def end(graph: tuple[int, int] | None) -> Callable[[], None]:
            after, self._recording = (self._sent, self._received), False
            self._sent, self._received = map(list, before)  # nothing has been sent
            if graph is None:
                return lambda: None
            recorded = Recorded(*graph, places(self.rank, self._mapped.counts), before, after)
            return lambda: recorded.advance((self._sent, self._received))

        return end

    def begin(self, nbytes: int) -> bool:
        nbytes = max(1, -(-nbytes // _UNIT)) * _UNIT
        if nbytes * self.world > MOST_BYTES:
            return False
        if nbytes > self._room:
            self._settle()  # nobody uses the old memory any more
            self._mapped = Mapped([], [])
            self._landings.clear()
            self._room, self._mapped = nbytes, self._memory(nbytes)
            self._at = [area.data_ptr() for area in self._mapped.areas]
            self._sent, self._received = [0] * self.world, [0] * self.world
        self._taken = list(self._sent)  # what must be taken before this call writes to the same memory
        self._waited: set[int] = set()
        self._pushed, self._pulled = [0] * self.world, [0] * self.world  # bytes
        self._shelf: dict[int, int] = {}  # where rows at an address lie on it
        self._shelved = 0
        self._behind: list[Any] = [None, None]  # what the streams have waited for last
        return True

    def landings(self, like: torch.Tensor) -> list[torch.Tensor]:
        key = like.shape, like.dtype
        if key not in self._landings:
            nbytes = like.numel() * like.element_size()
            rows = self._mapped.areas[self.rank][:, :nbytes].view(like.dtype).view(self.world, *like.shape)
            self._landings[key] = [rows[peer] for peer in range(self.world) if peer != self.rank]
        return self._landings[key]

    def finish(self, stream: Any) -> None:
        for source, count in enumerate(self._received):
            if count:
                self._mapped.write(stream, self._mapped.counts[source], self.world + self.rank, count)

    def exchange(
        self, call: Call, after: Any, sends: Spans, receives: Spans, *, pull: bool = False
    ) -> tuple[Any | None, Any | None]:
        if sends:
            self._wait(0, self._out, after)
        for span, to in sends:
            self._put(span.address, span.nbytes, to, shelf=pull)
        gone = call.event(self._out) if sends else None
        if receives and self._recording:  # a graph may keep any order of its branches: no wait before what others need
            (gone or after).wait(self._in)
        elif receives and pull:  # their memory is free once what was queued before the product is done
            self._wait(1, self._in, after.before if isinstance(after, Counted) else after)
        for span, source in receives:
            self._take(span.address, span.nbytes, source, pull=pull)
        return gone, call.event(self._in) if receives else None

    def _wait(self, at: int, stream: Any, after: Any) -> None:
        """Once for each event: what is queued later on the stream is behind it too."""
        if self._behind[at] is not after:
            after.wait(stream)
            self._behind[at] = after

    def _put(self, address: int, nbytes: int, to: int, *, shelf: bool) -> None:
        mapped = self._mapped
        if not shelf:
            self._wait_until_taken((to,))
            low = self._pushed[to]
            self._pushed[to] = low + nbytes
            mapped.copy(self._out, self._place(to, self.rank, low, nbytes), address, nbytes)
        elif address not in self._shelf:
            self._wait_until_taken(range(self.world))
            low = self._shelf[address] = self._shelved
            self._shelved += nbytes
            mapped.copy(self._out, self._place(self.rank, self.rank, low, nbytes), address, nbytes)
        self._sent[to] += 1
        mapped.write(self._out, mapped.counts[to], self.rank, self._sent[to])

    def _place(self, rank: int, place: int, low: int, nbytes: int) -> int:
        """The address of bytes [low, low + nbytes) at a place of a rank's area."""
        if low + nbytes > self._room:
            raise UndertowError(f"bytes {low} to {low + nbytes} of a call that gives a rank at most {self._room}")
        return self._at[rank] + place * self._room + low

    def _take(self, address: int, nbytes: int, source: int, *, pull: bool) -> None:
        mapped = self._mapped
        self._received[source] += 1
        mapped.wait(self._in, mapped.counts[self.rank], source, self._received[source])
        if pull:
            low = self._pulled[source]
            self._pulled[source] = low + nbytes
            mapped.copy(self._in, address, self._place(source, source, low, nbytes), nbytes)
            mapped.write(self._in, mapped.counts[source], self.world + self.rank, self._received[source])

    def _wait_until_taken(self, peers: Any) -> None:
        for peer in peers:
            if peer not in self._waited and self._taken[peer]:
                place = self.world + peer
                self._mapped.wait(self._out, self._mapped.counts[self.rank], place, self._taken[peer])
            self._waited.add(peer)

    def _settle(self) -> None:
        if self.group is not None:
            torch.cuda.synchronize(self.device)
            dist.barrier(group=self.group, device_ids=[torch.cuda.current_device()])

    def close(self) -> None:
        """Collective: nobody unmaps what another still uses."""
        self._settle()
        self._mapped = Mapped([], [])
        self._landings.clear()


@dataclass(frozen=True)
class Seat:
    """Where a rank sits: what its driver lacks, its host, its GPU, and the number of that GPU for its process."""

    lacks: str
    host: str
    gpu: str
    index: int


def why_not(group: dist.ProcessGroup | None, device: torch.device) -> str:
    """Why the ranks of `group` cannot send this way, the same on all of them; '' when they can. Collective."""
    here = torch.cuda.current_device() if device.index is None else device.index
    seats: list[Any] = [None] * dist.get_world_size(group)
    mine = Seat(can_wait(), socket.gethostname(), str(torch.cuda.get_device_properties(here).uuid), here)
    dist.all_gather_object(seats, mine, group=group)
    if reason := apart(seats):
        return reason
    far = [seat for seat in seats if seat != mine and not torch.cuda.can_device_access_peer(here, seat.index)]
    reasons = _of_all(group, "not all GPUs reach each other's memory" if far else "")
    if not reasons:  # a container may forbid what mapping needs
        reasons = _of_all(group, _refusal(group, device))
    return reasons[0] if reasons else ""


def apart(seats: Sequence[Seat]) -> str:
    """Why ranks in these seats cannot map each other's memory, or cannot know; '' when they may."""
    if lacking := [seat.lacks for seat in seats if seat.lacks]:
        return lacking[0]
    if len({seat.host for seat in seats}) > 1:
        return "the ranks are on several hosts"
    if len({seat.gpu for seat in seats}) < len(seats):
        return "several ranks share a GPU"
    if len({seat.index for seat in seats}) < len(seats):
        return "each rank sees its own GPU only, so whether they reach each other is not known"
    return ""


def _of_all(group: dist.ProcessGroup | None, mine: str) -> list[str]:
    """Every rank's reason that is one. Collective."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return list(filter(None, found))


def _refusal(group: dist.ProcessGroup | None, device: torch.device) -> str:
    """What torch says when a little memory is to be mapped by all ranks; '' when it is."""
    import torch.distributed._symmetric_memory as symmetric

    whole = group or dist.group.WORLD
    assert whole is not None
    try:
        with _without_multicast():
            symmetric.rendezvous(symmetric.empty(_UNIT, dtype=torch.uint8, device=device), whole)
    except RuntimeError as error:
        return f"torch cannot map the GPUs' memory ({str(error).splitlines()[0]})"
    return ""


@contextmanager
def _without_multicast() -> Iterator[None]:
    """What the environment says otherwise holds again afterwards, as far as torch asks it again."""
    before = os.environ.get(_MULTICAST)
    os.environ[_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_MULTICAST]
        else:
            os.environ[_MULTICAST] = before


def _map(group: dist.ProcessGroup | None, device: torch.device, nbytes: int) -> Mapped:
    import torch.distributed._symmetric_memory as symmetric

    assert group is not None
    world = dist.get_world_size(group)
    memory = symmetric.empty(_HEAD + world * nbytes, dtype=torch.uint8, device=device)
    memory[:_HEAD].zero_()
    torch.cuda.synchronize(device)
    with _without_multicast():
        handle = symmetric.rendezvous(memory, group)
    handle.barrier()
    torch.cuda.synchronize(device)
    return Mapped(
        [handle.get_buffer(peer, (world, nbytes), torch.uint8, _HEAD) for peer in range(world)],
        [handle.get_buffer(peer, (2, world), torch.int32, 0) for peer in range(world)],
        (handle, memory),
    )
