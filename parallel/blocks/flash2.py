"""FlashAttention-2 as torch ships it for CUDA, called through aten in the variable-length layout.

That layout aligns causal masks to the last key (what a chunk against its prefix needs), takes grouped heads and
sliding windows as they are, and runs all documents of a row in one call: `forward_packed` and `backward_packed`.
`torch.nn.attention.varlen` wraps the same operator, but its signature changed between releases and it hides the
backward that takes a merged log-sum-exp. Rows of a batch are separate calls: a prefix of each row is no contiguous
block, and long sequences come with small batches.

Legend: as `types`; N rows of all segments of one batch row, S segments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "flash2"
_forward = torch.ops.aten._flash_attention_forward.default
_backward = torch.ops.aten._flash_attention_backward.default


def supports(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, causal: bool, window: int | None) -> bool:
    width = max(q_BHLD.shape[3], v_BGLE.shape[3])
    return (
        q_BHLD.is_cuda
        and q_BHLD.dtype in (torch.bfloat16, torch.float16)
        and width <= 256
        and width % 8 == 0
        and torch.cuda.get_device_capability(q_BHLD.device) >= (8, 0)
    )


def _even(t: Tensor, width: int) -> Tensor:
    t = t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1]))
    return t if t.stride(-1) == 1 else t.contiguous()


def _reach(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def forward_packed(
    q_HND: Tensor,
    k_GND: Tensor,
    v_GNE: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of S segments: rows starts_q[s] … starts_q[s+1] against keys starts_k[s] … starts_k[s+1].

    `starts_*` are int32 [S+1] on the device. Returns out [H, Nq, E] and lse [H, Nq].
    """
    width = max(q_HND.shape[2], v_GNE.shape[2])
    q, k, v = (_even(t.transpose(0, 1), width) for t in (q_HND, k_GND, v_GNE))
    out, lse, *_ = _forward(
        q, k, v, starts_q, starts_k, longest_q, longest_k, 0.0, causal, False, scale=scale, **_reach(window)
    )
    return out[..., : v_GNE.shape[2]].transpose(0, 1), lse


def backward_packed(
    dout_HNE: Tensor,
    q_HND: Tensor,
    k_GND: Tensor,
    v_GNE: Tensor,
    out_HNE: Tensor,
    lse_HN: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of `forward_packed`, shaped as its inputs."""
    width = max(q_HND.shape[2], v_GNE.shape[2])
    dout, q, k, v, out = (_even(t.transpose(0, 1), width) for t in (dout_HNE, q_HND, k_GND, v_GNE, out_HNE))
    no_state = torch.empty(2, device=q.device, dtype=torch.uint64)
    grads = _backward(
        dout,
        q,
        k,
        v,
        out,
        lse_HN.contiguous(),
        starts_q,
        starts_k,
        longest_q,
        longest_k,
        0.0,
        causal,
        no_state,
        no_state,
        scale=scale,
        **_reach(window),
    )
    dq, dk, dv = (g.transpose(0, 1) for g in grads)
    return dq[..., : q_HND.shape[2]], dk[..., : k_GND.shape[2]], dv[..., : v_GNE.shape[2]]


def _bounds(length: int, device: torch.device) -> Tensor:
    return torch.tensor([0, length], dtype=torch.int32).to(device, non_blocking=True)


def forward(
    q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, scale: float, causal: bool, window: int | None = None
) -> tuple[Tensor, Tensor]:
    lq, lk = q_BHLD.shape[2], k_BGLD.shape[2]
    bounds = _bounds(lq, q_BHLD.device), _bounds(lk, q_BHLD.device), lq, lk
    rows = [
        forward_packed(q, k, v, *bounds, scale=scale, causal=causal, window=window)
        for q, k, v in zip(q_BHLD, k_BGLD, v_BGLE)
    ]
    if len(rows) == 1:
        return rows[0][0].unsqueeze(0), rows[0][1].unsqueeze(0)
    out, lse = (torch.stack(parts) for parts in zip(*rows))
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
    lq, lk = q_BHLD.shape[2], k_BGLD.shape[2]
    bounds = _bounds(lq, q_BHLD.device), _bounds(lk, q_BHLD.device), lq, lk
    rows = [
        backward_packed(dout, q, k, v, out, lse, *bounds, scale=scale, causal=causal, window=window)
        for dout, q, k, v, out, lse in zip(dout_BHLE, q_BHLD, k_BGLD, v_BGLE, out_BHLE, lse_BHL)
    ]
    if len(rows) == 1:
        return rows[0][0].unsqueeze(0), rows[0][1].unsqueeze(0), rows[0][2].unsqueeze(0)
    dq, dk, dv = (torch.stack(parts) for parts in zip(*rows))
    return dq, dk, dv
