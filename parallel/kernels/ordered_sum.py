"""The sum of what the ranks sent, in their order: one Triton pass where torch makes one for each rank and two more.

The plain reference is `comms.overlap_engine.add_in_order`, which also serves every device and type that the kernel does
not; both add in float32, first to last, and round once, so they give the same bits. The sum is the last thing that an
overlapped product does, with nothing left to hide behind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...comms.overlap_engine import add_in_order

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU build of torch comes without Triton
    triton = None

BLOCK, MOST = 1024, 16  # columns of a program; parts of a sum
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def ordered_sum(parts: list[Tensor], out: Tensor) -> None:
    """out [rows, columns] = parts[0] + parts[1] + …, each of out's shape."""
    if len(parts) < 3 or not _fits(parts, out):
        add_in_order(parts, out)
        return
    rows, columns = out.shape
    _sum_kernel[(rows, -(-columns // BLOCK))](  # pyright: ignore[reportIndexIssue]
        tuple(parts), tuple(part.stride(0) for part in parts), out, out.stride(0), columns, BLOCK
    )


def _fits(parts: list[Tensor], out: Tensor) -> bool:
    if triton is None or not out.is_cuda or out.dtype not in _TYPES or len(parts) > MOST or not out.numel():
        return False
    return all(part.dtype == out.dtype and part.stride(1) == 1 for part in (*parts, out))


if triton is not None:

    @triton.jit
    def _sum_kernel(parts, strides, out, out_stride, columns, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        total = tl.load(parts[0] + row * strides[0] + column, mask=inside, other=0.0).to(tl.float32)
        for at in tl.static_range(1, len(parts)):
            total += tl.load(parts[at] + row * strides[at] + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * out_stride + column, total.to(out.dtype.element_ty), mask=inside)
