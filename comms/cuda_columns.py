"""An all-reduce by pieces of columns on a GPU: a piece is summed and handed out while the next ones are made.

By rows, the own rows are made last, so every sum is handed out after the product. A piece of columns has rows for all
ranks, the own ones among them: its sum can be formed as soon as the others' parts are there, and goes out beside the
next piece's product. Sums run on a stream of their own, with priority, so that they get the first processors that a
product leaves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .chunk_plan import Block, ChunkPlan
from .cuda_events import Run
from .placement import Panel, Placement, messages
from .spans import Memory, Span

if TYPE_CHECKING:
    from .overlap_cuda import CudaOverlapEngine


def all_reduce_columns(
    engine: CudaOverlapEngine, run: Run, plan: ChunkPlan, panel: Panel | None, y_MN: torch.Tensor
) -> torch.Tensor:
    """The sum of what `panel` makes, [rows, columns]. `plan`: a `whole` one; `y`: contiguous memory of the product."""
    columns, own, current = y_MN.shape[1], plan.chunk(plan.rank), run.current
    place = Placement(plan, y_MN, alike=True)
    whole = Placement(plan, torch.empty_like(y_MN))
    fill, table = place.fill(None, panel), messages(plan, columns)
    landings = engine.messenger.landings(y_MN[slice(*plan.own)])
    y, sums, landed = Memory(y_MN), Memory(whole.y), [Memory(landing) for landing in landings]
    start = run.call.event(current)
    made, arrived, came = list[Any](), list[Any](), list[Any]()
    left = summed = None
    for part in range(plan.parts + 1):
        if part < plan.parts:
            low, high = plan.edges[part : part + 2]
            made.append(engine.make(run, part, start, fill, (Block(0, plan.rows, low, high, ()),)))
            sends = [(Span(y, first, count), to) for first, count, to in table[part].sends]
            receives = [(Span(landed[at], first, count), source) for at, first, count, source in table[part].receives]
            ends = engine.exchange(run, "partial sums", made[-1], sends, receives, part)
            left = ends[0] or left
            arrived.append(ends[1])
        if part:  # the piece before, whose parts come while this one is made
            at = part - 1
            torch.cuda.set_stream(engine.sums)
            try:
                for event in (made[at], arrived[at]):
                    if event is not None:
                        event.wait(engine.sums)
                engine.add(place, landings, own[at : at + 1], whole.y)
                summed = run.call.event(engine.sums)
            finally:
                torch.cuda.set_stream(current)
            sends = [(Span(sums, *plan_place), to) for plan_place, to in _given(whole, at)]
            receives = [(Span(sums, *plan_place), source) for plan_place, source in _taken(whole, at)]
            ends = engine.exchange(run, "sum", summed, sends, receives, at, pull=True)
            left = ends[0] or left
            came.append(ends[1])
    out = torch.empty_like(y_MN)
    engine.join(run, plan.parts)
    if summed is not None:
        summed.wait(current)
    for part, event in enumerate(came):
        if event is not None:
            event.wait(current)
        low, high = plan.edges[part : part + 2]
        out[:, low:high].copy_(whole.block(Block(0, plan.rows, low, high, ())))
    engine.messenger.finish(current)
    if left is not None:
        left.wait(current)  # before the caller may free or change y
    return out


def _given(whole: Placement, part: int) -> list[tuple[tuple[int, int], int]]:
    """((first number, how many), to whom) of the own sum of a piece."""
    own = [whole.place(piece) for piece in whole.plan.chunk(whole.plan.rank)[part : part + 1]]
    return [(here, to) for here in own if here[1] for to in whole.plan.receivers]


def _taken(whole: Placement, part: int) -> list[tuple[tuple[int, int], int]]:
    """((first number, how many), from whom) of the others' sums of a piece."""
    plan = whole.plan
    sources = [(plan.rank + step) % plan.world for step in range(1, plan.world)]
    found = [(whole.place(piece), source) for source in sources for piece in plan.chunk(source)[part : part + 1]]
    return [each for each in found if each[0][1]]
