"""The definition of block attention: every score written out, in the precision of the inputs or better.

Slow, quadratic in memory and obviously right; the other backends are tested against it in float64. It is never chosen
for a run.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "reference"


def supports(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, causal: bool, window: int | None) -> bool:
    return True


def visible(lq: int, lk: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """[Lq, Lk] bool: which key each query sees."""
    position = torch.arange(lk - lq, lk, device=device)[:, None]
    key = torch.arange(lk, device=device)[None, :]
    seen = torch.ones(lq, lk, dtype=torch.bool, device=device)
    if causal:
        seen &= key <= position
    if window is not None:
        seen &= key > position - window
    return seen


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, window: int | None) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.mT) * scale
    return scores.masked_fill(~visible(q.shape[2], k.shape[2], causal, window, q.device), float("-inf"))


def forward(
    q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, scale: float, causal: bool, window: int | None = None
) -> tuple[Tensor, Tensor]:
    q, k, v = (t if t.dtype == torch.float64 else t.float() for t in (q_BHLD, k_BGLD, v_BGLE))
    scores = _scores(q, k, scale, causal, window)
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.exp(scores - lse.unsqueeze(-1)) @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return out.to(q_BHLD.dtype), lse


def backward(
    dout_BHLE: Tensor,
    q_BHLD: Tensor,
    k_BGLD: Tensor,
    v_BGLE: Tensor,
    out_BHLE: Tensor,
    lse_BHL: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (
        t if t.dtype == torch.float64 else t.float() for t in (dout_BHLE, q_BHLD, k_BGLD, v_BGLE, out_BHLE)
    )
    share = q.shape[1] // k.shape[1]
    weights = torch.exp(_scores(q, k, scale, causal, window) - lse_BHL.unsqueeze(-1))
    dv = weights.mT @ dout
    dweights = dout @ v.repeat_interleave(share, dim=1).mT
    dscores = weights * (dweights - (dout * out).sum(-1, keepdim=True)) * scale
    dq = dscores @ k.repeat_interleave(share, dim=1)
    dk = dscores.mT @ q
    dk = dk.unflatten(1, (-1, share)).sum(2)
    dv = dv.unflatten(1, (-1, share)).sum(2)
    return dq.to(q_BHLD.dtype), dk.to(k_BGLD.dtype), dv.to(v_BGLE.dtype)
