"""How one rank's messages travel: gloo with tags, or NCCL with one communicator for each pair of lanes.

gloo keeps messages apart by tag, so receives may be posted long before their turn. NCCL has no tags, matches by order,
and runs everything of one communicator one after the other; with a shared one a message would wait behind an unrelated
one, and the two directions of a pair could even deadlock. So each (sender's lane, receiver's lane) gets a communicator
of two ranks, which makes NCCL behave as lanes whose sends wait for their receive: what `check(rendezvous=True)` proves.
Communicators are opened in one global order, because opening one blocks until its other end opens it too.

A message of several slices (keys and values) is one NCCL group: one kernel, one event and one wait at either end, where
a call for each slice would take as many. NCCL pairs the slices of a group in order, which both ends share.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .actions import Recv, Send
from .graph import Graph

Channel = tuple[int, str, int, str]  # sender, its lane, receiver, its lane


class Transport(Protocol):
    """Issues the messages of one rank; called from one thread at a time, except `wait`."""

    prepost: bool  # may a receive be issued before its turn?

    def prepare(self, graph: Graph) -> Mapping[int, Any]:
        """An address for every message that this rank sends or receives, by node; collective."""
        ...

    def issue(self, address: Any, action: Send | Recv, rows: Sequence[torch.Tensor]) -> list[dist.Work]:
        """Start to send or receive the rows; returns what `wait` needs."""
        ...

    def wait(self, works: list[dist.Work], timeout_s: float) -> None:
        """CPU: block until they are complete. CUDA: order the current stream behind them."""
        ...

    def close(self) -> None: ...


def private_store(group: dist.ProcessGroup | None) -> dist.Store:
    """A key space that the ranks of `group` share and nobody else uses; collective.

    Our process groups are made upon it directly. `dist.new_group` would ask the ranks outside of `group` to call it
    too, or (with local synchronisation) derive its name from the number of groups that each rank has made so far, and
    hang when ranks differ in that.
    """
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, group_src=0, group=group)
    return dist.PrefixStore(f"undertow/{name[0]}", dist.distributed_c10d._get_default_store())


def tags_of(graph: Graph) -> dict[int, int]:
    """A tag for the first slice of each message, the others follow; by node, the same at both ends."""
    sends = sorted(
        (node.rank, node.action.to, node.action.tag, node.id) for node in graph.nodes if isinstance(node.action, Send)
    )
    tags: dict[int, int] = {}
    count = 0
    for *_, node in sends:
        tags[node] = tags[graph.partner[node]] = count
        count += len(graph.nodes[node].action.reads)
    return tags


class Gloo:
    """CPU tensors over one gloo group of its own, so that no other traffic can be matched with ours."""

    prepost = True

    def __init__(self, store: dist.Store, rank: int, world: int, timeout_s: float) -> None:
        own = dist.PrefixStore("gloo", store)
        self.group: Any = dist.ProcessGroupGloo(own, rank, world, timedelta(seconds=timeout_s))

    def prepare(self, graph: Graph) -> Mapping[int, int]:
        return tags_of(graph)

    def issue(self, address: int, action: Send | Recv, rows: Sequence[torch.Tensor]) -> list[dist.Work]:
        if isinstance(action, Send):
            return [self.group.send([part], action.to, address + at) for at, part in enumerate(rows)]
        return [self.group.recv([part], action.source, address + at) for at, part in enumerate(rows)]

    def wait(self, works: list[dist.Work], timeout_s: float) -> None:
        for work in works:
            work.wait(timedelta(seconds=timeout_s))

    def gather(self, mine: torch.Tensor, timeout_s: float) -> list[torch.Tensor]:
        """Every rank's tensor, in rank order. `RuntimeError` when one has not come in time."""
        found = [torch.empty_like(mine) for _ in range(self.group.size())]
        self.group.allgather([found], [mine]).wait(timedelta(seconds=timeout_s))
        return found

    def close(self) -> None:
        self.group.shutdown()


def _grouped(group: Any, rows: Sequence[torch.Tensor], *, sending: bool) -> dist.Work:
    """All rows as one NCCL group of a communicator of two, whose sender is rank 0."""
    group._start_coalescing()
    try:
        for part in rows:
            if sending:
                group.send([part], 1, 0)
            else:
                group.recv([part], 0, 0)
    finally:  # a group that stays open would swallow every later call of this thread
        work = group._end_coalescing()
    return work


class Nccl:
    """CUDA tensors over communicators of two ranks, one for each pair of lanes that exchange messages."""

    prepost = False

    def __init__(
        self, store: dist.Store, ranks: Sequence[int], rank: int, device: torch.device, timeout_s: float
    ) -> None:
        self.store, self.ranks, self.rank, self.device, self.timeout_s = store, ranks, rank, device, timeout_s
        self._channels: dict[Channel, Any] = {}

    def prepare(self, graph: Graph) -> Mapping[int, Any]:
        """A communicator for each pair of lanes; new ones are opened, each with one small message."""
        channels: dict[Channel, list[int]] = {}
        for node in graph.nodes:
            if isinstance(node.action, Send) and self.rank in (node.rank, node.action.to):
                other = graph.nodes[graph.partner[node.id]]
                channels.setdefault((node.rank, node.lane, other.rank, other.lane), []).extend([node.id, other.id])
        for channel in sorted(set(channels) - set(self._channels)):
            self._channels[channel] = self._open(channel)
        return {node: self._channels[channel] for channel, nodes in channels.items() for node in nodes}

    def _open(self, channel: Channel) -> Any:
        options: Any = dist.ProcessGroupNCCL.Options()
        options.is_high_priority_stream = (
            True  # a hop beside attention gets the first free multiprocessors, not the last
        )
        options._timeout = timedelta(seconds=self.timeout_s)
        options.global_ranks_in_group = [self.ranks[channel[0]], self.ranks[channel[2]]]
        options.group_name = "undertow " + " ".join(map(str, channel))
        store = dist.PrefixStore(options.group_name, self.store)
        sending = self.rank == channel[0]
        group: Any = dist.ProcessGroupNCCL(store, 0 if sending else 1, 2, options)  # the sender is rank 0 of the two
        probe = torch.zeros(1, dtype=torch.uint8, device=self.device)
        _grouped(group, [probe], sending=sending).wait()  # as messages are: torch keeps another one for lone calls
        torch.cuda.current_stream(self.device).synchronize()  # once per communicator: it is open at both ends
        return group

    def issue(self, address: Any, action: Send | Recv, rows: Sequence[torch.Tensor]) -> list[dist.Work]:
        return [_grouped(address, rows, sending=isinstance(action, Send))]

    def wait(self, works: list[dist.Work], timeout_s: float) -> None:
        for work in works:
            work.wait()  # makes the current stream wait; the host goes on

    def close(self) -> None:
        for group in self._channels.values():
            group.shutdown()
        self._channels.clear()
