"""What the host needs to queue a product piece by piece on a GPU, measured before the gate's model is asked.

Such a call can take no less, however short its pieces are, and a GPU that has nothing else to do waits for it; the
gate's trials begin on an idle one, and with a host that has just waited: one that goes on without a pause takes half as
long. The time does not depend on the shape: a dozen calls for each piece, whatever they queue. So a product that takes
the GPU next to no time is queued in few and in many pieces; the difference is theirs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..comms.chunk_plan import chunk_rows
from .overlap_products import rows_of

if TYPE_CHECKING:
    from ..comms.overlap_cuda import CudaOverlapEngine
    from .overlap_arms import Arm

FEW, MANY, CALLS = 1, 4, 8  # pieces of a chunk; calls of each, of which the first warms up
SIDE = 64  # columns, and rows of the smallest piece


@dataclass(frozen=True)
class Queueing:
    """Seconds of the host, for a call and for each of its pieces."""

    call_s: float = 0.0
    piece_s: float = 0.0

    def seconds(self, arm: Arm, world: int) -> float:
        """The least time of an arm's call. Pieces of columns, which are made for all other ranks at once, count as one
        each, although they need more calls; 0 where one launch queues all."""
        if not arm.overlap or arm.replayed:
            return 0.0
        pieces = arm.subchunks + (not arm.whole) if arm.columns else world * arm.subchunks
        return self.call_s + pieces * self.piece_s

    @classmethod
    def of(cls, few_s: float, many_s: float, world: int) -> Queueing:
        """From the times of calls of `FEW` and `MANY` pieces of rows for each rank."""
        piece_s = max(0.0, (many_s - few_s) / ((MANY - FEW) * world))
        return cls(max(0.0, few_s - FEW * world * piece_s), piece_s)


def measure(
    engine: CudaOverlapEngine, start: Callable[[], float], now: Callable[[], float] = time.perf_counter
) -> Queueing:
    """This rank's, after `start` as before a call that the gate measures: it says when that call begins, and has waited
    for the device, or the queue may be full. Collective."""
    rows = SIDE * MANY * engine.world
    dtype = torch.bfloat16 if engine.device.type == "cuda" else torch.float32
    a, b, y = (torch.zeros(size, SIDE, dtype=dtype, device=engine.device) for size in (rows, SIDE, rows))
    middle = dict[int, float]()
    for pieces in (FEW, MANY):
        plan, times = engine.plan(chunk_rows(rows, engine.world), pieces), list[float]()
        for _ in range(CALLS):
            began_s = start()
            engine.reduce_scatter(plan, rows_of(a, b, y), y)
            times.append(now() - began_s)
        middle[pieces] = statistics.median(times[1:])
    return Queueing.of(middle[FEW], middle[MANY], engine.world)
