"""Products of rows for attention's backward, each one pass over memory where plain torch makes several wide copies.

`row_dot` is delta = rowsum(dout * out). `standing_out` is the way back: dout * delta / |dout|², an output whose rowsum
with dout is delta, for kernels that want an output where only delta has travelled. The plain forms beside them are the
reference, and serve every device and type that the kernels do not. Squares are formed of numbers scaled by the row's
largest (plainly: in float64), so that none vanishes; a row of zeros gives zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU build of torch comes without Triton
    triton = None

BLOCK_ROWS = 16


def row_dot(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over the last dim of a * b, formed in `dtype` and returned in it."""
    if not _fit(a, b) or dtype != torch.float32:
        return (a.to(dtype) * b.to(dtype)).sum(-1)
    out = torch.empty(a.shape[:-1], dtype=dtype, device=a.device)
    if out.numel():
        _dot_kernel[(-(-out.numel() // BLOCK_ROWS),)](  # pyright: ignore[reportIndexIssue]
            a, b, out, out.numel(), a.shape[-1], BLOCK_ROWS, 1 << (a.shape[-1] - 1).bit_length()
        )
    return out


def standing_out(dout: Tensor, delta: Tensor) -> Tensor:
    """[..., E] in the dtype and layout of `dout`, for `delta` [...] in float32 or float64."""
    if not _fit(dout, delta) or delta.dtype != torch.float32:
        norm = torch.linalg.vector_norm(dout, dim=-1, dtype=torch.float64).square_()
        factor = torch.where(norm == 0, torch.zeros_like(norm), delta / norm).to(delta.dtype)
        return torch.mul(dout, factor.unsqueeze(-1), out=torch.empty_like(dout))
    out = torch.empty_like(dout)
    if delta.numel():
        _standing_kernel[(-(-delta.numel() // BLOCK_ROWS),)](  # pyright: ignore[reportIndexIssue]
            dout, delta, out, delta.numel(), dout.shape[-1], BLOCK_ROWS, 1 << (dout.shape[-1] - 1).bit_length()
        )
    return out


def _fit(a: Tensor, b: Tensor) -> bool:
    """Whether the kernels take them: dense rows on CUDA, in types whose sums are formed in float32."""
    dense = a.is_contiguous() and b.is_contiguous()
    return triton is not None and a.is_cuda and dense and torch.float64 not in (a.dtype, b.dtype)


if triton is not None:

    @triton.jit
    def _dot_kernel(a, b, out, count, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        inside = row < count
        cell = inside[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        x = tl.load(a + place, mask=cell, other=0.0).to(tl.float32)
        y = tl.load(b + place, mask=cell, other=0.0).to(tl.float32)
        tl.store(out + row, tl.sum(x * y, axis=1), mask=inside)

    @triton.jit
    def _standing_kernel(dout, delta, out, count, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        inside = row < count
        cell = inside[:, None] & (column < width)[None, :]
        place = row[:, None] * width + column[None, :]
        x = tl.load(dout + place, mask=cell, other=0.0).to(tl.float32)
        high = tl.max(tl.abs(x), axis=1)
        scale = tl.where(high == 0.0, 1.0, high)
        y = x / scale[:, None]
        total = tl.sum(y * y, axis=1)  # at least 1, but for rows of zeros
        factor = tl.load(delta + row, mask=inside, other=0.0) / scale / tl.where(total == 0.0, 1.0, total)
        tl.store(out + place, (y * factor[:, None]).to(out.dtype.element_ty), mask=cell)
