"""A block of attention as one call of FlexAttention, where its mask takes other kernels a call for each tile.

Packed documents, windows and prefixes cut a block into many tiles; each costs a launch, and results of tiles that share
rows are merged. Whatever the layout, the keys that a query sees are one run of positions, which is the form that
`blocks.flex` takes. Which of the two is faster is measured for each block (see `blocks.measured`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..blocks import flex
from ..blocks.flex import Plan, Seen
from ..masks import Mask
from ..partition import Span, positions_of
from .problem import Problem

FEWEST_TILES = 4  # with fewer the tiles' kernels are faster than a compiled one


def seen(q_spans: Sequence[Span], k_spans: Sequence[Span], mask: Mask, lq: int, lk: int) -> Seen:
    """(low, high [query rows], at [key rows]) int32 on the CPU: row i sees the keys with low[i] <= at < high[i]."""
    position, at = positions_of(q_spans), positions_of(k_spans)
    documents = mask.documents(lq, lk)
    starts = torch.tensor([q_start for (q_start, _), _ in documents if q_start < lq])
    # of documents that begin at one place all but the last are empty
    which = torch.searchsorted(starts, position, right=True) - 1
    (q_stop, k_start, k_stop) = (
        torch.tensor(ends)[which] for ends in zip(*((q[1], *k) for q, k in documents if q[0] < lq))
    )
    low, high = k_start, k_stop
    if mask.causal:
        own = position + k_stop - q_stop  # where the query stands among the keys
        high = torch.minimum(k_stop, torch.maximum(own + 1, torch.full_like(own, mask.prefix)))
        if mask.window is not None:
            low = torch.maximum(k_start, own - mask.window + 1)
    return low.to(torch.int32), high.to(torch.int32), at.to(torch.int32)


def plan_of(problem: Problem, inner: int, block: Mapping[str, int], device: torch.device) -> Plan:
    """FlexAttention's plan for a block, by the parameters of its operation."""
    place = (block["q"], block["k"], inner, (block["q0"], block["q1"]), (block["k0"], block["k1"]))
    low, high, at = (x.to(device) for x in seen(*problem.rows(*place), problem.mask, problem.lq, problem.lk))
    return flex.plan((low, high, at))
