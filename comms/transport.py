"""How one rank's messages travel: gloo with tags, or NCCL with one communicator for each pair of lanes.

gloo keeps messages apart by tag, so receives may be posted long before their turn. NCCL has no tags, matches by order,
and runs everything of one communicator one after the other; with a shared one a message would wait behind an unrelated
one, and the two directions of a pair could even deadlock. So each (sender's lane, receiver's lane) gets a communicator
of two ranks, which makes NCCL behave as lanes whose sends wait for their receive: what `check(rendezvous=True)` proves.
Communicators are opened in one global order, because opening one blocks until its other end opens it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .actions import Recv, Send
from .graph import Graph


class Transport(Protocol):
    """Issues the messages of one rank; called from one thread at a time, except `wait`."""

    prepost: bool  # may a receive be issued before its turn?

    def prepare(self, graph: Graph) -> Mapping[int, Any]:
        """An address for every message that this rank sends or receives, by node; collective."""
        ...

    def issue(self, address: Any, action: Send | Recv, rows: Sequence[torch.Tensor]) -> list[Any]:
        """Start to send or receive the rows; returns what `wait` needs."""
        ...

    def wait(self, works: list[Any], timeout_s: float) -> None:
        """CPU: block until they are complete. CUDA: order the current stream behind them."""
        ...

    def close(self) -> None: ...


def new_group(ranks: Sequence[int], backend: str, timeout_s: float) -> dist.ProcessGroup:
    """A process group of the given global ranks, which alone must call this."""
    group = dist.new_group(
        list(ranks), timeout=timedelta(seconds=timeout_s), backend=backend, use_local_synchronization=True
    )
    assert isinstance(group, dist.ProcessGroup)
    return group


class Gloo:
    """CPU tensors over one gloo group of its own, so that no other traffic can be matched with ours."""

    prepost = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def prepare(self, graph: Graph) -> Mapping[int, int]:
        """A tag for each slice of each message, the same at both ends."""
        sends = sorted(
            (node.rank, node.action.to, node.action.tag, node.id)
            for node in graph.nodes
            if isinstance(node.action, Send)
        )
        tags: dict[int, int] = {}
        count = 0
        for *_, node in sends:
            tags[node] = tags[graph.partner[node]] = count
            count += len(graph.nodes[node].action.reads)
        return tags

    def issue(self, address: int, action: Send | Recv, rows: Sequence[torch.Tensor]) -> list[Any]:
        if isinstance(action, Send):
            return [
                dist.isend(part, group=self.group, group_dst=action.to, tag=address + at)
                for at, part in enumerate(rows)
            ]
        return [
            dist.irecv(part, group=self.group, group_src=action.source, tag=address + at)
            for at, part in enumerate(rows)
        ]

    def wait(self, works: list[Any], timeout_s: float) -> None:
        for work in works:
            work.wait(timedelta(seconds=timeout_s))

    def close(self) -> None:
        """The group belongs to the executor."""


class Nccl:
    """CUDA tensors over communicators of two ranks, one for each pair of lanes that exchange messages."""

    prepost = False

    def __init__(self, ranks: Sequence[int], rank: int, device: torch.device, timeout_s: float) -> None:
        self.ranks, self.rank, self.device, self.timeout_s = list(ranks), rank, device, timeout_s
        self._channels: dict[tuple[int, str, int, str], dist.ProcessGroup] = {}

    def prepare(self, graph: Graph) -> Mapping[int, dist.ProcessGroup]:
        """A communicator for each pair of lanes; new ones are opened, each with one small message."""
        channels: dict[tuple[int, str, int, str], list[int]] = {}
        for node in graph.nodes:
            if isinstance(node.action, Send) and self.rank in (node.rank, node.action.to):
                other = graph.nodes[graph.partner[node.id]]
                channels.setdefault((node.rank, node.lane, other.rank, other.lane), []).extend([node.id, other.id])
        for channel in sorted(set(channels) - set(self._channels)):
            self._channels[channel] = self._open(channel[0], channel[2])
        return {node: self._channels[channel] for channel, nodes in channels.items() for node in nodes}

    def _open(self, source: int, to: int) -> dist.ProcessGroup:
        ends = [self.ranks[source], self.ranks[to]]
        group = new_group(sorted(ends), "nccl", self.timeout_s)
        probe = torch.zeros(1, dtype=torch.uint8, device=self.device)
        if self.rank == source:
            dist.send(probe, ends[1], group=group)
        else:
            dist.recv(probe, ends[0], group=group)
        torch.cuda.current_stream(self.device).synchronize()  # once per communicator: it is open at both ends
        return group

    def issue(self, address: dist.ProcessGroup, action: Send | Recv, rows: Sequence[torch.Tensor]) -> list[Any]:
        if isinstance(action, Send):
            return [dist.isend(part, self.ranks[action.to], group=address) for part in rows]
        return [dist.irecv(part, self.ranks[action.source], group=address) for part in rows]

    def wait(self, works: list[Any], timeout_s: float) -> None:
        for work in works:
            work.wait()  # makes the current stream wait; the host goes on

    def close(self) -> None:
        for group in self._channels.values():
            dist.destroy_process_group(group)
        self._channels.clear()
