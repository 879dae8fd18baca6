"""The sum of what the ranks sent, in their order: one Triton pass where torch makes one for each rank and two more.

The plain reference is `comms.overlap_engine.add_pieces`, which also serves every device and type that the kernel does
not; both add in float32, first to last, and round once, so they give the same bits. The sum is the last thing that an
overlapped product does, with nothing left to hide behind. Several pieces are one launch, wherever they lie
(`comms.placement`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ...comms.chunk_plan import Piece
from ...comms.overlap_engine import add_pieces
from ...comms.placement import Placement

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU build of torch comes without Triton
    triton = None

BLOCK = 1024  # columns of a program
_MOST = 256  # plans whose edges are kept on the device
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def ordered_sum(place: Placement, landings: Sequence[Tensor], pieces: Sequence[Piece], out: Tensor) -> None:
    """As `add_pieces`; `pieces` are neighbours."""
    world, gap = place.plan.world, _gap(landings, place.plan.rank)
    edges = place.plan.edges or (0, out.shape[1])
    usable = triton is not None and out.is_cuda and out.dtype in _TYPES and world > 2 and out.numel() > 0
    on_device = _placed(edges, out.device) if usable else None
    if gap is None or on_device is None:
        add_pieces(place, landings, pieces, out)
        return
    columns, by_columns, (base, end) = out.shape[1], bool(place.plan.columns), place.plan.own
    rows = end - base
    low, high = (0, rows) if by_columns else (pieces[0].low - base, pieces[-1].high - base)
    first = pieces[0].part if by_columns else 0
    cuts = edges[first : first + len(pieces) + 1] if by_columns else edges
    blocks = -(-max(right - left for left, right in pairwise(cuts)) // BLOCK)
    compact, gap = gap
    aligned = gap % 8 == 0 and not any(edge % 8 for edge in edges)
    _sum_kernel[(high - low, (len(cuts) - 1) * blocks)](  # pyright: ignore[reportIndexIssue]
        place.own if place.apart else place.y, landings[0], out, on_device, low, first, rows, columns,
        blocks, gap, base, place.plan.rows, place.plan.rank, world, compact, place.apart, place.alike, aligned, BLOCK,
    )  # fmt: skip


_kept: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def _placed(edges: tuple[int, ...], device: torch.device) -> Tensor | None:
    """They on the device; None while a CUDA graph is captured, whose memory nobody else may read, if they are new."""
    found = _kept.get((edges, device))
    if found is None and not torch.cuda.is_current_stream_capturing():
        if len(_kept) >= _MOST:
            _kept.clear()
        found = _kept[edges, device] = torch.tensor(edges, dtype=torch.int64, device=device)
    return found


def _gap(landings: Sequence[Tensor], rank: int) -> tuple[bool, int] | None:
    """(whether the landings lie one after the other, or with a place between for this rank; numbers from one to the
    next place), None where they lie otherwise."""
    if len(landings) < 2:
        return None
    size, at = landings[0].element_size(), [landing.data_ptr() for landing in landings]
    ranks = [source for source in range(len(at) + 1) if source != rank]
    for compact, places in ((True, range(len(at))), (False, ranks)):
        gap = (at[-1] - at[0]) // (places[-1] - places[0])
        if gap % size == 0 and all(at[0] + gap * (here - places[0]) == there for here, there in zip(places, at)):
            return compact, gap // size
    return None


if triton is not None:

    @triton.jit
    def _sum_kernel(
        own, landing, out, edges, low, piece, rows, columns, blocks, gap, base, all_rows,
        RANK: tl.constexpr, WORLD: tl.constexpr, COMPACT: tl.constexpr, APART: tl.constexpr, ALIKE: tl.constexpr,
        ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = low + tl.program_id(0).to(tl.int64)
        here = edges + piece + tl.program_id(1) // blocks
        first = tl.load(here)  # of the piece's columns
        wide = tl.load(here + 1) - first
        local = tl.program_id(1) % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = local < wide
        come = first * rows + row * wide
        if APART:
            there = row * columns + first
        else:
            there = first * all_rows + (base + row) * wide
        summed = row * columns + first
        if ALIKE:
            summed = there
        if ALIGNED:
            come = tl.multiple_of(come, 8)
            there = tl.multiple_of(there, 8)
            summed = tl.multiple_of(summed, 8)
        total = tl.zeros((BLOCK,), tl.float32)
        for source in tl.static_range(WORLD):
            if source == RANK:
                part = tl.load(own + there + local, mask=inside, other=0.0)
            else:
                place = source - (RANK == 0)
                if COMPACT:
                    place = source - (source > RANK)
                part = tl.load(landing + tl.cast(gap, tl.int64) * place + come + local, mask=inside, other=0.0)
            if source == 0:
                total = part.to(tl.float32)
            else:
                total += part.to(tl.float32)
        tl.store(out + summed + local, total.to(out.dtype.element_ty), mask=inside)
