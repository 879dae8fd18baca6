"""Merge attention over disjoint sets of keys: softmax weights follow from the log-sum-exp that each part returns.

Used by streamed backpropagation (prefix + diagonal) and by ring attention (one part per hop), after Milakov and
Gimelshein (2018) and FlashAttention. The trap is the empty row: a query that sees no key has log-sum-exp -inf, the
textbook formula then computes -inf - -inf = nan, and some kernels report 0.0 instead of -inf. Here an empty row is
always (0, -inf), and merging with it changes nothing.

Legend: B batch, H query heads, T query rows, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def empty_like(q_BHTD: Tensor, head_dim: int | None = None) -> tuple[Tensor, Tensor]:
    """The neutral element: out zero [B, H, T, `head_dim` or D], log-sum-exp -inf [B, H, T] in `lse_dtype`."""
    out = q_BHTD.new_zeros(*q_BHTD.shape[:-1], head_dim or q_BHTD.shape[-1])
    lse = torch.full(q_BHTD.shape[:-1], float("-inf"), dtype=lse_dtype(q_BHTD.dtype), device=q_BHTD.device)
    return out, lse


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; every other input type keeps its log-sum-exp in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two key sets from the attention over each.

    `out` [B, H, T, D] of any one float type, `lse` [B, H, T] in float32 or float64. The sum is formed in the type of
    `lse` and returned in the type of `out_a`. Rows empty on both sides give (0, -inf).
    """
    out, lse = merge_parts((out_a, out_b), (lse_a, lse_b))
    return out.to(out_a.dtype), lse


def merge_parts(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The same for any number of disjoint key sets, summed in their order; both results in the type of the lses.

    `outs` [..., D], types may differ; `lses` [...].
    """
    high = reduce(torch.maximum, lses)
    high = torch.where(torch.isneginf(high), torch.zeros_like(high), high)
    weights = [torch.exp(lse - high) for lse in lses]
    total = reduce(torch.add, weights)
    safe = torch.where(total == 0, torch.ones_like(total), total)
    out = outs[0].to(high.dtype) * (weights[0] / safe).unsqueeze(-1)
    for part, weight in zip(outs[1:], weights[1:]):
        out += part.to(high.dtype) * (weight / safe).unsqueeze(-1)
    return out, torch.log(total) + high
