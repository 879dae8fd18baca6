"""cuDNN attention for CUDA, called through aten: on Hopper 1.7 times as fast as FlashAttention-2.

Its causal mask, like torch's, aligns the first query with the first key, so a chunk against its prefix is split into
the prefix (no mask) and the square diagonal (causal), merged by log-sum-exp; backward runs both parts with the merged
values. On an H100 the split costs 1 to 2 %. A plan is built for each new shape on first use, so the first step with a
new chunk length is slow.

torch finds a plan again by the strides of q, k and v, not by those of `out`, which its own forward lays out as q. An
`out` that lies otherwise (a slice of a buffer, one that was kept in another order) would meet a plan made for a
different one and give wrong gradients without an error, so backward brings `out` into q's order first.

Its backward adds in whatever order blocks end, and torch hands it no switch, so under
`torch.use_deterministic_algorithms(True)` it steps back for FlashAttention-2, which obeys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.merge_rows import merge_into

NAME = "cudnn"
FEWEST_ROWS = 128
_forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


def supports(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, causal: bool, window: int | None) -> bool:
    return (
        q_BHLD.is_cuda
        and q_BHLD.dtype in (torch.bfloat16, torch.float16)
        and window is None
        and q_BHLD.shape[3] == v_BGLE.shape[3]
        and q_BHLD.shape[3] <= 128
        and q_BHLD.shape[3] % 8 == 0
        and q_BHLD.shape[2] >= FEWEST_ROWS
        and (_parts_fit(q_BHLD.shape[2], k_BGLD.shape[2]) if causal else k_BGLD.shape[2] >= FEWEST_ROWS)
        and torch.cuda.get_device_capability(q_BHLD.device) >= (9, 0)
        and torch.backends.cuda.cudnn_sdp_enabled()
        and not _must_repeat()
    )


def _must_repeat() -> bool:
    """Whether torch was told to use deterministic algorithms, and not only to warn."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _parts_fit(lq: int, lk: int) -> bool:
    """Whether no part of a causal call has fewer than FEWEST_ROWS keys."""
    return lk == lq or lk - lq >= FEWEST_ROWS


def _parts(lq: int, lk: int, causal: bool) -> list[tuple[int, int, bool]]:
    if not causal:
        return [(0, lk, False)]
    diagonal = (lk - lq, lk, True)
    return [diagonal] if lq == lk else [diagonal, (0, lk - lq, False)]


def _laid_out_as(q_BHLD: Tensor, out_BHLE: Tensor) -> Tensor:
    """`out` with the strides that torch's forward gives it: dense, dimensions in the order of q's."""
    if out_BHLE.stride() == torch.empty_like(q_BHLD, device="meta").stride():
        return out_BHLE
    return torch.empty_like(q_BHLD).copy_(out_BHLE)


def forward(
    q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, scale: float, causal: bool, window: int | None = None
) -> tuple[Tensor, Tensor]:
    out = lse = None
    for k0, k1, is_causal in _parts(q_BHLD.shape[2], k_BGLD.shape[2], causal):
        part, part_lse, *_ = _forward(
            q_BHLD, k_BGLD[:, :, k0:k1], v_BGLE[:, :, k0:k1], None, True, 0.0, is_causal, False, scale=scale
        )
        part_lse = part_lse.squeeze(-1) if part_lse.dim() == 4 else part_lse
        if out is None or lse is None:
            out, lse = part, part_lse
        else:
            merge_into(out, lse, part, part_lse)
    assert out is not None and lse is not None
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
    seed = torch.zeros((), dtype=torch.int64, device=q_BHLD.device)
    lse, out = lse_BHL.unsqueeze(-1).contiguous(), _laid_out_as(q_BHLD, out_BHLE)
    parts = []
    for k0, k1, is_causal in _parts(lq, lk, causal):
        k, v = k_BGLD[:, :, k0:k1], v_BGLE[:, :, k0:k1]
        parts.append(
            _backward(
                dout_BHLE, q_BHLD, k, v, out, lse, seed, seed, None, None, None, lq, k1 - k0, 0.0, is_causal,
                scale=scale,
            )
        )  # fmt: skip
    if len(parts) == 1:
        return parts[0]
    (dq, dk_diagonal, dv_diagonal), (dq_prefix, dk_prefix, dv_prefix) = parts
    dk, dv = torch.cat((dk_prefix, dk_diagonal), 2), torch.cat((dv_prefix, dv_diagonal), 2)
    return dq.add_(dq_prefix), dk, dv
