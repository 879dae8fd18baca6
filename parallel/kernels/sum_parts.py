"""Sums of several parts of one result, each one pass over memory: of attention by its log-sum-exp, or of gradients.

A block's result is small beside what its sum costs: adding parts one at a time reads and writes the whole float32 sum
for each. Here all parts that are there are read once, summed in float32 in their order, and rounded once. The plain
reference of the first is `parallel.merge.merge_parts`, of the second `_add`; both also serve every device and type that
the kernels do not. A log-sum-exp is taken as it lies, heads first as kernels leave it or rows first: bringing it into
one order would be one more pass for each part.

Legend: N rows, H heads, E numbers in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ..merge import merge_parts

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU build of torch comes without Triton
    triton = None

BLOCK_ROWS = 16
BLOCK = 1024
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def merge_parts_to(out_NHE: Tensor, lse_NH: Tensor, outs_NHE: Sequence[Tensor], lses_NH: Sequence[Tensor]) -> None:
    """out, lse <- the attention over all keys of the parts; `out` and `lse`, dense, may be the first of them.

    Dtypes of outs may differ. The sum is formed in the dtype of `lse` and rounded once, to that of `out`.
    """
    if not _fit((out_NHE, *outs_NHE, lse_NH)) or any(lse.dtype not in _TYPES for lse in lses_NH):
        out, lse = merge_parts(outs_NHE, lses_NH)
        out_NHE.copy_(out)
        lse_NH.copy_(lse)
    elif out_NHE.numel():
        rows, heads, width = out_NHE.shape
        by_row, by_head = zip(*(lse.stride() for lse in lses_NH))
        _merge_kernel[(-(-rows * heads // BLOCK_ROWS),)](  # pyright: ignore[reportIndexIssue]
            tuple(outs_NHE), tuple(lses_NH), by_row, by_head, out_NHE, lse_NH, rows * heads, heads, width,
            BLOCK_ROWS, 1 << (width - 1).bit_length(),
        )  # fmt: skip


def add_parts_to(out: Tensor, parts: Sequence[Tensor]) -> None:
    """out <- the sum of the parts, in their order; `out` may be the first of them. Shapes agree, dtypes may differ."""
    if not _fit((out, *parts)):
        _add(out, parts)
    elif out.numel():
        _add_kernel[(-(-out.numel() // BLOCK),)](tuple(parts), out, out.numel(), BLOCK)  # pyright: ignore[reportIndexIssue]


def _add(out: Tensor, parts: Sequence[Tensor]) -> None:
    wide = reduce(torch.promote_types, (part.dtype for part in parts), torch.promote_types(out.dtype, torch.float32))
    first = torch.promote_types(parts[0].dtype, parts[1].dtype)
    if len(parts) == 2 and first.itemsize >= out.element_size():
        torch.add(*parts, out=out)  # 16 bits are added in 32 and rounded once
        return
    total = out if out.dtype == wide else torch.empty_like(out, dtype=wide)
    if first == wide:
        torch.add(parts[0], parts[1], out=total)
    else:
        total.copy_(parts[0]).add_(parts[1])
    for part in parts[2:]:
        total.add_(part)
    if total is not out:
        out.copy_(total)


def _fit(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels take them: dense on CUDA, in types whose sums are formed in float32."""
    return triton is not None and all(x.is_cuda and x.is_contiguous() and x.dtype in _TYPES for x in tensors)


if triton is not None:

    @triton.jit
    def _lse(of, row, by_row, head, by_head, inside):
        return tl.load(of + row * by_row + head * by_head, mask=inside, other=float("-inf"))

    @triton.jit
    def _merge_kernel(
        outs, lses, by_row, by_head, out, lse, count, heads, width, ROWS: tl.constexpr, WIDTH: tl.constexpr
    ):  # fmt: skip
        first = tl.program_id(0).to(tl.int64) * ROWS
        at = (first % heads).to(tl.int32) + tl.arange(0, ROWS)  # small numbers divide faster
        row, head = first // heads + at // heads, at % heads
        entry = first + tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        inside = entry < count
        cell = inside[:, None] & (column < width)[None, :]
        place = entry[:, None] * width + column[None, :]
        high = tl.full((ROWS,), float("-inf"), tl.float32)
        for part in tl.static_range(len(lses)):
            high = tl.maximum(high, _lse(lses[part], row, by_row[part], head, by_head[part], inside))
        high = tl.where(high == float("-inf"), 0.0, high)
        total = tl.zeros((ROWS,), tl.float32)
        for part in tl.static_range(len(lses)):
            total += tl.exp(_lse(lses[part], row, by_row[part], head, by_head[part], inside) - high)
        safe = tl.where(total == 0.0, 1.0, total)
        value = tl.zeros((ROWS, WIDTH), tl.float32)
        for part in tl.static_range(len(outs)):
            weight = tl.exp(_lse(lses[part], row, by_row[part], head, by_head[part], inside) - high) / safe
            value += tl.load(outs[part] + place, mask=cell, other=0.0).to(tl.float32) * weight[:, None]
        tl.debug_barrier()  # lse may be the first part's, which all threads have read now
        tl.store(out + place, value.to(out.dtype.element_ty), mask=cell)
        tl.store(lse + entry, tl.log(total) + high, mask=inside)

    @triton.jit
    def _add_kernel(parts, out, count, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        total = tl.load(parts[0] + at, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, len(parts)):
            total += tl.load(parts[part] + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
