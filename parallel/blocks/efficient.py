"""Memory-efficient attention (Rabe and Staats 2021, xFormers' kernels) as torch ships it for CUDA, called through aten.

What flash kernels leave out runs here without a matrix of scores: float32, and devices before Ampere. Its heads are
ungrouped, so key heads are repeated for the call and their gradients summed. The log-sum-exp comes padded with +inf to
a multiple of 32 rows, and backward wants it so again. Windows are left to others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "efficient"
ALIGNED_ROWS = 32  # of the log-sum-exp
NO_MASK, FROM_BOTTOM_RIGHT = 0, 2  # torch's `CustomMaskType`
_forward = torch.ops.aten._efficient_attention_forward.default
_backward = torch.ops.aten._efficient_attention_backward.default


def supports(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, causal: bool, window: int | None) -> bool:
    return (
        q_BHLD.is_cuda
        and torch.version.hip is None  # there causal masks begin at the first key
        and q_BHLD.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and (q_BHLD.dtype != torch.bfloat16 or torch.cuda.get_device_capability(q_BHLD.device) >= (8, 0))
        and window is None
        and q_BHLD.shape[3] % 8 == 0
        and v_BGLE.shape[3] % 8 == 0
    )


def _rows_second(x_BHLD: Tensor, share: int = 1) -> Tensor:
    """[B, L, H, D] with a dense last dim; each head `share` times."""
    x = x_BHLD if share == 1 else x_BHLD.repeat_interleave(share, 1)
    x = x.transpose(1, 2)
    return x if x.stride(3) == 1 and x.stride(2) % 8 == 0 else x.contiguous()


def forward(
    q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, scale: float, causal: bool, window: int | None = None
) -> tuple[Tensor, Tensor]:
    share, kind = q_BHLD.shape[1] // k_BGLD.shape[1], FROM_BOTTOM_RIGHT if causal else NO_MASK
    given = _rows_second(q_BHLD), _rows_second(k_BGLD, share), _rows_second(v_BGLE, share)
    out, lse, *_ = _forward(*given, None, None, None, None, None, 0.0, kind, True, scale=scale)
    return out.transpose(1, 2), lse[:, :, : q_BHLD.shape[2]]


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
    groups, share = k_BGLD.shape[1], q_BHLD.shape[1] // k_BGLD.shape[1]
    q, k, v = _rows_second(q_BHLD), _rows_second(k_BGLD, share), _rows_second(v_BGLE, share)
    dout, out = (x.transpose(1, 2).contiguous() for x in (dout_BHLE, out_BHLE))
    lse = F.pad(lse_BHL, (0, -lse_BHL.shape[2] % ALIGNED_ROWS), value=float("inf")).contiguous()
    no_state = torch.zeros((), dtype=torch.int64, device=q.device)
    rest: Any = (0.0, no_state, no_state, FROM_BOTTOM_RIGHT if causal else NO_MASK, False)
    dq, dk, dv, _ = _backward(dout, q, k, v, None, out, None, None, q.shape[1], k.shape[1], lse, *rest, scale=scale)
    dk, dv = (x.transpose(1, 2).unflatten(1, (groups, share)).sum(2) for x in (dk, dv))
    return dq.transpose(1, 2), dk, dv
