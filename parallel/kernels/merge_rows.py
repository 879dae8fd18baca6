"""Merge one attention part into another in place: one Triton pass where the plain formula makes nine.

The plain reference is `parallel.merge.merge`, which also serves every device and type that the kernel does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..merge import merge

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU build of torch comes without Triton
    triton = None

BLOCK_ROWS = 16


def merge_into(out_BHTD: Tensor, lse_BHT: Tensor, part_BHTD: Tensor, part_lse_BHT: Tensor) -> None:
    """out, lse <- merge(out, lse, part, part_lse), in place. `lse` is contiguous, float32 for the kernel.

    The two outs may differ in dtype; the sum is formed in that of `lse` and rounded once, to that of `out`.
    """
    outs = out_BHTD, part_BHTD
    plain = triton is None or not out_BHTD.is_cuda or lse_BHT.dtype != torch.float32
    if plain or any(x.stride(3) != 1 for x in outs):
        out, lse = merge(out_BHTD.to(lse_BHT.dtype), lse_BHT, part_BHTD, part_lse_BHT)
        out_BHTD.copy_(out)
        lse_BHT.copy_(lse)
        return
    batch, heads, rows, width = out_BHTD.shape
    _merge_kernel[(-(-rows // BLOCK_ROWS), batch * heads)](  # pyright: ignore[reportIndexIssue]
        *outs, lse_BHT, part_lse_BHT.contiguous(), heads, rows, width,
        *(stride for x in outs for stride in x.stride()[:3]), BLOCK_ROWS, 1 << (width - 1).bit_length(),
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _merge_kernel(
        out, part, lse, part_lse, heads, rows, width,
        out_b, out_h, out_t, part_b, part_h, part_t,
        ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        head = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        inside = row < rows
        cell = inside[:, None] & (column < width)[None, :]
        a = tl.load(lse + head * rows + row, mask=inside, other=float("-inf"))
        b = tl.load(part_lse + head * rows + row, mask=inside, other=float("-inf"))
        high = tl.maximum(a, b)
        high = tl.where(high == float("-inf"), 0.0, high)
        weight_a = tl.exp(a - high)
        weight_b = tl.exp(b - high)
        total = weight_a + weight_b
        safe = tl.where(total == 0.0, 1.0, total)
        place = out + (head // heads) * out_b + (head % heads) * out_h + row[:, None] * out_t + column[None, :]
        other = part + (head // heads) * part_b + (head % heads) * part_h + row[:, None] * part_t + column[None, :]
        x = tl.load(place, mask=cell, other=0.0).to(tl.float32)
        y = tl.load(other, mask=cell, other=0.0).to(tl.float32)
        value = x * (weight_a / safe)[:, None] + y * (weight_b / safe)[:, None]
        tl.store(place, value.to(out.dtype.element_ty), mask=cell)
        tl.store(lse + head * rows + row, tl.log(total) + high, mask=inside)
