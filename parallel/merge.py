"""Merge attention over disjoint sets of keys: softmax weights follow from the log-sum-exp that each part returns.

Used by streamed backpropagation (prefix + diagonal) and by ring attention (one part per hop), after Milakov and
Gimelshein (2018) and FlashAttention. The trap is the empty row: a query that sees no key has log-sum-exp -inf, the
textbook formula then computes -inf - -inf = nan, and some kernels report 0.0 instead of -inf. Here an empty row is
always (0, -inf), and merging with it changes nothing.

Legend: B batch, H query heads, T query rows, D head dim.
"""

from __future__ import annotations

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
    high = torch.maximum(lse_a, lse_b)
    high = torch.where(torch.isneginf(high), torch.zeros_like(high), high)
    weight_a, weight_b = torch.exp(lse_a - high), torch.exp(lse_b - high)
    total = weight_a + weight_b
    safe = torch.where(total == 0, torch.ones_like(total), total)
    out = out_a.to(lse_a.dtype) * (weight_a / safe).unsqueeze(-1) + out_b.to(lse_a.dtype) * (weight_b / safe).unsqueeze(
        -1
    )
    return out.to(out_a.dtype), torch.log(total) + high
