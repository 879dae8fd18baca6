"""One time line for all ranks: each rank's monotonic clock against rank 0's, found by ping-pong.

Of many round trips the shortest counts (Cristian 1989): rank 0's answer was written at some moment within it, so half
the round trip bounds the error, however unequal the two ways are. Ranks on one kernel read the same clock and get
exactly zero. Wall clocks serve only to name the moment, never to measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .host import clock_identity


@dataclass(frozen=True)
class Clock:
    """Local monotonic seconds + `offset_s` = rank 0's monotonic seconds, within ± `error_s`.

    `epoch_s` leads on to rank 0's wall clock: pass `offset_s + epoch_s` (`to_wall_s`) to `Trace.align`.
    """

    offset_s: float = 0.0
    error_s: float = 0.0
    epoch_s: float = 0.0

    @property
    def to_wall_s(self) -> float:
        return self.offset_s + self.epoch_s


def now_s() -> float:
    """Monotonic seconds of this host."""
    return time.monotonic()


def measure(
    group: dist.ProcessGroup | None = None,
    *,
    rounds: int = 20,
    now_ns: Callable[[], int] = time.monotonic_ns,
    identity: str | None = None,
) -> Clock:
    """Measure this rank's offset to the group's first rank; all ranks of `group` call it. Needs gloo in the group.

    Takes `rounds` round trips per rank that does not share rank 0's kernel, one rank after another. `identity` names
    the clock (default: of this kernel); ranks with the same one skip the ping-pong.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mine = clock_identity() if identity is None else identity
    known: list[tuple[str, float]] = [("", 0.0)] * world
    dist.all_gather_object(known, (mine, time.time() - now_ns() / 1e9), group=group)
    (reference, epoch_s), members = known[0], dist.get_process_group_ranks(group)
    clock = Clock(epoch_s=epoch_s)
    for other in range(1, world):
        if known[other][0] == reference:
            continue
        if rank == 0:
            _answer(members[other], group, rounds, now_ns)
        elif rank == other:
            offset_s, error_s = _ask(members[0], group, rounds, now_ns)
            clock = Clock(offset_s, error_s, epoch_s)
    return clock


def _ask(root: int, group: dist.ProcessGroup | None, rounds: int, now_ns: Callable[[], int]) -> tuple[float, float]:
    message = torch.zeros(1, dtype=torch.int64)
    best_ns, offset_ns = None, 0.0
    for _ in range(rounds):
        before_ns = now_ns()
        dist.send(message, root, group=group)
        dist.recv(message, root, group=group)
        after_ns = now_ns()
        if best_ns is None or after_ns - before_ns < best_ns:
            best_ns = after_ns - before_ns
            offset_ns = int(message) - (before_ns + after_ns) / 2
    return offset_ns / 1e9, (best_ns or 0) / 2e9


def _answer(other: int, group: dist.ProcessGroup | None, rounds: int, now_ns: Callable[[], int]) -> None:
    message = torch.zeros(1, dtype=torch.int64)
    for _ in range(rounds):
        dist.recv(message, other, group=group)
        message[0] = now_ns()
        dist.send(message, other, group=group)
