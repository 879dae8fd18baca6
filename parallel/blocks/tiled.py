"""Block attention in plain torch, tile by tile: any device, any float type, memory bounded by one tile of scores.

The fallback where no kernel fits (float32 on CUDA, a head dimension that flash kernels refuse), and the second
opinion in tests. Scores are formed in float32 (float64 for float64 inputs); a tile holds at most `TILE_SCORES` of
them over all heads, so that memory does not grow with the number of keys. Tiles that no query of the row block can
see are skipped, which gives causal and sliding-window calls their saving.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..merge import lse_dtype

NAME = "tiled"
TILE_SCORES = 1 << 24
ROWS = 512


def supports(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, causal: bool, window: int | None) -> bool:
    return True


def _tiles(
    q: Tensor, k: Tensor, causal: bool, window: int | None
) -> Iterator[tuple[int, int, list[tuple[int, int, Tensor | None]]]]:
    """Row blocks (q0, q1) and for each the key tiles (k0, k1, mask or None) that some row of it sees."""
    lq, lk = q.shape[2], k.shape[2]
    width = max(1, TILE_SCORES // (q.shape[0] * q.shape[1] * min(ROWS, lq)))
    for q0 in range(0, lq, ROWS):
        q1 = min(q0 + ROWS, lq)
        first, last = q0 + lk - lq, q1 - 1 + lk - lq  # positions of the block's outer rows
        low = max(0, first - window + 1) if window is not None else 0
        high = last + 1 if causal else lk
        tiles = []
        for k0 in range(low, high, width):
            k1 = min(k0 + width, high)
            whole = (not causal or k1 - 1 <= first) and (window is None or k0 > last - window)
            mask = None
            if not whole:
                position = torch.arange(first, last + 1, device=q.device)[:, None]
                key = torch.arange(k0, k1, device=q.device)[None, :]
                mask = key <= position if causal else torch.ones_like(key <= position)
                if window is not None:
                    mask &= key > position - window
            tiles.append((k0, k1, mask))
        yield q0, q1, tiles


def _grouped(t_BHLD: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """[B, H, L, D] to [B, G, H/G * L, D]: the heads that share a key head stand under one another."""
    b, h, length, d = t_BHLD.shape
    return t_BHLD.to(dtype).reshape(b, groups, h // groups * length, d)


def _score(q: Tensor, k: Tensor, scale: float, mask: Tensor | None, share: int) -> Tensor:
    scores = (q @ k.mT) * scale
    if mask is not None:
        scores = scores.unflatten(2, (share, -1)).masked_fill(~mask, float("-inf")).flatten(2, 3)
    return scores


def forward(
    q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, scale: float, causal: bool, window: int | None = None
) -> tuple[Tensor, Tensor]:
    dtype = lse_dtype(q_BHLD.dtype)
    groups, share = k_BGLD.shape[1], q_BHLD.shape[1] // k_BGLD.shape[1]
    out = q_BHLD.new_empty(*q_BHLD.shape[:3], v_BGLE.shape[3])
    lse = torch.empty(q_BHLD.shape[:3], dtype=dtype, device=q_BHLD.device)
    for q0, q1, tiles in _tiles(q_BHLD, k_BGLD, causal, window):
        q = _grouped(q_BHLD[:, :, q0:q1], groups, dtype)
        top = torch.full((*q.shape[:3], 1), float("-inf"), dtype=dtype, device=q.device)
        total, value = torch.zeros_like(top), 0.0
        for k0, k1, mask in tiles:
            scores = _score(q, k_BGLD[:, :, k0:k1].to(dtype), scale, mask, share)
            higher = torch.maximum(top, scores.amax(-1, keepdim=True))
            shift = torch.where(torch.isneginf(higher), torch.zeros_like(higher), higher)
            weights, decay = torch.exp(scores - shift), torch.exp(top - shift)
            total = total * decay + weights.sum(-1, keepdim=True)
            value = value * decay + weights @ v_BGLE[:, :, k0:k1].to(dtype)
            top = higher
        out[:, :, q0:q1] = (value / total).reshape(*q_BHLD.shape[:2], q1 - q0, -1).to(out.dtype)
        lse[:, :, q0:q1] = (top + torch.log(total)).reshape(*q_BHLD.shape[:2], q1 - q0)
    return out, lse


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
    dtype = lse_dtype(q_BHLD.dtype)
    groups, share = k_BGLD.shape[1], q_BHLD.shape[1] // k_BGLD.shape[1]
    dq = torch.empty_like(q_BHLD)
    dk = torch.zeros(k_BGLD.shape, dtype=dtype, device=k_BGLD.device)
    dv = torch.zeros(v_BGLE.shape, dtype=dtype, device=v_BGLE.device)
    for q0, q1, tiles in _tiles(q_BHLD, k_BGLD, causal, window):
        q = _grouped(q_BHLD[:, :, q0:q1], groups, dtype)
        dout = _grouped(dout_BHLE[:, :, q0:q1], groups, dtype)
        delta = (dout * _grouped(out_BHLE[:, :, q0:q1], groups, dtype)).sum(-1, keepdim=True)
        lse = lse_BHL[:, :, q0:q1].reshape(*q.shape[:3], 1)
        dq_rows = torch.zeros_like(q)
        for k0, k1, mask in tiles:
            k, v = k_BGLD[:, :, k0:k1].to(dtype), v_BGLE[:, :, k0:k1].to(dtype)
            weights = torch.exp(_score(q, k, scale, mask, share) - lse)
            dscores = weights * (dout @ v.mT - delta) * scale
            dq_rows += dscores @ k
            dk[:, :, k0:k1] += dscores.mT @ q
            dv[:, :, k0:k1] += weights.mT @ dout
        dq[:, :, q0:q1] = dq_rows.reshape(*q_BHLD.shape[:2], q1 - q0, -1).to(dq.dtype)
    return dq, dk.to(k_BGLD.dtype), dv.to(v_BGLE.dtype)
