"""Fires the copies of an `OutputMap`: one communication thread waits for each piece's last tile and sends it then.

The thread issues all messages, because issuing one costs the caller time that the product needs, and because an
emulated link has to sleep. What a transport must offer is three calls (`Messenger`); gloo's is here, MPI's in
`mpi_messenger`. Receives are posted before the product starts, so that a message never waits for its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .output_map import OutputMap
from .tracker import Tracker
from .transport import Gloo, private_store


class Messenger(Protocol):
    """Messages of one rank. `post_*` are called by one thread at a time; `wait` by any."""

    rank: int
    world: int

    def post_send(self, rows: torch.Tensor, to: int, tag: int) -> Any: ...

    def post_recv(self, rows: torch.Tensor, source: int, tag: int) -> Any: ...

    def wait(self, handle: Any, timeout_s: float) -> None:
        """Until the message has arrived or left; `RuntimeError` when it does not."""
        ...

    def close(self) -> None: ...


class GlooMessenger:
    """CPU tensors over a gloo group of its own; collective to make."""

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float) -> None:
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.rank, self.world = ranks.index(dist.get_rank()), len(ranks)
        self._gloo = Gloo(private_store(group), self.rank, self.world, timeout_s)

    def post_send(self, rows: torch.Tensor, to: int, tag: int) -> Any:
        return self._gloo.group.send([rows], to, tag)

    def post_recv(self, rows: torch.Tensor, source: int, tag: int) -> Any:
        return self._gloo.group.recv([rows], source, tag)

    def wait(self, handle: Any, timeout_s: float) -> None:
        handle.wait(timedelta(seconds=timeout_s))

    def close(self) -> None:
        self._gloo.close()


def fire(
    rules: OutputMap,
    tracker: Tracker,
    epoch: int,
    send: Callable[..., Any],
    timeout_s: float,
) -> list[tuple[Any, Any]]:
    """Send every piece at the moment when its count is reached, in the map's order; (rule, handle) of each."""
    handles = []
    for rule in rules.rules:
        tracker.wait(rule.piece, epoch, timeout_s)
        handles.append((rule, send(rule)))
    return handles
