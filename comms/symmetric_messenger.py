"""What carries the pieces of a product between GPUs of one host: copy engines into the peers' memory, no processor.

Every rank owns slots for what each other rank sends it, in torch's symmetric memory, which all of them map. A sender
copies into the receiver's slot and then writes the number of what has come beside it; the receiver's stream waits for
that number, copies the slot to where the rows belong, and writes back how much is free again. Waits and writes are
stream operations of the CUDA driver (`stream_wait`): neither host nor processor takes part, so a product that runs
meanwhile keeps all of its own. A message longer than a slot goes in slots' parts, one coming while the other leaves.

Sends and receives of an exchange are queued in turns, `SLOTS` sends ahead of the receives: a send waits only for a
receive that the other rank queued before its own send of the same part. Streams that share one hardware queue
(CUDA_DEVICE_MAX_CONNECTIONS=1) therefore cost overlap and cannot deadlock.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist

from .cuda_messengers import Rows
from .stream_wait import Counted, can_wait, wait_value, write_value

SLOTS = 2  # for each pair of ranks
SLOT_BYTES = 32 << 20


@dataclass
class Mapped:
    """Memory that all ranks map, and how streams talk through it.

    `slots[r]`: of rank r, uint8 [world, SLOTS, bytes], by the rank that fills them. `counts[r]`: of rank r, int32
    [2, world]: parts that have come from each rank, and parts sent to each that are consumed there.
    """

    slots: list[torch.Tensor]
    counts: list[torch.Tensor]
    owner: Any = None  # what the tensors, which own nothing, look into
    wait: Callable[[Any, torch.Tensor, int, int], None] = wait_value
    write: Callable[[Any, torch.Tensor, int, int], None] = write_value


class SymmetricMessenger:
    """Between the GPUs of a group on one host. Collective to make; `mapped` for tests."""

    capturable = False  # a captured count would be true at every replay

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        *,
        slot_bytes: int = SLOT_BYTES,
        rank: int | None = None,
        mapped: Mapped | None = None,
    ) -> None:
        self.group, self.device = (group if mapped else group or dist.group.WORLD), device
        self._mapped = mapped or _map(group, device, slot_bytes)
        self.world = len(self._mapped.slots)
        self.rank = dist.get_rank(group) if rank is None else rank
        self._slot_bytes = self._mapped.slots[0].shape[2]
        self._out, self._in = torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device, priority=-1)
        self._sent, self._received = [0] * self.world, [0] * self.world

    def exchange(self, after: Any, sends: Rows, receives: Rows) -> list[Any]:
        leaving = [(part, to) for rows, to in sends for part in self._parts(rows)]
        coming = [(part, source) for rows, source in receives for part in self._parts(rows)]
        if leaving:
            after.wait(self._out)
        if coming:  # their memory is free once what was queued before the product is done
            (after.before if isinstance(after, Counted) else after).wait(self._in)
        turns = chain.from_iterable(
            (leaving[at : at + 1], coming[at - SLOTS + 1 : at - SLOTS + 2] if at >= SLOTS - 1 else [])
            for at in range(max(len(leaving), len(coming) + SLOTS - 1))
        )
        for at, turn in enumerate(turns):
            for part, other in turn:
                (self._receive if at % 2 else self._send)(part, other)
        streams = ((self._out, leaving), (self._in, coming))
        return [stream.record_event() for stream, parts in streams if parts]

    def _parts(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return rows.view(-1).view(torch.uint8).split(self._slot_bytes)

    def _send(self, part: torch.Tensor, to: int) -> None:
        number, mapped = self._sent[to], self._mapped
        self._sent[to] += 1
        with torch.cuda.stream(self._out):
            if number >= SLOTS:
                mapped.wait(self._out, mapped.counts[self.rank], self.world + to, number - SLOTS + 1)
            mapped.slots[to][self.rank, number % SLOTS, : len(part)].copy_(part, non_blocking=True)
            mapped.write(self._out, mapped.counts[to], self.rank, number + 1)

    def _receive(self, part: torch.Tensor, source: int) -> None:
        number, mapped = self._received[source], self._mapped
        self._received[source] += 1
        with torch.cuda.stream(self._in):
            mapped.wait(self._in, mapped.counts[self.rank], source, number + 1)
            part.copy_(mapped.slots[self.rank][source, number % SLOTS, : len(part)], non_blocking=True)
            mapped.write(self._in, mapped.counts[source], self.world + self.rank, number + 1)

    def close(self) -> None:
        """Collective: nobody unmaps what another still writes to."""
        if self.group is not None:
            torch.cuda.synchronize(self.device)
            dist.barrier(group=self.group, device_ids=[torch.cuda.current_device()])
        self._mapped = Mapped([], [])


def why_not(group: dist.ProcessGroup | None, device: torch.device) -> str:
    """Why the ranks of `group` cannot send this way, the same on all of them; '' when they can. Collective."""
    here = torch.cuda.current_device() if device.index is None else device.index
    mine = (can_wait(), socket.gethostname(), str(torch.cuda.get_device_properties(here).uuid), here)
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    reasons = [reason for reason, *_ in everyone if reason]
    if len({host for _, host, *_ in everyone}) > 1:
        reasons.append("the ranks are on several hosts")
    if len({card for *_, card, _ in everyone}) < len(everyone):
        reasons.append("several ranks share a GPU")
    elif len({index for *_, index in everyone}) < len(everyone):
        reasons.append("each rank sees its own GPU only, so whether they reach each other is not known")
    else:
        reach = all(torch.cuda.can_device_access_peer(here, i) for *_, i in everyone if i != here)
        everyone_reach: list[Any] = [None] * len(everyone)
        dist.all_gather_object(everyone_reach, reach, group=group)
        reasons += [] if all(everyone_reach) else ["not all GPUs reach each other's memory"]
    return "; ".join(dict.fromkeys(reasons))


def _map(group: dist.ProcessGroup | None, device: torch.device, slot_bytes: int) -> Mapped:
    import torch.distributed._symmetric_memory as symmetric

    whole = group or dist.group.WORLD
    assert whole is not None
    world, head = dist.get_world_size(whole), 4096  # bytes before the slots, for the counts
    shape = (world, SLOTS, slot_bytes)
    memory = symmetric.empty(head + world * SLOTS * slot_bytes, dtype=torch.uint8, device=device)
    memory[:head].zero_()
    torch.cuda.synchronize(device)
    handle = symmetric.rendezvous(memory, whole)
    handle.barrier()
    torch.cuda.synchronize(device)
    return Mapped(
        [handle.get_buffer(peer, shape, torch.uint8, head) for peer in range(world)],
        [handle.get_buffer(peer, (2, world), torch.int32, 0) for peer in range(world)],
        (handle, memory),
    )
