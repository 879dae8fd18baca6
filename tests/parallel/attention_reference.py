"""Attention over the whole sequence, written out in float64: what every schedule is compared with."""

from __future__ import annotations

import torch

from undertow.parallel.masks import Mask


def visible(mask: Mask, lq: int, lk: int) -> torch.Tensor:
    """[Lq, Lk] bool, from the definition."""
    seen = torch.zeros(lq, lk, dtype=torch.bool)
    for (qa, qb), (ka, kb) in mask.documents(lq, lk):
        at = torch.arange(qa, qb)[:, None] + kb - qb
        key = torch.arange(ka, kb)[None, :]
        inside = torch.ones(qb - qa, kb - ka, dtype=torch.bool)
        if mask.causal:
            inside = (key <= at) | (key < mask.prefix)
        if mask.window is not None:
            inside &= key > at - mask.window
        seen[qa:qb, ka:kb] = inside
    return seen


def full_attention(q, k, v, mask: Mask, scale: float):
    """[B, Lq, H, D], [B, Lk, G, D], [B, Lk, G, E] → out [B, Lq, H, E] and lse [B, Lq, H]; empty rows: 0, -inf."""
    share = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(share, 2), v.repeat_interleave(share, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.masked_fill(~visible(mask, q.shape[1], k.shape[1]), float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(torch.isinf(lse), torch.zeros_like(lse), lse).unsqueeze(-1))
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse.transpose(1, 2)
