"""Products that count their finished tiles in the memory of a GPU, as the tracker of such a product.

The counts of a plan live as long as it is used, and only grow: a piece is finished in its e-th call when its count has
reached the tiles of e calls. A product that could not be queued leaves counts that nobody knows, so they are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .chunk_plan import ChunkPlan, Piece
from .cuda_events import Run
from .stream_wait import Counted

# Queue the whole product, the given rows first to last, on the current stream, and have it add 1 to counters[i] as each
# tile of the i-th is in memory; returns their numbers of tiles.
Tracked = Callable[[Sequence[tuple[int, int]], torch.Tensor], Sequence[int]]
_KEPT = 64  # plans whose counts are kept


@dataclass
class Held:
    """Of one plan: how far every piece has come on the device, and how far it must come."""

    counts: torch.Tensor
    need: list[int]


class Counts:
    """Of the plans of one engine."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held: dict[ChunkPlan, Held] = {}

    def queue(self, run: Run, plan: ChunkPlan, tracked: Tracked, start: Any) -> dict[Piece, Counted]:
        """Queue the whole product on the current stream; what each piece's reader must wait for."""
        order = plan.scatter_order
        held = self.held.pop(plan, None)
        if held is None:
            held = Held(torch.zeros(len(order), dtype=torch.int32, device=self.device), [0] * len(order))
            start = run.call.event(run.current)  # behind the zeros
        tiles = tracked([(piece.low, piece.high) for piece in order], held.counts)
        held.need = [before + new for before, new in zip(held.need, tiles)]
        self.held[plan] = held
        if len(self.held) > _KEPT:
            del self.held[next(iter(self.held))]
        return {piece: Counted(start, held.counts, at, held.need[at]) for at, piece in enumerate(order)}
