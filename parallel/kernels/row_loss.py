"""Negative log-likelihood of each row of logits and its gradient, without a float32 copy of the logits.

One Triton program per row: a first sweep finds maximum and log-sum-exp in float32, a second writes
(softmax - onehot) * weight in the type of the logits. The plain reference needs two float32 copies of the chunk, which
is what limits the rows of a chunk; the kernel needs the logits and their gradient only.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU build of torch comes without Triton
    triton = None

BLOCK = 8192


def row_loss(
    logits_RV: Tensor, labels_R: Tensor, weights_R: Tensor | None, want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """nll [R] in float32 (float64 for float64 logits), and d(sum of weight * nll)/d(logits) [R, V] in their type.

    `labels_R` int64 in [0, V). `weights_R` None means 1. The logits are left as they are.
    """
    if triton is not None and logits_RV.is_cuda and logits_RV.stride(1) == 1:
        return _by_kernel(logits_RV, labels_R, weights_R, want_gradient)
    return reference(logits_RV, labels_R, weights_R, want_gradient)


def reference(
    logits_RV: Tensor, labels_R: Tensor, weights_R: Tensor | None, want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The definition of `row_loss`."""
    z = logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()
    lse = torch.logsumexp(z, dim=1)
    nll = lse - z.gather(1, labels_R[:, None]).squeeze(1)
    if not want_gradient:
        return nll, None
    gradient = torch.exp(z - lse[:, None])
    gradient.scatter_add_(1, labels_R[:, None], torch.full_like(nll, -1.0)[:, None])
    if weights_R is not None:
        gradient *= weights_R.to(gradient.dtype)[:, None]
    return nll, gradient.to(logits_RV.dtype)


def _by_kernel(
    logits_RV: Tensor, labels_R: Tensor, weights_R: Tensor | None, want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    rows, width = logits_RV.shape
    nll = torch.empty(rows, dtype=torch.float32, device=logits_RV.device)
    gradient = torch.empty_like(logits_RV) if want_gradient else None
    weights = nll if weights_R is None else weights_R.float().contiguous()
    if rows:
        _row_loss_kernel[(rows,)](  # pyright: ignore[reportIndexIssue]
            logits_RV, labels_R, weights, nll, logits_RV if gradient is None else gradient,
            width, logits_RV.stride(0), 0 if gradient is None else gradient.stride(0),
            weights_R is not None, want_gradient, BLOCK, num_warps=16,
        )  # fmt: skip
    return nll, gradient


if triton is not None:

    @triton.jit
    def _row_loss_kernel(
        logits, labels, weights, nll, gradient, width, logits_stride, gradient_stride,
        WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        logits += row * logits_stride
        label = tl.load(labels + row)
        column = tl.arange(0, BLOCK)
        high = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            z = tl.load(logits + start + column, mask=start + column < width, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(high, z)
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(high - shift) + tl.exp(z - shift)
            high = higher
        top = tl.max(high, 0)
        lse = top + tl.log(tl.sum(total * tl.exp(high - top), 0))
        tl.store(nll + row, lse - tl.load(logits + label).to(tl.float32))
        if GRADIENT:
            weight = 1.0
            if WEIGHTED:
                weight = tl.load(weights + row)
            gradient += row * gradient_stride
            for start in range(0, width, BLOCK):
                inside = start + column < width
                z = tl.load(logits + start + column, mask=inside, other=float("-inf")).to(tl.float32)
                p = tl.exp(z - lse) - tl.where(start + column == label, 1.0, 0.0)
                tl.store(gradient + start + column, (p * weight).to(gradient.dtype.element_ty), mask=inside)
