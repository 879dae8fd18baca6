"""Which backend computes each tile of a block: by measurement, or the one that the caller named, where it can."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from ...dist.errors import UserError
from ..blocks import measured
from ..blocks.select import backend as named
from ..blocks.types import Backend
from ..masks import FULL
from ..partition import rows_of
from .problem import Problem

WITH_FLEX = "auto+flex"
CHOICES = {"auto": measured.choose, WITH_FLEX: measured.choose_or_compile}


def picker(kernel: str) -> Callable[..., Backend]:
    """What chooses the backend of each tile: 'auto' measures on CUDA, a backend's name takes that one."""
    if kernel in CHOICES:
        return CHOICES[kernel]
    wanted = named(kernel)

    def pick(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None) -> Backend:
        if not wanted.supports(q, k, v, causal=causal, window=window):
            mask = f"causal={causal}, window={window}"
            raise UserError(
                f"kernel={kernel!r} for a block of {q.dtype} queries {list(q.shape)} and keys {list(k.shape)} on "
                f"{q.device}, {mask}",
                expected="a call that this backend takes (see undertow/parallel/blocks)",
                remedy="kernel='auto', which takes it only where it can",
            )
        return wanted

    return pick


def refuse_unfit(problem: Problem, name: str, kernel: str, device: torch.device) -> None:
    """`UserError` if `kernel` cannot compute some block of the schedule called `name`: the same on all ranks, and
    before any message, because a rank that stops after one leaves its peers waiting. Backends by choice fit all."""
    if kernel in CHOICES:
        return
    pick, h, inner = picker(kernel), problem.heads, problem.inner(name)
    kv_heads = h.kv_heads * problem.kv_copies(name) // inner
    one = torch.empty((), dtype=getattr(torch, h.dtype), device=device)
    done, teams = set[tuple[int, int, bool, int | None]](), range(problem.world // inner)
    for i, j in product(teams, teams):
        ends = [(0, sum(map(rows_of, spans[t * inner : (t + 1) * inner])))
                for t, spans in ((i, problem.q_spans), (j, problem.k_spans))]  # fmt: skip
        for tile in problem.tiles(i, j, inner, ends[0], ends[1]):
            call = tile.q1 - tile.q0, tile.k1 - tile.k0, tile.kind != FULL, tile.window
            if call not in done:
                done.add(call)
                rows, keys, causal, window = call
                k, v = (one.expand(h.batch, kv_heads, keys, width) for width in (h.head_dim, h.v_dim))
                pick(one.expand(h.batch, h.q_heads // inner, rows, h.head_dim), k, v, causal=causal, window=window)
