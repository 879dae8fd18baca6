"""torch's CPU flash attention, called below autograd so that its log-sum-exp can be used and replaced.

Its causal mask aligns the first query with the first key, so a chunk against its prefix is split: all keys before the
chunk without a mask, the square diagonal with it, and a merge. A sliding window needs a mask tensor there; queries
are then taken `MASK_ROWS` at a time, so that the mask stays small whatever the length. Head dims of q and v that
differ (MLA) are evened out with zeros, which change no score and are cut off again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..merge import merge

NAME = "cpu_flash"
MASK_ROWS = 512
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def supports(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, causal: bool, window: int | None) -> bool:
    return q_BHLD.device.type == "cpu" and q_BHLD.dtype in _TYPES


def _parts(lq: int, lk: int, causal: bool, window: int | None) -> list[tuple[int, int, int, int, bool, bool]]:
    """(q0, q1, k0, k1, is_causal, needs_mask): kernel calls whose key sets are disjoint for each query."""
    if window is not None:
        ends = [(q0, min(q0 + MASK_ROWS, lq)) for q0 in range(0, lq, MASK_ROWS)]
        return [(q0, q1, max(0, q0 + lk - lq - window + 1), q1 + lk - lq, False, True) for q0, q1 in ends]
    if not causal:
        return [(0, lq, 0, lk, False, False)]
    diagonal = (0, lq, lk - lq, lk, True, False)
    return [diagonal] if lq == lk else [(0, lq, 0, lk - lq, False, False), diagonal]


def _mask(q: Tensor, q0: int, q1: int, k0: int, k1: int, offset: int, window: int) -> Tensor:
    position = torch.arange(q0 + offset, q1 + offset)[:, None]
    key = torch.arange(k0, k1)[None, :]
    hidden = (key > position) | (key <= position - window)
    return torch.zeros(q1 - q0, k1 - k0, dtype=q.dtype).masked_fill_(hidden, float("-inf"))


def _even(t: Tensor, width: int) -> Tensor:
    return t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1]))


def forward(
    q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, scale: float, causal: bool, window: int | None = None
) -> tuple[Tensor, Tensor]:
    lq, lk, width = q_BHLD.shape[2], k_BGLD.shape[2], max(q_BHLD.shape[3], v_BGLE.shape[3])
    q, k, v = (_even(t, width) for t in (q_BHLD, k_BGLD, v_BGLE))
    results = []
    for q0, q1, k0, k1, is_causal, masked in _parts(lq, lk, causal, window):
        mask = _mask(q, q0, q1, k0, k1, lk - lq, window) if masked and window is not None else None
        out, lse = _forward(q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], 0.0, is_causal, attn_mask=mask, scale=scale)
        results.append((out, lse))
    if window is not None:
        out, lse = (torch.cat(parts, dim=2) for parts in zip(*results))
    else:
        out, lse = results[0] if len(results) == 1 else merge(*results[0], *results[1])
    return out[..., : v_BGLE.shape[3]], lse


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
    lq, lk, width = q_BHLD.shape[2], k_BGLD.shape[2], max(q_BHLD.shape[3], v_BGLE.shape[3])
    dout, q, k, v, out = (_even(t, width) for t in (dout_BHLE, q_BHLD, k_BGLD, v_BGLE, out_BHLE))
    parts = _parts(lq, lk, causal, window)
    if len(parts) == 1 and window is None:
        grads = _backward(dout.contiguous(), q, k, v, out, lse_BHL, 0.0, causal, scale=scale)
        return tuple(g[..., : t.shape[3]] for g, t in zip(grads, (q_BHLD, k_BGLD, v_BGLE)))  # type: ignore
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    for q0, q1, k0, k1, is_causal, masked in parts:
        mask = _mask(q, q0, q1, k0, k1, lk - lq, window) if masked and window is not None else None
        part = _backward(
            dout[:, :, q0:q1].contiguous(),
            q[:, :, q0:q1],
            k[:, :, k0:k1],
            v[:, :, k0:k1],
            out[:, :, q0:q1],
            lse_BHL[:, :, q0:q1],
            0.0,
            is_causal,
            attn_mask=mask,
            scale=scale,
        )
        dq[:, :, q0:q1] += part[0]
        dk[:, :, k0:k1] += part[1]
        dv[:, :, k0:k1] += part[2]
    return dq[..., : q_BHLD.shape[3]], dk[..., : k_BGLD.shape[3]], dv[..., : v_BGLE.shape[3]]
